"""Thresholds against all that there are; operating points against scikit-learn."""

import math

import numpy as np
import pytest
from sklearn import metrics as reference

from medsiglip_jax.metrics import (
    choose_threshold,
    judge_classes,
    operating_point,
    predictive_values,
    wilson,
)


def case(seed, n=60):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < rng.uniform(0.1, 0.9)
    labels[:2] = True, False
    scores = rng.normal(size=n) + labels
    return (np.round(scores * 3) if seed % 2 else scores), labels


def rates(scores, labels, threshold):
    called = scores >= threshold
    return called[labels].mean(), (~called[~labels]).mean()


@pytest.mark.parametrize("seed", range(8))
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
        (("sensitivity",), "at_least is None for the rule"),
        (("youden", 0.9), "at_least is 0.9 for the rule 'youden'; expected None"),
        (("specificity", 90.0), "at_least is 90"),
    ],
)
def test_thresholds_refuse(how, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold([1, 2], [0, 1], *how)


@pytest.mark.parametrize("seed", range(6))
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


def test_operating_points_are_of_patients():
    """Copies of a patient tell nothing new, and rows of one group each are independent rows."""
    scores, labels = case(2)
    alone = operating_point(scores, labels, 0.5, groups=np.arange(60))
    copied = [np.repeat(x, 5) for x in (scores, labels, np.arange(60))]
    point = operating_point(*copied[:2], 0.5, groups=copied[2])
    for name in ("sensitivity", "specificity", "ppv", "npv"):
        one, five = getattr(alone, name), getattr(point, name)
        assert five.value == one.value
        assert (five.low, five.high) == pytest.approx((one.low, one.high), abs=1e-12)


def test_operating_points_of_patients_hold_the_truth():
    """40 patients with 5 images each, whose scores share half of their variance."""
    held, naive, units = [], [], np.repeat(np.arange(40), 5)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scores = np.sqrt(0.8) * rng.normal(size=40)[units] + np.sqrt(0.2) * rng.normal(size=200)
        point = operating_point(scores, np.ones(200), 0.0, groups=units)
        held.append(0.5 in point.sensitivity)
        naive.append(0.5 in operating_point(scores, np.ones(200), 0.0).sensitivity)
    assert 0.91 <= np.mean(held) <= 0.99 and np.mean(naive) < 0.85


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


@pytest.mark.parametrize("classes, thresholds", [
    (["a", "b"], [0.1]), (["a", "b"], [0.1, 0.2, 0.3]), (["a", "a"], [0.1, 0.2]),
])  # fmt: skip
def test_a_class_has_one_threshold_and_a_name_of_its_own(classes, thresholds):
    scores, labels = np.array([[0.1, 0.2], [0.3, 0.4]]), np.eye(2)
    with pytest.raises(ValueError, match="expected one threshold for each class, and different"):
        judge_classes(scores, labels, classes, thresholds)
