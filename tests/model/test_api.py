"""The model object: what it accepts, what it refuses, and in how many pieces it works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import GOLDEN
from references import assert_close, model_terms

import medsiglip_jax
from medsiglip_jax.model import api, config, sharding, towers
from medsiglip_jax.model.processor import Processor
from medsiglip_jax.model.weights import layouts
from medsiglip_jax.preprocess import text
from medsiglip_jax.preprocess.image import PRESETS

TERMS = model_terms(medsiglip_jax.load(GOLDEN).config)


@pytest.fixture
def model(golden):
    return golden


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "expected.npz")


def test_shapes_types_and_norms(model, expected):
    zimg = model.encode_image(expected["pixels"])
    assert zimg.dtype == jnp.float32 and zimg.shape == (3, 32)
    assert_close(np.linalg.norm(zimg, axis=1), 1, 2 * 32)
    raw = model.encode_image(expected["pixels"], normalize=False)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 1e-3
    assert_close(raw / np.linalg.norm(raw, axis=1, keepdims=True), zimg, TERMS)
    assert model.encode_tokens(expected["pixels"]).shape == (3, 9, 32)
    assert model.encode_text(expected["tokens"], normalize=False).shape == (4, 32)


@pytest.mark.float
def test_similarity_takes_cosines_of_anything(model, expected):
    zimg, ztxt = model.encode_image(expected["pixels"]), model.encode_text(expected["tokens"])
    # The sums of two norms and of the product; 118 cosines, less 12.7.
    assert_close(
        model.similarity(5 * zimg, np.asarray(ztxt) * 0.1),
        model.similarity(zimg, ztxt),
        terms=3 * 32,
        largest=118 + 12.7,
    )


@pytest.mark.float
def test_floats_in_range_equal_uint8(model, expected):
    pixels = expected["pixels"]
    floats = pixels.astype(np.float32) / 255 * 2 - 1
    assert_close(model.encode_image(floats), model.encode_image(pixels), TERMS)
    assert_close(model.encode_image(jnp.asarray(floats)), model.encode_image(pixels), TERMS)


@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_pieces_equal_one_batch(model, expected, n):
    pixels = np.resize(expected["pixels"], (n, 42, 42, 3))
    whole = model.encode_image(pixels)
    assert whole.shape == (n, 32)
    assert_close(model.encode_image(pixels, batch_size=3), whole, TERMS)
    assert model.encode_text(np.ones((n, 64), np.int32), batch_size=3).shape == (n, 32)


def test_pieces_compile_once(model, expected):
    model._image.clear_cache()  # other models of its architecture have filled it
    model.encode_image(np.resize(expected["pixels"], (7, 42, 42, 3)), batch_size=3)
    assert model._image._cache_size() == 1


@pytest.fixture
def large(model, monkeypatch):
    """The same model, as if two of its images were too much for the cache of a CPU."""
    monkeypatch.setattr(api, "_CPU_PIECE_BYTES", 1)
    monkeypatch.setattr(api, "_image_encoders", api._image_encoders.__wrapped__)
    return api.Model(model.params, model.config, compute=towers.Compute(attention="blocked"))


def test_large_images_go_by_fours_and_the_rest_one_by_one(large, model, expected):
    pixels = np.resize(expected["pixels"], (6, 42, 42, 3))
    z = large.encode_image(pixels)
    assert large._image._cache_size() == 2
    assert_close(z, model.encode_image(pixels), TERMS)


@pytest.mark.parametrize("n, batch_size, sizes", [
    (1, 32, [1]), (3, 32, [1, 1, 1]), (9, 32, [4, 4, 1]), (8, 3, [3, 3, 1, 1]), (2, 1, [1, 1]),
    (6, 6, [3, 3]), (7, 7, [1] * 7),
])  # fmt: skip
def test_no_large_image_is_padding(large, n, batch_size, sizes):
    """And a whole batch is one program, so that it does not matter which rows a batch holds."""
    cuts = large._cuts(n, batch_size, large.config.vision)
    assert [size for _, size in cuts] == sizes
    assert [start for start, _ in cuts] == [sum(sizes[:i]) for i in range(len(sizes))]


def test_only_one_cpu_encodes_one_by_one():
    """No accelerator's program, nor that of a mesh, nor one of images that are small, has it."""
    vision = config.named("so400m-448").vision
    assert api.encoding(towers.Compute(attention="blocked"), vision).one_by_one
    for attention in ("xla", "splash", "cudnn"):
        assert not api.encoding(towers.Compute(attention=attention), vision).one_by_one
    rows = sharding.batch_sharding(sharding.make_mesh())
    assert not api.encoding(towers.Compute(attention="blocked", rows=rows), vision).one_by_one
    small = config.named("tiny-56").vision
    assert not api.encoding(towers.Compute(attention="blocked"), small).one_by_one


def test_models_of_one_architecture_share_their_programs(model):
    """Other weights need no compilation of their own; another dtype does."""
    same = api.Model(model.params, model.config, compute=model.compute)
    other = api.Model(model.params, model.config, compute=towers.Compute("bfloat16"))
    for name in ("_image", "_tokens", "_text"):
        assert getattr(same, name) is getattr(model, name)
        assert getattr(other, name) is not getattr(model, name)


@pytest.mark.float
def test_one_device_equals_eight(model, expected):
    mesh = sharding.make_mesh()
    assert mesh.shape["data"] == 8
    many = medsiglip_jax.load(GOLDEN, mesh=mesh)
    for name, given in (("encode_image", "pixels"), ("encode_text", "tokens")):
        got, want = (getattr(m, name)(expected[given]) for m in (many, model))
        assert_close(got, want, TERMS)


def test_works_under_an_outer_jit(model, expected):
    z = jax.jit(model.encode_image)(expected["pixels"])
    assert_close(z, model.encode_image(expected["pixels"]), TERMS)


@pytest.mark.parametrize("images, say", [
    (np.zeros((42, 42, 3), np.uint8), r"expected \[n, 42, 42, 3\]"),
    (np.zeros((1, 448, 448, 3), np.uint8), r"expected \[n, 42, 42, 3\]"),
    (np.zeros((1, 3, 42, 42), np.uint8), r"expected \[n, 42, 42, 3\]"),
    (np.zeros((1, 42, 42, 3), np.int32), "expected uint8"),
    (np.full((1, 42, 42, 3), 200.0), r"spans \[200, 200\]"),
    (np.full((1, 42, 42, 3), -2.1, np.float32), "not ImageNet"),
    (np.full((1, 42, 42, 3), np.nan, np.float32), r"expected floats in \[-1, 1\]"),
])  # fmt: skip
def test_wrong_images(model, images, say):
    with pytest.raises(ValueError, match=say):
        model.encode_image(images)


@pytest.mark.parametrize("tokens, say", [
    (np.ones((1, 63), np.int32), r"expected \[n, 64\]"),
    (np.ones(64, np.int32), r"expected \[n, 64\]"),
    (np.ones((1, 64), np.float32), "expected int32"),
    (np.full((1, 64), 64, np.int32), "vocabulary is 0…63"),
    (np.full((1, 64), -1, np.int32), "vocabulary"),
])  # fmt: skip
def test_wrong_tokens(model, tokens, say):
    with pytest.raises(ValueError, match=say):
        model.encode_text(tokens)


def test_wrong_embeddings_and_batch_size(model):
    with pytest.raises(ValueError, match=r"image_embeddings.*expected \[n, 32\]"):
        model.similarity(np.ones((2, 31)), np.ones((2, 32)))
    with pytest.raises(ValueError, match="batch_size"):
        model.encode_image(np.zeros((1, 42, 42, 3), np.uint8), batch_size=0)


SIZES = dict(image_size=28, patch_size=14, width=16, depth=1, mlp_dim=16, num_heads=2)


@pytest.mark.parametrize("rows, say", [
    (32_000, "spiece.model.*medsiglip-448.*--tokenizer"),
    (256_000, "MedSigLIP's has another vocabulary .32,000 pieces, this model 256,000"),
])  # fmt: skip
def test_a_missing_tokenizer_is_an_error_only_when_text_is_asked_for(rows, say):
    """The advice to take MedSigLIP's is for models with its vocabulary."""
    processor = Processor(config.two_towers(**SIZES, vocab_size=rows), None)
    processor.images(np.zeros((30, 30, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match=say):
        processor.texts(["a"])


@pytest.mark.parametrize("rows", [18, 20, 256_000])
def test_a_tokenizer_of_another_model_is_refused(rows):
    """With fewer rows its ids would run past them; with more it is another model's all the same."""
    tokenizer = text.train([f"a {word} scan" for word in ("dark", "grey", "bright")] * 3, 40)
    processor = Processor(config.two_towers(**SIZES, vocab_size=rows), tokenizer)
    with pytest.raises(ValueError, match=f"19 pieces and the text tower {rows:,} embeddings"):
        processor.texts(["a"])
    Processor(config.two_towers(**SIZES, vocab_size=19), tokenizer).texts(["a"])


def test_tokenizer_path_must_exist():
    with pytest.raises(FileNotFoundError, match="nowhere.model"):
        medsiglip_jax.load(GOLDEN, tokenizer="nowhere.model")


def test_processor_images(model):
    image = np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8)
    made = {p: model.processor.images([image], p) for p in PRESETS}
    assert all(x.shape == (1, 42, 42, 3) and x.dtype == np.uint8 for x in made.values())
    assert len({x.tobytes() for x in made.values()}) == 4
    np.testing.assert_array_equal(model.processor.images([image]), made["big_vision"])


def test_saving_over_something_is_refused(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for format in layouts.WRITABLE:
        with pytest.raises(FileExistsError):
            medsiglip_jax.save(model, tmp_path / "full", format=format)
    assert (tmp_path / "full" / "file").read_text() == "x"
    medsiglip_jax.save(model, tmp_path / "m.npz", format="big_vision")
    with pytest.raises(FileExistsError):
        medsiglip_jax.save(model, tmp_path / "m.npz", format="big_vision")


def test_public_names():
    assert set(medsiglip_jax.__all__) <= set(dir(medsiglip_jax))
    for name in medsiglip_jax.__all__:
        assert getattr(medsiglip_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = medsiglip_jax.laod
