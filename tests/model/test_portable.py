"""A model in Python: what it says of itself, its copies and pickles, and what it takes."""

import copy
import pickle
import runpy
import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import SMALL, assert_close, model_terms

import medsiglip_jax
from medsiglip_jax.model import sharding, tree

TEXTS = ["photo of a b", "scan"]
SIDE, WIDTH = SMALL.image_size, SMALL.embed_dim


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)


def test_repr_says_what_the_model_is(model, checkpoint):
    count = sum(leaf.size for _, leaf in tree.items(model.params))
    text = repr(model)
    assert len(text.splitlines()) == 1
    for said in (
        str(checkpoint),
        f"{count:,} parameters",
        "float32",
        f"{SIDE} px",
        "tokens",
        "cpu:0",
    ):
        assert said in text
    half = medsiglip_jax.init("tiny-56", dtype="bfloat16")
    assert "tiny-56" in repr(half) and "bfloat16" in repr(half)
    assert "texts" not in repr(half.__class__({"img": half.params["img"]}, _image_only(half)))


def _image_only(model):
    return medsiglip_jax.ModelConfig(model.config.vision, None)


def test_a_pickle_needs_no_files_and_gives_the_same_numbers(tmp_path, checkpoint, pixels):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    model = medsiglip_jax.load(folder)
    zimg, ztxt = model.encode_image(pixels), model.encode_text(TEXTS)
    content = pickle.dumps(model)
    shutil.rmtree(folder)  # as on another machine
    found = pickle.loads(content)
    np.testing.assert_array_equal(found.encode_image(pixels), zimg)
    np.testing.assert_array_equal(found.encode_text(TEXTS), ztxt)
    assert found.sha256 == model.sha256 and found.source == str(folder)
    again = pickle.loads(pickle.dumps(found))
    assert again.sha256 == model.sha256
    medsiglip_jax.save(again, tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "---\nlicense: mit\n---\n"
    np.testing.assert_array_equal(medsiglip_jax.load(tmp_path / "saved").encode_text(TEXTS), ztxt)


def test_a_model_on_a_mesh_can_be_pickled(model, checkpoint, pixels):
    split = medsiglip_jax.load(checkpoint, mesh=sharding.make_mesh(2))
    found = pickle.loads(pickle.dumps(split))
    assert found.mesh is None
    assert_close(found.encode_image(pixels), model.encode_image(pixels), model_terms(SMALL))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_stay_on_their_devices(copied, checkpoint, pixels):
    model = medsiglip_jax.load(checkpoint, mesh=sharding.make_mesh(2))
    found = copied(model)
    assert found.mesh == model.mesh and found.config == model.config
    assert [x.sharding for x in jax.tree.leaves(found.params)] == [
        x.sharding for x in jax.tree.leaves(model.params)
    ]
    found.params = {**found.params, "t": found.params["t"] + 1}
    assert float(model.params["t"][0]) + 1 == float(found.params["t"][0])
    np.testing.assert_array_equal(found.encode_image(pixels), model.encode_image(pixels))


def test_a_deep_copy_shares_no_container(model):
    found = copy.deepcopy(model)
    found.params["img"]["embedding"]["bias"] = jnp.zeros(())
    assert model.params["img"]["embedding"]["bias"].shape == (WIDTH,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype("float16"), np.float32, "bfloat16"])
def test_dtypes_of_numpy_and_jax_are_names(dtype, checkpoint):
    want = np.dtype(dtype)
    loaded, made = medsiglip_jax.load(checkpoint, dtype), medsiglip_jax.init("tiny-56", 0, dtype)
    for model in (loaded, made):
        assert {leaf.dtype for _, leaf in tree.items(model.params)} == {want}
        assert model.compute.dtype == want.name


@pytest.mark.parametrize("dtype", [float, jnp.int8, "fp16", jnp.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match="dtype is .*; expected one of float32, bfloat16, float16"):
        medsiglip_jax.init("tiny-56", dtype=dtype)


def test_texts_may_be_strings(model):
    want = np.asarray(model.encode_text(model.processor.texts(TEXTS)))
    kinds = TEXTS, tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, object)
    for texts in kinds:
        np.testing.assert_array_equal(model.encode_text(texts), want)
    np.testing.assert_array_equal(model.encode_text(TEXTS[0]), model.encode_text(TEXTS[:1]))
    assert model.encode_text(TEXTS[0]).shape == (1, WIDTH)
    assert model.encode_text([]).shape == (0, WIDTH)
    with pytest.raises(ValueError, match=r"tokens has shape|not a string|expected"):
        model.encode_text(["a", 3])


@pytest.mark.parametrize("low, high, warned", [(0, 1, 1), (0.2, 0.9, 1), (-1, 1, 0), (-0.1, 1, 0)])
def test_floats_in_0_to_1_are_told(model, low, high, warned):
    images = np.linspace(low, high, 2 * SIDE * SIDE * 3, dtype=np.float32).reshape(2, SIDE, SIDE, 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.encode_image(images)
    assert len(told) == warned and all("2 * x - 1" in str(w.message) for w in told)


def test_the_package_is_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("medsiglip_jax", run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: medsiglip-jax ")
