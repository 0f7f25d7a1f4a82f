"""Tensors as views of a file: the numbers that the library reads."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medsiglip_jax.model.weights.safetensors import Tensors


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
