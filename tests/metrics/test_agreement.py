"""Figures of named classes against scikit-learn; their intervals by patient."""

import math

import numpy as np
import pytest
from sklearn import metrics as reference

from medsiglip_jax import metrics

NAMES = ("balanced_accuracy", "macro_f1", "weighted_f1", "matthews", "cohen_kappa")
REFERENCES = {
    "accuracy": reference.accuracy_score,
    "balanced_accuracy": reference.balanced_accuracy_score,
    "macro_f1": lambda y, p: reference.f1_score(y, p, average="macro"),
    "weighted_f1": lambda y, p: reference.f1_score(y, p, average="weighted"),
    "matthews": reference.matthews_corrcoef,
    "cohen_kappa": reference.cohen_kappa_score,
    "quadratic_kappa": lambda y, p: reference.cohen_kappa_score(
        y, p, weights="quadratic", labels=range(max(y.max(), p.max()) + 1)
    ),
}


def case(seed, n=70):
    """Named and true classes, some of which only one of the two has."""
    rng = np.random.default_rng(seed)
    count = 2 + seed % 6
    labels = rng.integers(count, size=n) * (1 + (seed == 3))
    named = np.where(rng.random(n) < 0.6, labels, rng.integers(count + 1, size=n))
    return named, labels


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_figures_are_those_of_sklearn(seed, name):
    named, labels = case(seed)
    found = getattr(metrics, name)(named, labels)
    assert found == pytest.approx(REFERENCES[name](labels, named), abs=1e-12)
    assert getattr(metrics, name)(named + 10**9, labels + 10**9) == found  # names do not matter


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_accuracy_is_that_of_sklearn(k):
    rng = np.random.default_rng(k)
    scores, labels = rng.normal(size=(80, 6)), rng.integers(6, size=80)
    want = reference.top_k_accuracy_score(labels, scores, k=k, labels=range(6))
    assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx(want, abs=1e-12)
    if k == 1:
        tied = np.round(scores)
        assert metrics.top_k_accuracy(tied, labels, 1) == metrics.accuracy(tied, labels)
    with pytest.raises(ValueError, match="k is 7 for 6 classes"):
        metrics.top_k_accuracy(scores, labels, 7)


def test_classes_that_say_nothing():
    assert metrics.matthews([1, 1], [0, 1]) == 0 and math.isnan(metrics.cohen_kappa([1, 1], [1, 1]))
    for name in NAMES:
        assert math.isnan(getattr(metrics, name)(np.zeros(0, int), np.zeros(0, int)))
        with pytest.raises(ValueError, match="expected equally many integers"):
            getattr(metrics, name)([0.5, 1.0], [0, 1])


@pytest.mark.parametrize("labels", [[0, 1], [1], [[0, 1, 1]]])
def test_labels_that_are_not_one_for_each_row_are_refused_in_one_line(labels):
    for figures in (metrics.class_figures, lambda p, y: metrics.class_figures_pair(p, p, y)):
        with pytest.raises(ValueError, match="expected equally many integers"):
            figures([0, 1, 1], labels)


def test_all_figures_have_the_intervals_of_the_bootstrap():
    named, labels = case(5, 200)
    groups = np.arange(200) // 2
    found = metrics.class_figures(named, labels, groups=groups, samples=60, seed=3)
    assert found.keys() == REFERENCES.keys()
    assert found["accuracy"] == metrics.proportion(named == labels, groups)
    for name in (*NAMES, "quadratic_kappa"):
        figure = getattr(metrics, name)
        want = metrics.bootstrap(figure, named, labels, groups=groups, samples=60, seed=3)
        got = found[name]
        assert [got.value, got.low, got.high] == pytest.approx(
            [want.value, want.low, want.high], abs=1e-12
        )


def test_all_right_is_no_certainty():
    labels = np.arange(40) % 4
    found = metrics.class_figures(labels, labels, groups=np.arange(40) // 2, samples=50)
    share = metrics.proportion(np.ones(40, bool), np.arange(40) // 2)
    for name, interval in found.items():
        signed = name in ("matthews", "cohen_kappa", "quadratic_kappa")
        assert (interval.value, interval.high) == (1, 1)
        assert interval.low == pytest.approx(2 * share.low - 1 if signed else share.low)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=300)
    first = np.where(rng.random(300) < 0.7, labels, rng.integers(4, size=300))
    second = np.where(rng.random(300) < 0.9, first, labels)  # better, on the same images
    found = metrics.class_figures_pair(second, first, labels, samples=300)
    for name, difference in found.items():
        want = REFERENCES[name](labels, second) - REFERENCES[name](labels, first)
        assert difference.value == pytest.approx(want, abs=1e-12)
    alone = [metrics.class_figures(x, labels, samples=300)["macro_f1"] for x in (first, second)]
    paired = found["macro_f1"].high - found["macro_f1"].low
    assert paired < 0.7 * np.hypot(*(x.high - x.low for x in alone))
    swapped = metrics.class_figures_pair(first, second, labels, samples=300)
    assert swapped["macro_f1"].low == pytest.approx(-found["macro_f1"].high)


def test_the_intervals_hold_the_truth():
    """Of 60 patients with 3 images each, who are hard together; truth from 200,000 patients."""

    def draw(rng, patients):
        units = np.repeat(np.arange(patients), 3)
        labels = rng.choice(4, len(units), p=[0.5, 0.2, 0.2, 0.1])
        hard = rng.random(patients)[units] < 0.3
        wrong = rng.random(len(units)) < np.where(hard, 0.7, 0.1)
        return np.where(wrong, rng.integers(4, size=len(units)), labels), labels, units

    truth = {k: f(*draw(np.random.default_rng(0), 200_000)[1::-1]) for k, f in REFERENCES.items()}
    held = {name: [] for name in truth}
    for seed in range(100):
        named, labels, units = draw(np.random.default_rng([1, seed]), 60)
        found = metrics.class_figures(named, labels, groups=units, samples=200, seed=seed)
        for name, interval in found.items():
            held[name].append(float(truth[name]) in interval)
    assert all(0.87 <= np.mean(x) <= 1 for x in held.values()), held


def test_a_difference_that_no_resample_moves_has_no_limits():
    labels = np.arange(20) % 2
    found = metrics.class_figures_pair(labels, 1 - labels, labels, samples=50)
    assert found["accuracy"].value == 1 and np.isnan(found["accuracy"].low)
    same = metrics.class_figures_pair(labels, labels, labels, samples=50)
    assert (same["accuracy"].low, same["accuracy"].high) == (0, 0)
