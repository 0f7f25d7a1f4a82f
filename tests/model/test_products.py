"""How products are asked for: in which element type, and how their gradients are taken."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsiglip_jax.model import devices, towers
from medsiglip_jax.model.api import compute_for
from medsiglip_jax.model.config import VisionConfig
from medsiglip_jax.train import build
from medsiglip_jax.train.recipe import Data, Recipe


@pytest.fixture
def cpu_with(monkeypatch):
    def replace(*flags):
        monkeypatch.setattr(devices.cpu, "features", lambda: frozenset(flags))
        return SimpleNamespace(platform="cpu")

    return replace


@pytest.mark.parametrize("flags, dtype, wide", [
    (("avx2", "amx_bf16"), "bfloat16", True),
    (("avx512f", "avx512_bf16"), "bfloat16", True),
    (("avx2", "avx512f"), "bfloat16", False),
    ((), "bfloat16", False),
    (("amx_bf16",), "float32", False),
    (("amx_bf16",), "float16", False),
])  # fmt: skip
def test_products_are_wide_where_the_cpu_multiplies_in_bfloat16(cpu_with, flags, dtype, wide):
    assert devices.wide_products(cpu_with(*flags), dtype) == wide


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_multiply_as_they_do(cpu_with, platform):
    cpu_with("amx_bf16")
    assert not devices.wide_products(SimpleNamespace(platform=platform), "bfloat16")


def test_a_machine_without_cpuinfo_has_no_flags(monkeypatch):
    def missing(path, **_):
        raise FileNotFoundError(path)

    monkeypatch.setattr("builtins.open", missing)
    assert devices.cpu.features.__wrapped__() == frozenset()


def test_wide_products_round_once_and_keep_their_type():
    """Each entry is the float64 product of the same operands, rounded to bfloat16."""
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (48, 48)).astype(jnp.bfloat16) for key in keys)
    product = towers._wide_dot(x, y, (((1,), (0,)), ((), ())))
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    assert product.dtype == jnp.bfloat16
    wrong = np.abs(np.asarray(product, np.float64) - exact)
    assert (wrong <= 2.0**-8 * np.abs(exact) + 1e-5).all()


@pytest.mark.float
def test_wide_towers_round_the_hidden_layer_once():
    """The GELU of the float32 product, rounded: not one of a rounded product, step by step."""
    block = towers.MlpBlock(64, towers.Compute("bfloat16", "default", wide=True))
    x = jax.random.normal(jax.random.key(0), (1, 8, 32)).astype(jnp.bfloat16)
    params = jax.tree.map(
        lambda s: jax.random.normal(jax.random.key(1), s.shape).astype(jnp.bfloat16),
        jax.eval_shape(lambda: block.init(jax.random.key(2), x)),
    )
    dense = params["params"]
    exact = x.astype(jnp.float32) @ dense["Dense_0"]["kernel"].astype(jnp.float32)
    hidden = jax.nn.gelu(exact + dense["Dense_0"]["bias"].astype(jnp.float32), approximate=True)
    hidden = hidden.astype(jnp.bfloat16).astype(jnp.float32)
    want = hidden @ dense["Dense_1"]["kernel"].astype(jnp.float32)
    got = jax.jit(block.apply)(params, x)
    assert got.dtype == jnp.bfloat16
    wrong = np.abs(np.asarray(got, np.float32) - np.asarray(want + dense["Dense_1"]["bias"]))
    assert wrong.max() <= 2.0**-7 * np.abs(want).max()


@pytest.mark.parametrize("platform, flat", [("cpu", True), ("gpu", False), ("tpu", False)])
def test_gradients_are_flat_on_cpus_only(platform, flat):
    device = SimpleNamespace(platform=platform, device_kind=platform)
    recipe = Recipe(data=(Data(path="rows.csv"),), total_steps=1, model="tiny-56")
    assert build.compute_of(recipe, None, None, device).flat == flat
    assert bool(devices.step_options(device)) == flat
    assert not compute_for("float32", device=device).flat, "users may ask for jax.jacfwd"


# A dense layer, the projections into and out of heads, and one vector for each image.
SHAPES = [((3, 5, 8), (8, 6), 1), ((3, 5, 8), (8, 2, 4), 1), ((3, 5, 2, 4), (2, 4, 8), 2),
          ((3, 8), (8, 6), 1)]  # fmt: skip


@pytest.mark.parametrize("shape, kernel, axes", SHAPES)
@pytest.mark.parametrize("wide, rounded", [(False, True), (True, True), (True, False)])
def test_flat_gradients_are_those_of_the_product(shape, kernel, axes, wide, rounded):
    """The product itself to the bit; integers, whose sums are exact in any order, its gradients."""
    keys, dtype = jax.random.split(jax.random.key(1), 3), jnp.bfloat16 if wide else jnp.float32
    dimensions = ((tuple(range(len(shape) - axes, len(shape))), tuple(range(axes))), ((), ()))
    x, w, g = (
        jax.random.randint(key, of, -3, 4).astype(dtype)
        for key, of in zip(keys, (shape, kernel, shape[:-axes] + kernel[axes:]), strict=True)
    )
    results = []
    for flat in (False, True):
        compute = towers.Compute(dtype=str(jnp.dtype(dtype)), wide=wide, flat=flat)
        dot = towers._dot(compute, rounded)
        y, backward = jax.vjp(lambda x, w, dot=dot: dot(x, w, dimensions), x, w)
        results.append((y, *backward(g.astype(y.dtype))))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_flat_gradients_store_no_more(small_block):
    """Flattened before it is stored, the input of the three projections would be stored thrice."""
    stored = [sum(leaf.nbytes for leaf in jax.tree.leaves(small_block(flat)[1])) for flat in (0, 1)]
    assert stored[1] <= stored[0]


@pytest.fixture
def small_block():
    """flat -> a block's output and its backward function, which holds what is stored."""
    vision = VisionConfig(image_size=8, patch_size=4, width=8, depth=1, mlp_dim=16, num_heads=2)
    x = jax.random.normal(jax.random.key(2), (3, 4, 8))
    params = towers.EncoderBlock(vision, towers.Compute()).init(jax.random.key(3), x)

    def make(flat):
        block = towers.EncoderBlock(vision, towers.Compute(flat=bool(flat)))
        return jax.vjp(lambda params: block.apply(params, x)[0], params)

    return make
