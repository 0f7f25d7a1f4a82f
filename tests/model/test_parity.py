"""The numbers of the reference implementation: golden always, live where torch is installed."""

import jax
import numpy as np
import pytest
import references
from checkpoint_files import GOLDEN

import medsiglip_jax

pytestmark = pytest.mark.float


def assert_parity(model, pixels, tokens, expected):
    """The issue's bounds: embeddings 1e-5 absolute, logits 1e-4 relative."""
    zimg, ztxt = model.encode_image(pixels), model.encode_text(tokens)
    np.testing.assert_allclose(zimg, expected["image_embeds"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ztxt, expected["text_embeds"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(model.similarity(zimg, ztxt), expected["logits"], rtol=1e-4, atol=0)


def test_golden_vectors():
    expected = np.load(GOLDEN / "expected.npz")
    model = medsiglip_jax.load(GOLDEN)
    assert_parity(model, expected["pixels"], expected["tokens"], expected)
    patches = model.encode_tokens(expected["pixels"])
    np.testing.assert_allclose(patches, expected["patches"], rtol=0, atol=1e-5)


def test_the_goldens_can_tell_a_wrong_model():
    """erf GELU, eps 1e-5 or a swapped projection would each move the embeddings by far more."""
    expected = np.load(GOLDEN / "expected.npz")
    model = medsiglip_jax.load(GOLDEN)
    block = model.params["img"]["Transformer"]["encoderblock"]["MultiHeadDotProductAttention_0"]
    block["query"], block["key"] = block["key"], block["query"]
    wrong = np.abs(model.encode_image(expected["pixels"]) - expected["image_embeds"]).max()
    assert wrong > 1e-3


@pytest.mark.parametrize("seed, images, texts", [(0, 1, 1), (1, 5, 9)])
def test_live_tiny(tmp_path, seed, images, texts):
    pytest.importorskip("transformers", reason="live parity needs torch and transformers")
    reference = references.siglip(references.TINY, seed)
    pixels, tokens = references.inputs(references.TINY, images, texts, seed)
    model = medsiglip_jax.load(references.save(reference, tmp_path))
    assert_parity(model, pixels, tokens, references.run(reference, pixels, tokens))


def test_normalize_false_is_the_pooler_output(tmp_path):
    torch = pytest.importorskip("torch", reason="live parity needs torch and transformers")
    pytest.importorskip("transformers")
    reference = references.siglip(references.TINY)
    pixels, tokens = references.inputs(references.TINY, 2, 2)
    model = medsiglip_jax.load(references.save(reference, tmp_path))
    values = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2)
    with torch.inference_mode():
        want = reference.vision_model(pixel_values=values).pooler_output.numpy()
    np.testing.assert_allclose(model.encode_image(pixels, normalize=False), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.alone
def test_live_full_size(tmp_path):
    """So400m/448 with random weights, two batch sizes; 7 GB of memory, minutes."""
    pytest.importorskip("transformers", reason="live parity needs torch and transformers")
    reference = references.siglip(references.SO400M)
    batches = [references.inputs(references.SO400M, *size, seed=3) for size in ((1, 3), (3, 8))]
    expected = [references.run(reference, *batch) for batch in batches]
    references.save(reference, tmp_path)
    del reference
    model = medsiglip_jax.load(tmp_path)
    assert sum(x.size for x in jax.tree.leaves(model.params)) == 878_300_338
    for batch, want in zip(batches, expected, strict=True):
        assert_parity(model, *batch, want)
