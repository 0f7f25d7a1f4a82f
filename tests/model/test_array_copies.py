"""Copies into another order of axes and another type: exact, complete, and nothing beside them."""

import itertools
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from medsiglip_jax.model.weights import copies
from medsiglip_jax.model.weights.safetensors import Tensors

_MB = 1 << 20
_FLOATS = ("float32", "float64", "float16", ml_dtypes.bfloat16)


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


@pytest.mark.parametrize("shape", [
    (5,), (600, 150), (1, 130), (130, 1), (40, 9, 33), (3, 1, 700), (6, 3, 5, 7), (0, 3),
])  # fmt: skip
@pytest.mark.parametrize("source", _FLOATS)
@pytest.mark.parametrize("target", _FLOATS[::3])
def test_copies_equal_numpys_in_every_order_of_axes(shape, source, target):
    """Into a layer of a stack, whose neighbours stay as they are; tiles end anywhere."""
    values = np.random.default_rng(0).normal(size=shape).astype(source)
    for axes in itertools.permutations(range(len(shape))):
        view = values.transpose(axes)
        stack = np.zeros((3, *view.shape), target)
        assert copies.copy(stack[1], view) == 0
        want = np.zeros_like(stack)
        want[1] = view
        assert stack.tobytes() == want.tobytes()


def test_copies_of_a_slice_take_only_that():
    values = np.random.default_rng(0).normal(size=(700, 300)).astype(np.float32)
    values[:100] = np.nan
    target = np.empty((200, 600), np.float32)
    assert copies.copy(target, values.T[50:250, 100:]) == 0
    np.testing.assert_array_equal(target, values.T[50:250, 100:])
