"""Intervals of proportions against SciPy and published ones; adjusted p-values."""

import math

import numpy as np
import pytest
from scipy import stats

from medsiglip_jax.metrics import Interval, holm, proportion, wilson


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


def test_an_interval_without_groups_is_wilsons():
    for hits in ([True, False, True, True], [False] * 7, [True] * 3):
        want = wilson(sum(hits), len(hits))
        assert proportion(np.array(hits)) == want
        alone = proportion(np.array(hits), np.arange(len(hits)))
        # Of groups of one row each the variance has n - 1 below it, which only widens.
        assert alone.value == want.value and alone.low <= want.low and alone.high >= want.high
    assert math.isnan(proportion(np.zeros(0, bool)).value)
    with pytest.raises(ValueError, match=r"groups has shape \(2,\); expected \(3,\)"):
        proportion(np.ones(3, bool), [1, 2])


def test_copies_of_rows_within_groups_say_nothing_new():
    rng = np.random.default_rng(0)
    hits, groups = rng.random(60) < 0.3, np.arange(60)
    one = proportion(hits, groups)
    many = proportion(np.repeat(hits, 9), np.repeat(groups, 9))
    assert (many.low, many.high) == pytest.approx((one.low, one.high), abs=1e-12)
    order = rng.permutation(540)
    shuffled = proportion(np.repeat(hits, 9)[order], np.repeat(groups, 9)[order])
    assert (shuffled.low, shuffled.high) == pytest.approx((one.low, one.high), abs=1e-12)
    blind = wilson(int(9 * hits.sum()), 540)
    assert many.high - many.low > 2.5 * (blind.high - blind.low)
    never = proportion(np.zeros(90, bool), np.repeat(np.arange(10), 9))
    assert never.high == pytest.approx(wilson(0, 10).high)
    alike = proportion(np.tile([True, False, False], 30), np.repeat(np.arange(30), 3))
    assert alike.high == pytest.approx(wilson(10, 30).high)
    assert alike.value == pytest.approx(1 / 3)


def test_intervals_of_groups_hold_the_truth():
    """Of patients who have 1 to 8 images that are hit alike; 95 % should hold it."""
    rng, held, blind = np.random.default_rng(0), 0, 0
    for _ in range(300):
        sizes = rng.integers(1, 9, 60)
        groups = np.repeat(np.arange(60), sizes)
        hits = rng.random(len(groups)) < rng.beta(0.6, 2.4, 60)[groups]  # 0.2 on the whole
        held += 0.2 in proportion(hits, groups)
        blind += 0.2 in proportion(hits)
    assert 0.91 <= held / 300 <= 0.99 and blind / 300 < 0.88
