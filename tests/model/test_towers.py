"""Properties of the towers: scan == loop, remat == no remat, bfloat16 close, sharding exact."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import assert_close, tower_terms

from medsiglip_jax.model import bits, config, towers, tree
from medsiglip_jax.model.config import PixelConfig
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.model.weights import random

TINY = config.named("tiny-56")
TERMS = tower_terms(TINY.vision)
encode_image = jax.jit(towers.encode_image, static_argnums=(2, 3))
encode_text = jax.jit(towers.encode_text, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def params():
    made = random.init_params(TINY, seed=0)
    # Biases away from zero, norms away from one: otherwise half of the model goes untested.
    return jax.tree.map(
        lambda x: jnp.asarray(
            x + 0.02 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
        ),
        made,
    )


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8))


@pytest.mark.float
def test_scan_equals_a_loop_over_blocks(params):
    vision = TINY.vision
    x = jax.random.normal(jax.random.key(1), (2, vision.num_tokens, vision.width))
    tower = params["img"]["Transformer"]
    scanned = jax.jit(towers.Encoder(vision, Compute()).apply)({"params": tower}, x)
    block = jax.jit(towers.EncoderBlock(vision, Compute()).apply)
    for i in range(vision.depth):
        layer = jax.tree.map(lambda p, i=i: p[i], tower["encoderblock"])
        x, _ = block({"params": layer}, x)
    norm = tower["encoder_norm"]
    centred = x - x.mean(-1, keepdims=True)
    x = centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
    assert_close(scanned, x, TERMS)


@pytest.mark.float
def test_one_by_one_equals_all_rows_at_once(params):
    """Also where blocks are kept apart, and with an adapter; each row by itself."""
    vision, tower = TINY.vision, params["img"]["Transformer"]
    x = jax.random.normal(jax.random.key(1), (3, vision.num_tokens, vision.width))
    blocks, shape = tower["encoderblock"], (vision.depth, vision.width, 2)
    a, b = (jax.random.normal(jax.random.key(i), shape) for i in (2, 3))
    lora = {"a": a, "b": b.swapaxes(1, 2), "scale": jnp.full(vision.depth, 0.1)}
    name = "MultiHeadDotProductAttention_0"
    blocks = {**blocks, name: {**blocks[name], "out_lora": lora}}
    parts = (slice(None, 1), slice(1, None))
    frozen, rest = (jax.tree.map(lambda p, part=part: p[part], blocks) for part in parts)
    tower = {**tower, "frozen_blocks": frozen, "encoderblock": rest}
    got, want = (
        jax.jit(towers.Encoder(vision, Compute(attention="blocked", one_by_one=alone)).apply)(
            {"params": tower}, x
        )
        for alone in (True, False)
    )
    assert_close(got, want, TERMS, float(jnp.abs(want).max()))
    assert float(jnp.abs(want[0] - want[1]).max()) > 0.1


@pytest.mark.float
@pytest.mark.parametrize("one_by_one", [False, True])
def test_bits_of_bfloat16_change_nothing_and_take_no_memory(params, images, one_by_one):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    shared = bits.of_blocks(half)
    compute = Compute("bfloat16", attention="blocked", one_by_one=one_by_one)
    want, got = (encode_image(x, images, TINY, compute)[0] for x in (half, shared))
    np.testing.assert_array_equal(got, want)
    assert _temporary(half["txt"], compute, 20) - _temporary(half["txt"], compute, 2) < 1000


def _temporary(text, compute, depth):
    """Bytes that a text takes beside the weights, when there are so many blocks."""
    encoder = text["Encoder_0"]
    deep = jax.tree.map(lambda x: jnp.resize(x, (depth, *x.shape[1:])), encoder["encoderblock"])
    params = {"txt": {**text, "Encoder_0": {**encoder, "encoderblock": deep}}}
    deeper = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, depth=depth))
    tokens = jnp.ones((1, TINY.text.context_length), jnp.int32)
    program = encode_text.lower(bits.of_blocks(params), tokens, deeper, compute).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_only_bfloat16_of_blocks_becomes_bits(params):
    shared = bits.of_blocks(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    types = {path: x.dtype for path, x in tree.items(shared)}
    assert {path for path, dtype in types.items() if dtype == jnp.uint16} == {
        path for path in types if "/encoderblock/" in path
    }
    assert bits.of_blocks(params) == params
    arrays = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)  # a model may hold these
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(bits.of_blocks(arrays)))


def test_remat_changes_neither_value_nor_gradient(params):
    vision, tower = TINY.vision, {"params": params["img"]["Transformer"]}
    x = jax.random.normal(jax.random.key(1), (2, vision.num_tokens, vision.width))

    @partial(jax.jit, static_argnums=1)
    def value_and_gradient(tower, remat):
        encoder = towers.Encoder(vision, Compute(remat=remat))
        return jax.value_and_grad(lambda tower: jnp.mean(encoder.apply(tower, x) ** 3))(tower)

    value, gradient = value_and_gradient(tower, "none")
    # Forth and back, and through a sum over all tokens; a tensor's gradient by its largest entry,
    # but those of the key biases, zero in exact arithmetic, by the largest of any.
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    for remat in ("dots", "block"):
        again, gradient_again = value_and_gradient(tower, remat)
        assert_close(again, value, 2 * TERMS)
        for got, want in zip(*map(jax.tree.leaves, (gradient_again, gradient)), strict=True):
            assert_close(got, want, 2 * TERMS, largest)


@pytest.mark.parametrize("wide", [False, True])
def test_bfloat16_is_close_and_stays_bfloat16_inside(params, images, wide):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    compute = Compute(dtype="bfloat16", precision="default", wide=wide)
    z, _ = encode_image(params, images, TINY)
    z16, _ = encode_image(half, images, TINY, compute)
    assert z16.dtype == jnp.float32
    cosine = jnp.sum(towers.normalize(z) * towers.normalize(z16), -1)
    assert float(cosine.min()) > 0.999
    tower = towers.ImageTower(TINY.vision, compute)
    apply = lambda p, x: tower.apply({"params": p}, towers.normalize_pixels(x))[1]  # noqa: E731
    tokens = jax.eval_shape(apply, half["img"], images)
    assert tokens.dtype == jnp.bfloat16


def test_float32_matmuls_are_true_float32(params, images):
    """On GPU and TPU the default is TF32 or bf16 passes; the precision is in the program itself."""
    text = jax.jit(lambda p, x: encode_image(p, x, TINY)).lower(params, images).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots and all("HIGHEST" in line for line in dots)


def test_padding_tokens_are_attended(params):
    """SigLIP has no mask: what stands in the padding changes the embedding."""
    tokens = jnp.full((1, 64), 1, jnp.int32).at[0, :3].set(jnp.array([5, 6, 7]))
    changed = tokens.at[0, 40].set(9)
    a, b = (encode_text(params, t, TINY) for t in (tokens, changed))
    assert float(jnp.abs(a - b).max()) > 1e-4


@pytest.mark.float
def test_normalize_adds_epsilon_to_the_norm():
    np.testing.assert_array_equal(towers.normalize(jnp.zeros((1, 4))), jnp.zeros((1, 4)))
    z = jnp.full((1, 4), 1e-8)
    assert_close(towers.normalize(z), z / 3e-8, terms=6)


@pytest.mark.float
def test_unit_range_matches_value_range():
    x = np.arange(256, dtype=np.uint8).repeat(3).reshape(-1, 3)
    want = x.astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
    # A quotient, its double, and 1 less: numbers up to 2, also where a little is left.
    assert_close(jax.jit(towers.normalize_pixels)(x), want, terms=3, largest=2)
    ends = towers.normalize_pixels(jnp.array([[0, 0, 255]], jnp.uint8))
    assert ends.tolist() == [[-1, -1, 1]]


@pytest.mark.float
def test_image_border_beyond_the_last_patch_is_dropped(params):
    embedding = towers.PatchEmbedding(
        TINY.vision.patch_size, TINY.vision.width, PixelConfig(), Compute()
    )
    image = jax.random.uniform(jax.random.key(0), (1, 60, 60, 3))
    tokens, cropped = (
        embedding.apply({"params": params["img"]["embedding"]}, pixels)
        for pixels in (image, image[:, :56, :56])
    )
    assert_close(tokens, cropped, terms=14 * 14 * 3)
