"""Calibration against scikit-learn; fits against the conditions that define them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import special
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from medsiglip_jax.metrics import (
    auc,
    brier,
    expected_calibration_error,
    fit_platt,
    fit_temperature,
    recalibration,
    reliability,
    top_label,
)


def case(seed, n=400):
    rng = np.random.default_rng(seed)
    p = rng.beta(0.7, 1.5, size=n)
    if seed % 2:
        p = np.round(p, 1)  # ties, and values on the edges of bins
    return p, rng.random(n) < p**1.5


@pytest.mark.parametrize("equal, strategy", [("width", "uniform"), ("mass", "quantile")])
@pytest.mark.parametrize("bins", [1, 15])
@pytest.mark.parametrize("seed", range(4))
def test_reliability_matches_sklearn(seed, bins, equal, strategy):
    p, labels = case(seed)
    observed, predicted = calibration_curve(labels, p, n_bins=bins, strategy=strategy)
    found = reliability(p, labels, bins, equal)
    np.testing.assert_allclose(found.observed, observed, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.predicted, predicted, rtol=0, atol=1e-12)
    assert found.rows.sum() == len(p)
    want = (np.abs(observed - predicted) * found.rows).sum() / len(p)
    assert expected_calibration_error(p, labels, bins, equal) == pytest.approx(want, abs=1e-12)


def test_calibration_error_by_hand():
    # Bins [0, 0.5] and (0.5, 1]: |0.3 - 1/2| and |0.8 - 1/2|, two rows each.
    p, labels = [0.2, 0.4, 0.7, 0.9], [0, 1, 1, 0]
    assert expected_calibration_error(p, labels, bins=2) == pytest.approx(0.25)
    assert expected_calibration_error(p, labels, bins=2, equal="mass") == pytest.approx(0.25)
    assert expected_calibration_error([0, 0, 1], [0, 0, 1]) == 0
    assert math.isnan(expected_calibration_error([], []))


def test_equal_mass_is():
    p = np.random.default_rng(0).random(100) ** 3
    assert reliability(p, p > 0.5, bins=10, equal="mass").rows.tolist() == [10] * 10


@pytest.mark.parametrize("seed", range(4))
def test_brier_matches_sklearn(seed):
    p, labels = case(seed)
    assert brier(p, labels) == pytest.approx(brier_score_loss(labels, p), abs=1e-12)
    rng = np.random.default_rng(seed)
    many = special.softmax(rng.normal(size=(50, 4)), axis=1)
    classes = rng.permutation(np.arange(50) % 4)
    want = brier_score_loss(classes, many, scale_by_half=False)
    assert brier(many, classes) == pytest.approx(want, abs=1e-12)
    two = np.stack([1 - p, p], axis=1)
    assert brier(two, labels.astype(int)) == pytest.approx(2 * brier(p, labels), abs=1e-12)


def test_top_label():
    p, right = top_label([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1]], [0, 0, 0])
    assert p.tolist() == [0.6, 0.7, 0.9] and right.tolist() == [True, False, True]


# -------------------------------------------------------------------------------------------- fits


def nll(p, labels):
    return -np.log(np.where(labels, p, 1 - p)).mean()


@pytest.mark.parametrize("seed", range(4))
def test_temperature_is_the_slope_of_a_regression_through_zero(seed):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=500)
    labels = rng.random(500) < special.expit(logits / 4)
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
    want = model.fit(logits[:, None], labels).coef_[0, 0]
    found = fit_temperature(logits, labels)
    assert 1 / found.value == pytest.approx(want, rel=1e-5)
    assert found.value == pytest.approx(4, rel=0.4)
    best = nll(found(logits), labels)
    for factor in (0.999, 1.001):
        assert nll(special.expit(logits / (factor * found.value)), labels) > best
    # The condition of the optimum, to all digits.
    assert (found(logits) * logits).sum() == pytest.approx(logits[labels].sum(), rel=1e-9)


def test_temperature_of_many_classes():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5))
    p = special.softmax(logits / 0.02, axis=1)
    labels = (p.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1)
    found = fit_temperature(logits, labels)
    assert found.value == pytest.approx(0.02, rel=0.15)
    expected, seen = (found(logits) * logits).sum(), logits[np.arange(4000), labels].sum()
    assert expected == pytest.approx(seen, rel=1e-9)
    assert (found(logits).argmax(1) == logits.argmax(1)).all()


def test_temperature_at_its_bounds():
    assert fit_temperature([-1, 2, -3, 4], [0, 1, 0, 1]).value == pytest.approx(4e-6)
    assert fit_temperature([-1, 2, -3, 4], [1, 0, 1, 0]).value == pytest.approx(4e6)
    assert math.isfinite(fit_temperature([0, 0], [0, 1]).value)


@pytest.mark.parametrize("seed", range(4))
def test_platt_is_a_regression_on_his_targets(seed):
    rng = np.random.default_rng(seed)
    scores = 0.1 + 0.01 * rng.normal(size=300)  # as differences of cosines are
    labels = rng.random(300) < special.expit(200 * (scores - 0.1) - 1)
    n = labels.sum()
    targets = np.where(labels, (n + 1) / (n + 2), 1 / (300 - n + 2))
    found = fit_platt(scores, labels)
    p = found(scores)
    assert p.sum() == pytest.approx(targets.sum(), rel=1e-9)
    assert (p * scores).sum() == pytest.approx((targets * scores).sum(), rel=1e-9)
    model = LogisticRegression(C=np.inf, tol=1e-10)
    z = (scores - 0.1) / 0.01
    model.fit(np.tile(z, 2)[:, None], np.repeat([1, 0], 300),
              sample_weight=np.append(targets, 1 - targets))  # fmt: skip
    np.testing.assert_allclose(p, model.predict_proba(z[:, None])[:, 1], rtol=0, atol=1e-5)
    assert auc(p, labels) == auc(scores, labels)
    assert expected_calibration_error(p, labels) < expected_calibration_error(
        special.expit(scores), labels
    )


GOLDEN = json.loads((Path(__file__).parent / "golden/base.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["recalibration"], ids=["1", "2", "3"])
def test_slope_and_intercept_are_those_of_rs_glm(case):
    found = recalibration(special.expit(case["log_odds"]), case["labels"])
    values = found.intercept.value, found.slope.value
    assert values == pytest.approx(case["intercept_slope"], rel=1e-8)


def test_slopes_hold_the_truth_by_patient():
    """Of 50 patients with 4 images each, whose labels and scores are alike; labels follow p."""
    held, units = [], np.repeat(np.arange(50), 4)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        odds = rng.normal(size=50)[units] + rng.normal(size=200)
        labels = rng.random(50)[units] < special.expit(odds)
        found = recalibration(special.expit(odds), labels, groups=units)
        held.append((1.0 in found.slope, 0.0 in found.intercept))
    assert np.all((np.mean(held, axis=0) > 0.88) & (np.mean(held, axis=0) < 0.99))


def test_what_is_overconfident_has_a_slope_below_one_and_what_is_reversed_one_below_zero():
    rng = np.random.default_rng(0)
    odds = rng.normal(size=2000)
    labels = rng.random(2000) < special.expit(odds)
    for factor in (0.5, 2.0, -1.0):
        slope = recalibration(special.expit(factor * odds), labels).slope
        assert 1 / factor in slope and slope.high - slope.low < 0.5 / abs(factor)


def test_labels_that_a_threshold_separates_have_no_slope():
    for p, labels in (([0.1, 0.2, 0.8], [0, 0, 1]), ([0.5, 0.5], [0, 1]), ([0.1, 0.9], [1, 1])):
        found = recalibration(p, labels)
        assert math.isnan(found.slope.value) and math.isnan(found.intercept.low)
    with pytest.raises(ValueError, match="contains 2"):
        recalibration([2.0], [1])


def test_platt_of_scores_that_separate_or_say_nothing():
    found = fit_platt([-2, -1, 1, 2], [0, 0, 1, 1])
    p = found([-2, -1, 1, 2])
    assert 0.15 < p[0] < p[1] < 0.5 < p[2] < p[3] < 0.85 and p.mean() == pytest.approx(0.5)
    flat = fit_platt([1, 1, 1, 1], [0, 1, 1, 1])
    np.testing.assert_allclose(flat([1]), (3 * 4 / 5 + 1 / 3) / 4, rtol=1e-9)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: brier([1.2], [1]), "contains 1.2 at row 0.*fit_temperature"),
        (lambda: reliability([-0.1, 0.5], [1, 0]), "contains -0.1"),
        (lambda: reliability([0.5], [1], 0), "bins is 0"),
        (lambda: reliability([0.5], [1], 5, "size"), "equal 'size'"),
        (lambda: brier([math.nan], [1]), "NaN"),
        (lambda: fit_platt([1, 2], [1, 1]), "2 positives in 2"),
        (lambda: fit_platt([1, math.inf], [1, 0]), "finite"),
        (lambda: fit_temperature([], []), "0 scores"),
        (lambda: fit_temperature([[1.0, 2.0]], [2]), "integers from 0 to 1"),
        (lambda: brier([0.5], [-1]), "Drop the uncertain"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
