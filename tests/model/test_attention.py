"""Attention back ends: equal to the plain form in value and gradient, clear where they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import assert_close

from medsiglip_jax.model import attention, sharding
from medsiglip_jax.model.attention import ATTENTION
from medsiglip_jax.model.towers import Compute

pytestmark = pytest.mark.float

# (batch, tokens, heads, size). A block holds 2**21 // tokens**2 heads: these are one block of all
# heads, blocks with and without a remainder, and a head that alone is more than a block.
SHAPES = [(2, 16, 4, 12), (1, 729, 5, 8), (1, 1500, 2, 4)]


def qkv(shape, dtype="float32", scale=1.0):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, ct = (jax.random.normal(key, shape, dtype) for key in keys)
    return (q * scale * shape[-1] ** -0.5, k, v), ct


def terms(shape, gradient=False):
    """Logits, the sum of the softmax and the weighted sum; backwards about as many again, twice."""
    _, tokens, _, size = shape
    return (3 if gradient else 1) * (2 * tokens + size)


def plain(q, k, v):
    """Softmax attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("name", ["blocked", "xla"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_plain_attention(name, shape):
    inputs, _ = qkv(shape)
    assert_close(jax.jit(ATTENTION[name])(*inputs), plain(*inputs), terms(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocked_has_the_gradient_of_plain_attention(shape):
    inputs, ct = qkv(shape)

    def gradients(name):
        return jax.jit(lambda inputs: jax.vjp(ATTENTION[name], *inputs)[1](ct))(inputs)

    for blocked, xla in zip(gradients("blocked"), gradients("xla"), strict=True):
        assert_close(blocked, xla, terms(shape, gradient=True))


def test_the_tolerance_can_tell_a_wrong_gradient():
    """bfloat16 logits, or a softmax's gradient without the part of its sum."""
    shape = SHAPES[-1]
    inputs, ct = qkv(shape)

    def rounded(q, k, v):
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.bfloat16).astype(jnp.float32)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)

    def sum_fixed(q, k, v):
        weights = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        weights /= jax.lax.stop_gradient(weights.sum(-1, keepdims=True))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    right = gradient(ATTENTION["xla"], inputs, ct)[1]
    for wrong in (rounded, sum_fixed):
        with pytest.raises(AssertionError):
            assert_close(gradient(wrong, inputs, ct)[1][0], right[0], terms(shape, gradient=True))


def test_blocked_survives_logits_that_overflow_exp():
    inputs, _ = qkv(shape := (1, 40, 2, 16), scale=300.0)
    # What a logit is off by, a weight is, relatively.
    q, k, v = (float(jnp.abs(x).max()) for x in inputs)
    largest = float(jnp.abs(jnp.einsum("bqhd,bkhd->bhqk", *inputs[:2])).max()) * v
    assert q * k > 100  # exp overflows at 89
    assert_close(jax.jit(ATTENTION["blocked"])(*inputs), plain(*inputs), terms(shape), largest)


def test_blocked_keeps_bfloat16_and_its_accuracy():
    inputs, _ = qkv((2, 100, 3, 24), "bfloat16")
    x = jax.jit(ATTENTION["blocked"])(*inputs)
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(x, np.float32), plain(*inputs), atol=0.01)


def test_blocked_never_holds_the_logits_of_every_head():
    inputs, ct = qkv((2, 1024, 16, 4))
    every_head = 2 * 16 * 1024**2 * 4

    def gradients(*inputs):
        return jax.vjp(ATTENTION["blocked"], *inputs)[1](ct)

    memory = jax.jit(gradients).lower(*inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < every_head / 2


# One block; several of queries and of keys.
@pytest.mark.parametrize("tokens", [128, pytest.param(2048, marks=pytest.mark.slow)])
def test_splash_equals_plain_attention_in_value_and_gradient(tokens):
    """In Pallas's interpreter, in float32: the arithmetic, if not a TPU's rounding."""
    inputs, ct = qkv(shape := (256 // tokens or 1, tokens, 2, 72))
    splash = partial(ATTENTION["splash"], interpret=True)
    x, gradients = jax.jit(lambda inputs: gradient(splash, inputs, ct))(inputs)
    assert_close(x, plain(*inputs), terms(shape))
    wanted = jax.jit(lambda inputs: gradient(ATTENTION["xla"], inputs, ct)[1])(inputs)
    for got, want in zip(gradients, wanted, strict=True):
        assert_close(got, want, terms(shape, gradient=True))


def gradient(attend, inputs, ct):
    x, back = jax.vjp(attend, *inputs)
    return x, back(ct)


def test_splash_leaves_to_xla_what_it_cannot_do():
    assert attention.used("splash", 1024, "bfloat16") == "splash"
    assert attention.used("splash", 1024, "float32") == "xla"  # float32 means float32
    assert attention.used("splash", 729, "bfloat16") == "xla"
    assert attention.used("blocked", 729, "float32") == "blocked"


def test_every_platform_has_a_back_end():
    for platform, name in {"cpu": "blocked", "tpu": "splash", "gpu": "xla"}.items():
        assert attention.default(platform) == name
    assert attention.default("cpu", devices=8) == "xla"
    assert attention.default("tpu", devices=8) == "splash"


@pytest.mark.parametrize("name", ["blocked", "splash"])
def test_on_a_mesh_every_device_works_on_its_own_rows(name, monkeypatch):
    monkeypatch.setitem(ATTENTION, "splash", partial(ATTENTION["splash"], interpret=True))
    monkeypatch.setattr(attention, "used", lambda name, *_: name)
    mesh = sharding.make_mesh(4)
    rows = sharding.batch_sharding(mesh)
    inputs, ct = qkv(shape := (8, 128, 2, 8))
    split = jax.device_put(inputs, rows)
    attend = partial(attention.attend, name, rows=rows)
    step = jax.jit(lambda inputs, ct: gradient(attend, inputs, ct))
    x, gradients = step(split, jax.device_put(ct, rows))
    assert "all-gather" not in step.lower(split, jax.device_put(ct, rows)).compile().as_text()
    assert x.sharding.is_equivalent_to(rows, x.ndim)
    wanted, back = gradient(ATTENTION["xla"], inputs, ct)
    for got, want in zip((x, *gradients), (wanted, *back), strict=True):
        assert_close(got, want, terms(shape, gradient=True))


def test_an_unknown_back_end_is_an_error_that_lists_them():
    with pytest.raises(
        ValueError, match="'flash9' is unknown; expected one of xla, blocked, splash"
    ):
        Compute(attention="flash9")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="on a GPU cudnn may serve")
def test_cudnn_says_everything_that_it_lacks():
    inputs, _ = qkv((1, 4, 2, 12))
    with pytest.raises(ValueError, match="NVIDIA GPU.*float32.*head size 12.*attention='xla'"):
        ATTENTION["cudnn"](*inputs)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_cudnn_equals_plain_attention_on_a_gpu():
    inputs, _ = qkv((2, 256, 4, 72), "bfloat16")
    x = jax.jit(ATTENTION["cudnn"])(*inputs)
    np.testing.assert_allclose(np.asarray(x, np.float32), plain(*inputs), atol=0.02)
