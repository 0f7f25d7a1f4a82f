"""Accuracy against coverage: against a plain loop over orders, and what its interval promises."""

import itertools

import numpy as np
import pytest
from scipy import special

from medsiglip_jax import metrics


def by_orders(confidence, right):
    """The area as the mean over all orders of tied rows, by the definition."""
    areas = []
    for order in itertools.permutations(range(len(right))):
        if (np.diff(confidence[list(order)]) <= 0).all():
            wrong = np.cumsum(~right[list(order)])
            areas.append(np.mean(wrong / np.arange(1, len(right) + 1)))
    return np.mean(areas)


@pytest.mark.parametrize("seed", range(8))
def test_ties_are_in_random_order(seed):
    rng = np.random.default_rng(seed)
    confidence, right = rng.integers(0, 3, 7), rng.random(7) < 0.6
    want = by_orders(confidence, right)
    assert metrics.aurc(confidence, right).value == pytest.approx(want, abs=1e-12)


def test_what_a_confidence_can_and_cannot_reach():
    right = np.arange(1000) % 10 > 0
    found = metrics.selective_accuracy(right, right, (1.0, 0.9, 0.5))
    # r + (1 - r) ln(1 - r), equation 4 of Geifman et al.
    assert found.aurc.value == found.least == pytest.approx(0.1 + 0.9 * np.log(0.9), abs=1e-3)
    # The confident half ties with others, which get an answer too.
    assert found.coverage == (1.0, 0.9, 0.9)
    assert [share.value for share in found.accuracy] == [0.9, 1.0, 1.0]
    nothing = metrics.selective_accuracy(np.zeros(1000), right)
    assert nothing.aurc.value == pytest.approx(0.1) and nothing.coverage == (1.0,) * 4
    assert metrics.aurc(~right, right).value > 0.1


def test_shares_are_those_of_the_rows_with_the_highest_confidence():
    rng = np.random.default_rng(0)
    confidence, right, groups = rng.normal(size=90), rng.random(90) < 0.7, np.arange(90) // 3
    found = metrics.selective_accuracy(confidence, right, (0.9, 0.5), groups=groups)
    for share, coverage in zip(found.accuracy, (81, 45), strict=True):
        rows = np.argsort(-confidence)[:coverage]
        assert share == metrics.proportion(right[rows], groups[rows])


def test_copies_of_rows_tell_nothing_more():
    rng = np.random.default_rng(0)
    confidence, right = rng.normal(size=50), rng.random(50) < 0.7
    once = metrics.aurc(confidence, right)
    copied = np.tile(confidence, 2), np.tile(right, 2)
    known = metrics.aurc(*copied, groups=np.tile(np.arange(50), 2))
    assert (known.low, known.high) == pytest.approx((once.low, once.high), rel=0.1)
    unknown = metrics.aurc(*copied)
    assert unknown.high - unknown.low < 0.8 * (known.high - known.low)


@pytest.mark.parametrize("patients, images", [(200, 1), (30, 10)])
def test_the_interval_holds_the_truth(patients, images):
    """Of 400 data sets, whose patients have their own difficulty."""
    rng = np.random.default_rng(1)

    def draw(patients, images):
        hard = np.repeat(rng.normal(size=patients), images)
        confidence = rng.normal(size=patients * images) - hard
        right = rng.random(patients * images) < special.expit(1 + confidence)
        return confidence, right, np.repeat(np.arange(patients), images)

    truth = metrics.aurc(*draw(400_000, 1)[:2]).value
    drawn = [draw(patients, images) for _ in range(400)]
    held = [truth in metrics.aurc(c, right, groups=groups) for c, right, groups in drawn]
    assert 0.92 <= np.mean(held) <= 0.98
    if images > 1:
        alone = [truth in metrics.aurc(c, right) for c, right, _ in drawn]
        assert np.mean(alone) < 0.9


def test_what_is_undefined_or_wrong():
    assert np.isnan(metrics.aurc([1.0, 2.0], [True, True]).low)
    assert np.isnan(metrics.aurc([1.0, 2.0], [True, False], groups=["a", "a"]).high)
    with pytest.raises(ValueError, match="no rows"):
        metrics.aurc([], [])
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="coverage has .*expected shares above 0 and up to 1"):
            metrics.selective_accuracy([1.0, 2.0], [True, False], (share,))
