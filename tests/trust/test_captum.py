"""Integrated gradients and attention against captum and transformers on PyTorch: golden and live.

The golden vectors were made by scripts/make_goldens_explain.py.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import references

import medsiglip_jax
from medsiglip_jax.model import towers
from medsiglip_jax.trust.maps import gradients
from medsiglip_jax.trust.maps.targets import Form, Target
from medsiglip_jax.trust.maps.tower import Tower

pytestmark = pytest.mark.float

GOLDEN = Path(__file__).parents[1] / "golden" / "siglip-tiny"
STEPS = (4, 16)
PAIRS = ((0, None), (1, None), (0, 1))  # a text, and the text that it is contrasted with


def reference_maps(model, pixels, tokens):
    """captum's maps, summed over channels, [pairs, steps, images, h, w]."""
    import torch
    from captum.attr import IntegratedGradients

    values = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2)
    ids = torch.from_numpy(tokens).long()

    def maps(text, contrast, steps):
        def logit(x):
            logits = model(input_ids=ids, pixel_values=x).logits_per_image
            return logits[:, text] - (0 if contrast is None else logits[:, contrast])

        made = IntegratedGradients(logit).attribute(
            values, baselines=torch.zeros_like(values), n_steps=steps, method="gausslegendre"
        )
        return made.sum(1).detach().numpy()

    return np.array([[maps(*pair, steps) for steps in STEPS] for pair in PAIRS], np.float32)


def reference_attention(model, pixels):
    """The means over heads of transformers' weights in the blocks, [blocks, images, n, n]."""
    import torch

    values = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2)
    model.vision_model.config._attn_implementation = "eager"
    with torch.inference_mode():
        out = model.vision_model(pixel_values=values, output_attentions=True)
    return np.stack([block.mean(1).numpy() for block in out.attentions])


def targets_of(model, tokens):
    ztxt = model.encode_text(tokens)
    t, b = (model.params[key].reshape(()) for key in "tb")
    for text, contrast in PAIRS:
        direction = ztxt[text] if contrast is None else ztxt[text] - ztxt[contrast]
        numbers = {"coefficients": jnp.exp(t) * direction[None], "index": jnp.array(0)}
        numbers["intercepts"] = (b if contrast is None else jnp.zeros(()))[None]
        yield Target(str(text), None, Form(normalize=True), numbers, model)


def assert_like_captum(model, pixels, tokens, maps):
    tower = Tower.of(model, 4)
    for target, by_steps in zip(targets_of(model, tokens), maps, strict=True):
        for steps, expected in zip(STEPS, by_steps, strict=True):
            for square, want in zip(pixels, expected, strict=True):
                made = gradients.integrate_evenly(tower, target, tower.pixels(square), 1.0, steps)
                assert np.corrcoef(made.values.ravel(), want.ravel())[0, 1] > 0.99999
                terms = 3 * references.model_terms(model.config)
                references.assert_close(made.values, want, terms, np.abs(want).max())


def assert_attention(model, pixels, expected):
    weights, pooling = towers.attention_weights(model.params, jnp.asarray(pixels), model.config)
    references.assert_close(weights, expected, references.model_terms(model.config), 1.0)
    np.testing.assert_allclose(np.asarray(pooling).sum(-1), 1, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:integrated gradients for:UserWarning")
def test_golden():
    want = np.load(GOLDEN / "explain.npz")
    model = medsiglip_jax.load(GOLDEN)
    assert_like_captum(model, want["pixels"], want["tokens"], want["maps"])
    assert_attention(model, want["pixels"], want["attention"])


@pytest.mark.filterwarnings("ignore:integrated gradients for:UserWarning")
def test_live(tmp_path):
    pytest.importorskip("captum", reason="captum is not installed; the golden vectors stand for it")
    pytest.importorskip("transformers")
    reference = references.siglip(references.TINY, seed=11)
    references.save(reference, tmp_path)
    pixels, tokens = references.inputs(references.TINY, images=2, texts=2, seed=11)
    model = medsiglip_jax.load(tmp_path)
    assert_like_captum(model, pixels, tokens, reference_maps(reference, pixels, tokens))
    assert_attention(model, pixels, reference_attention(reference, pixels))


def test_completeness_within_64_steps():
    """Of every pair of an image and a text, contrasted or not."""
    want = np.load(GOLDEN / "explain.npz")
    model = medsiglip_jax.load(GOLDEN)
    tower = Tower.of(model, 16)
    for square in want["pixels"]:
        image = tower.pixels(square)
        line = gradients.profile(tower, image)
        for target in targets_of(model, want["tokens"]):
            made = gradients.integrate(tower, target, image, line)
            score, grey = target.logits(tower.embed([image, np.array(tower.grey)]))
            error = abs(made.values.sum() - (score - grey)) / max(abs(score - grey), 0.1)
            assert error <= 0.0101 and made.steps <= 64  # logits of another batch: rounding
            assert made.completeness <= 0.01
