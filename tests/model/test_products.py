"""What a CPU says of itself decides how products of bfloat16 are asked for."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsiglip_jax.model import devices, towers


@pytest.fixture
def cpu_with(monkeypatch):
    def replace(*flags):
        monkeypatch.setattr(devices, "_cpu_flags", lambda: frozenset(flags))
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
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(devices.Path, "read_text", missing)
    assert devices._cpu_flags.__wrapped__() == frozenset()


def test_wide_products_round_once_and_keep_their_type():
    """Each entry is the float64 product of the same operands, rounded to bfloat16."""
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (48, 48)).astype(jnp.bfloat16) for key in keys)
    product = towers._wide_dot(x, y, (((1,), (0,)), ((), ())))
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    assert product.dtype == jnp.bfloat16
    wrong = np.abs(np.asarray(product, np.float64) - exact)
    assert (wrong <= 2.0**-8 * np.abs(exact) + 1e-5).all()
