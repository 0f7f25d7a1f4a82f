"""Attention back ends: equal to the plain form in value and gradient, clear where they refuse."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import assert_close

from medsiglip_jax.model import attention, sharding
from medsiglip_jax.model.api import compute_for
from medsiglip_jax.model.attention import ATTENTION
from medsiglip_jax.model.config import named
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


@pytest.mark.parametrize("name", ["blocked", "xla"])
def test_wide_products_are_asked_for_in_float32(name):
    """Both of them, in each back end of a CPU; and of "xla" only the first where they are not."""
    inputs, _ = qkv((1, 32, 2, 16), "bfloat16")
    for wide in (True, False):
        attend = partial(attention.attend, name, wide=wide)
        text = str(jax.make_jaxpr(attend)(*inputs))
        assert len(re.findall(r"preferred_element_type=float32", text)) == 1 + (
            wide or name == "blocked"
        )
        assert (
            jax.eval_shape(partial(attention.attend, name, wide=wide), *inputs).dtype == "bfloat16"
        )


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


def test_kernels_leave_to_xla_what_they_cannot_do():
    assert attention.used("splash", "bfloat16", 1024, 72) == "splash"
    assert attention.used("splash", "float32", 1024, 72) == "xla"  # float32 means float32
    assert attention.used("splash", "bfloat16", 729, 72) == "xla"
    assert attention.used("cudnn", "float16", 729, 72) == "cudnn"
    assert attention.used("cudnn", "float32", 1024, 72) == "xla"
    assert attention.used("cudnn", "bfloat16", 1024, 12) == "xla"
    assert attention.used("cudnn", "bfloat16", 1024, 136) == "xla"
    assert attention.used("blocked", "float32", 729, 12) == "blocked"


def device(platform, capability=None):
    found = SimpleNamespace(platform=platform, device_kind=f"some {platform}")
    if capability:
        found.compute_capability = capability
    return found


@pytest.mark.parametrize("there, name, names_of_eight", [
    (device("cpu"), "blocked", "xla"), (device("tpu"), "splash", "splash"),
    (device("gpu", "9.0"), "cudnn", "cudnn"), (device("gpu", "10.0"), "cudnn", "cudnn"),
    (device("gpu", "7.5"), "xla", "xla"), (device("gpu", "gfx942"), "xla", "xla"),  # T4; AMD
    (device("gpu"), "xla", "xla"),
])  # fmt: skip
def test_every_device_has_a_back_end(there, name, names_of_eight):
    assert attention.default(there) == name
    assert attention.default(there, count=8) == names_of_eight
    attention.check(name, there, "bfloat16")


@pytest.mark.parametrize("name, there, dtype, say", [
    ("splash", device("gpu", "9.0"), "bfloat16", "'splash' .* needs a TPU, this is some gpu"),
    ("cudnn", device("gpu", "7.5"), "float32", "8.0, this is some gpu of 7.5; .* dtype is float32"),
    ("cudnn", device("cpu"), "bfloat16", "needs an NVIDIA GPU .* this is some cpu.* give 'xla'"),
])  # fmt: skip
def test_a_back_end_that_was_asked_for_and_cannot_be_used_is_refused(name, there, dtype, say):
    with pytest.raises(ValueError, match=say):
        attention.check(name, there, dtype)
    with pytest.raises(ValueError, match=say):
        compute_for(dtype, attention=name, device=there)


@pytest.mark.parametrize("name, there, say", [
    ("cudnn", device("gpu", "9.0"), "heads of 8, 16, .* or 128, these are 16 tokens, heads of 12"),
    ("splash", device("tpu"), "a multiple of 128 tokens, these are 16 tokens"),
])  # fmt: skip
def test_a_back_end_that_does_not_suit_the_model_is_refused(name, there, say):
    """By default it is left to "xla"; who asks for it by name is told."""
    tiny = named("tiny-56")
    with pytest.raises(ValueError, match=say):
        compute_for("bfloat16", attention=name, device=there, config=tiny)
    assert compute_for("bfloat16", device=there, config=tiny).attention == name
    compute_for("bfloat16", attention=name, device=there, config=named("so400m-448"))


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


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [256, 81])
def test_cudnn_equals_plain_attention_on_a_gpu(tokens):
    inputs, ct = qkv((2, tokens, 4, 72), "bfloat16")
    x, gradients = jax.jit(lambda *args: gradient(ATTENTION["cudnn"], *args))(inputs, ct)
    np.testing.assert_allclose(np.asarray(x, np.float32), plain(*inputs), atol=0.02)
    _, wanted = gradient(ATTENTION["xla"], inputs, ct)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (got, want)), atol=0.05)
