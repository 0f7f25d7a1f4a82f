"""Position embeddings for another resolution."""

import numpy as np
import pytest
from references import assert_close

from medsiglip_jax.model import api
from medsiglip_jax.model.weights import positions


@pytest.mark.float
@pytest.mark.parametrize("old, new", [(32, 16), (3, 8), (16, 27), (5, 1), (1, 4), (7, 7)])
def test_position_resampling_is_big_visions(old, new):
    zoom = pytest.importorskip("scipy.ndimage").zoom
    grid = np.random.default_rng(0).normal(size=(1, old * old, 6)).astype(np.float32)
    # mode: by default scipy writes zeros where rounding puts a corner 1e-16 outside the grid.
    want = zoom(grid.reshape(old, old, 6), (new / old, new / old, 1), order=1, mode="nearest")
    got = positions.resample(grid, new).reshape(new, new, 6)
    assert_close(got, want, terms=4)  # of the four points around


def test_another_resolution_runs(golden):
    params, new = positions.resize_positions(golden.params, golden.config, 70)
    model = api.Model(params, new)
    assert model.encode_tokens(np.zeros((1, 70, 70, 3), np.uint8)).shape == (1, 25, 32)
    same, _ = positions.resize_positions(golden.params, golden.config, 42)
    assert same["img"]["pos_embedding"] is golden.params["img"]["pos_embedding"]
