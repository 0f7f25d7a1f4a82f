"""Intervals of proportions against SciPy and published ones; adjusted p-values."""

import math

import numpy as np
import pytest
from scipy import stats

from medsiglip_jax.metrics import Interval, holm, wilson


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (81, 263), (7, 5000)])
def test_wilson_is_that_of_scipy(k, n, level):
    want = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    found = wilson(k, n, level)
    assert (found.value, found.low, found.high) == pytest.approx((k / n, *want), abs=1e-12)
    assert found.value in found and type(found.low) is float


def test_wilson_published():
    """81 of 263: Newcombe, Stat. Med. 17 (1998), 857, table I, method 3."""
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def test_wilson_of_nothing():
    assert all(map(math.isnan, (wilson(0, 0).value, wilson(0, 0).low, wilson(0, 0).high)))
    assert 0.5 not in wilson(0, 0)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04 -> 0.06.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    np.testing.assert_allclose(holm([0.01, np.nan, 0.02]), [0.02, np.nan, 0.02])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([1.5])


def test_holm_bounds_false_rejections():
    p = np.random.default_rng(0).random((2000, 13))
    p[:, :3] /= 1000  # three real effects
    rejected = np.array([holm(row) < 0.05 for row in p])
    assert rejected[:, 3:].any(axis=1).mean() < 0.055
    assert rejected[:, 3:].any(axis=1).mean() > 0.02  # and is not idle


def test_an_interval_knows_what_it_holds():
    interval = Interval(0.8, 0.7, 0.9)
    assert 0.7 in interval and 0.9 in interval and 0.69 not in interval
    assert 0.5 not in Interval(0.5, math.nan, math.nan)
