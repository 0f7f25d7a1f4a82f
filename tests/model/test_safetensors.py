"""Tensors as views of a file: the library's numbers, and no page that stays in memory."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medsiglip_jax.model.weights import copies
from medsiglip_jax.model.weights.safetensors import Tensors

_MB = 1 << 20


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16])
def test_views_are_what_the_library_reads(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    save_file(
        {"b.c": values, "a": values.T[:2].copy(), "scalar": np.asarray(values[0, 0])},
        tmp_path / "x",
    )
    opened, want = Tensors(tmp_path / "x"), load_file(tmp_path / "x")
    assert sorted(opened.names()) == sorted(want)
    for name, array in want.items():
        np.testing.assert_array_equal(opened.read(name), array)
        assert opened.read(name).dtype == array.dtype and opened.shape(name) == array.shape


def test_other_element_types_are_refused_by_name(tmp_path):
    save_file({"ids": np.arange(4)}, tmp_path / "x")
    with pytest.raises(ValueError, match="ids is I64; expected F64, F32, F16, BF16"):
        Tensors(tmp_path / "x").read("ids")


def _resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is resident")
def test_what_has_been_copied_leaves_no_pages_of_the_file(tmp_path):
    save_file({"x": np.ones((32, _MB // 4), np.float32)}, tmp_path / "x")
    view = Tensors(tmp_path / "x").read("x")
    before = _resident_file_bytes()
    target = np.empty(view.shape[::-1], np.float32)
    assert copies.copy(target, view.T) == 0
    assert _resident_file_bytes() - before > 24 * _MB
    copies.release(view.T)
    assert _resident_file_bytes() - before < 4 * _MB
    np.testing.assert_array_equal(target, view.T)  # it is read again


def test_arrays_in_memory_have_nothing_to_release():
    values = np.ones(3)
    copies.release(values[1:])
    assert values.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", [(), (7,), (300, 900), (900, 300), (2, 70, 3000)])
def test_copies_count_what_is_not_finite_in_the_target(shape):
    values = np.random.default_rng(0).normal(size=shape)
    flat = values.reshape(-1)
    flat[0] = np.inf
    if len(flat) > 3:
        flat[-1], flat[2] = np.nan, 1e39  # too large for float32
    axes = tuple(reversed(range(values.ndim)))
    target = np.empty(values.transpose(axes).shape, np.float32)
    with np.errstate(over="ignore"):
        wrong = copies.copy(target, values.transpose(axes))
        np.testing.assert_array_equal(target, values.transpose(axes).astype(np.float32))
    assert wrong == (3 if len(flat) > 3 else 1)
