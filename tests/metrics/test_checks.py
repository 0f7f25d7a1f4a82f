"""Rows without a label are left out and counted; arguments that fit nothing are refused."""

import math

import numpy as np
import pytest

from medsiglip_jax.metrics import known


@pytest.mark.parametrize(
    "labels", [[1, np.nan, 0, -1], [1, None, 0, -1], np.array([1, -1, 0, -1], np.int32)]
)
def test_missing_labels_are_left_out_and_counted(labels):
    rows = known([0.4, 0.3, 0.2, 0.1], labels)
    assert rows.scores.tolist() == [0.4, 0.2] and rows.positive.tolist() == [True, False]
    assert rows.rows.tolist() == [True, False, True, False] and rows.missing == 2


def test_known_refuses():
    with pytest.raises(ValueError, match="labels contains .*2"):
        known([1, 2], [2, 0])
    with pytest.raises(ValueError, match="the first at row 1"):
        known([1, math.nan], [1, -1])
    with pytest.raises(ValueError, match=r"expected labels of shape \(2,\)"):
        known([1, 2], [1])
