"""Operating points, proportions, adjusted p-values and curves against scikit-learn and SciPy."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from medsiglip_jax.metrics import (
    Interval,
    auc,
    average_precision,
    choose_threshold,
    holm,
    known,
    operating_point,
    predictive_values,
    roc_curve,
    wilson,
)


def case(seed, n=60):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < rng.uniform(0.1, 0.9)
    labels[:2] = True, False
    scores = rng.normal(size=n) + labels
    return (np.round(scores * 3) if seed % 2 else scores), labels


# -------------------------------------------------------------------------------------- proportions


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


# ------------------------------------------------------------------------------------------ curves


@pytest.mark.parametrize("seed", range(20))
def test_curves_match_sklearn(seed):
    scores, labels = case(seed)
    want = reference.roc_curve(labels, scores, drop_intermediate=False)
    found = roc_curve(scores, labels)
    for mine, theirs in zip(vars(found).values(), want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)
    area = np.trapezoid(found.true_positive_rate, found.false_positive_rate)
    assert area == pytest.approx(auc(scores, labels), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(
        reference.average_precision_score(labels, scores), abs=1e-12
    )


def test_average_precision_at_the_edges():
    assert average_precision([1, 2, 3], [0, 1, 1]) == 1
    assert average_precision([5, 5, 5, 5], [0, 1, 0, 0]) == 0.25
    assert average_precision([np.inf, 1, -np.inf], [0, 1, 1]) == pytest.approx((1 / 2 + 2 / 3) / 2)
    for labels in ([1, 1], [0, 0]):
        assert math.isnan(average_precision([1, 2], labels))
    assert math.isnan(average_precision([], []))
    assert type(average_precision([1, 2], [0, 1])) is float


def test_a_curve_of_one_label_is_nan():
    curve = roc_curve([1, 2], [1, 1])
    assert np.isnan(curve.false_positive_rate).all()
    np.testing.assert_array_equal(curve.true_positive_rate, [0, 0.5, 1])


# -------------------------------------------------------------------------------------- thresholds


def rates(scores, labels, threshold):
    called = scores >= threshold
    return called[labels].mean(), (~called[~labels]).mean()


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_are_the_best_of_all(seed):
    scores, labels = case(seed)
    every = [math.inf, *np.unique(scores)]
    best = max(sum(rates(scores, labels, t)) for t in every)
    chosen = choose_threshold(scores, labels)
    assert sum(rates(scores, labels, chosen)) == pytest.approx(best, abs=1e-12)
    for at_least in (0.0, 0.5, 0.9, 1.0):
        t = choose_threshold(scores, labels, "sensitivity", at_least)
        sensitivity, specificity = rates(scores, labels, t)
        assert sensitivity >= at_least
        others = [rates(scores, labels, x) for x in every]
        assert specificity == max(s for r, s in others if r >= at_least)
        t = choose_threshold(scores, labels, "specificity", at_least)
        sensitivity, specificity = rates(scores, labels, t)
        assert specificity >= at_least
        assert sensitivity == max(r for r, s in others if s >= at_least)


def test_thresholds_known():
    scores, labels = [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]
    assert choose_threshold(scores, labels, "sensitivity", 1.0) == 0.35
    assert choose_threshold(scores, labels, "sensitivity", 0.5) == 0.8
    assert choose_threshold(scores, labels, "specificity", 0.5) == 0.35
    assert choose_threshold([1, 2], [1, 0], "specificity", 1.0) == math.inf
    assert math.isnan(choose_threshold([1, 2], [1, 1]))


@pytest.mark.parametrize(
    "how, message",
    [
        (("best",), "rule is 'best'"),
        (("sensitivity",), "at_least None; give it"),
        (("youden", 0.9), "at_least 0.9"),
        (("specificity", 90.0), "at_least is 90"),
    ],
)
def test_thresholds_refuse(how, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold([1, 2], [0, 1], *how)


@pytest.mark.parametrize("seed", range(10))
def test_operating_points_match_sklearn(seed):
    scores, labels = case(seed)
    point = operating_point(scores, labels, 0.5)
    called = scores >= 0.5
    counts = [point.true_negatives, point.false_positives,
              point.false_negatives, point.true_positives]  # fmt: skip
    assert counts == reference.confusion_matrix(labels, called).ravel().tolist()
    assert point.sensitivity.value == pytest.approx(reference.recall_score(labels, called))
    assert point.specificity.value == pytest.approx(reference.recall_score(~labels, ~called))
    assert point.ppv.value == pytest.approx(reference.precision_score(labels, called))
    assert point.npv.value == pytest.approx(reference.precision_score(~labels, ~called))
    assert point.sensitivity == wilson(counts[3], counts[2] + counts[3])
    assert point.npv == wilson(counts[0], counts[0] + counts[2])
    prevalence = float(labels.mean())
    assert predictive_values(
        point.sensitivity.value, point.specificity.value, prevalence
    ) == pytest.approx((point.ppv.value, point.npv.value))


def test_operating_point_without_labels_and_without_a_threshold():
    point = operating_point([0.1, 0.9, 0.8, 0.2], [0, 1, np.nan, -1], 0.5)
    assert (point.true_positives, point.true_negatives, point.missing) == (1, 1, 2)
    assert operating_point([0.5], [1], 0.5).true_positives == 1  # at the threshold is called
    assert math.isnan(operating_point([0.1], [0], 0.5).ppv.value)
    with pytest.raises(ValueError, match="threshold is NaN"):
        operating_point([0.1], [0], math.nan)


def test_predictive_values_by_hand():
    # 1,000 people, 10 ill: 9 found of them, 99 of the 990 others called ill, too.
    ppv, npv = predictive_values(0.9, 0.9, 0.01)
    assert (ppv, npv) == pytest.approx((9 / 108, 891 / 892))
    assert math.isnan(predictive_values(0.0, 1.0, 0.5)[0])
    with pytest.raises(ValueError, match="from 0 to 1"):
        predictive_values(90.0, 0.9, 0.01)


# ------------------------------------------------------------------------------------------- known


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
