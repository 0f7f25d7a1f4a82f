"""One-vs-rest AUCs, accuracy and agreement of grades against scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from medsiglip_jax.metrics import accuracy, auc, class_aucs, delong, macro_auc, quadratic_kappa


def test_class_aucs_of_one_class_a_row():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=200)
    scores = rng.normal(size=(200, 4)) + np.eye(4)[labels]
    labels[:10] = -1
    groups = rng.integers(60, size=200)
    found = class_aucs(scores, labels, ["a", "b", "c", "d"], groups=groups)
    there = labels >= 0
    for k, one in enumerate(found.classes):
        column = scores[there, k], labels[there] == k
        assert one.auc == delong(*column, groups=groups[there])
        assert one.auc.value == pytest.approx(roc_auc_score(column[1], column[0]), abs=1e-12)
        assert (one.positives, one.missing) == (column[1].sum(), 10)
        assert one.positives + one.negatives == 190
    assert [one.name for one in found.classes] == ["a", "b", "c", "d"]
    assert found.macro == pytest.approx(macro_auc(scores[there], labels[there]), abs=1e-12)
    assert found.undefined == ()


def test_class_aucs_of_findings_lists_what_it_cannot_measure():
    scores = np.array([[0.1, 0.9, 0.3], [0.7, 0.2, 0.3], [0.4, 0.6, 0.1], [0.9, 0.1, 0.2]])
    labels = np.array([[0, 1, 0], [1, np.nan, 0], [0, 0, -1], [1, 0, np.nan]])
    found = class_aucs(scores, labels, ["x", "y", "z"])
    assert found.undefined == ("z",) and math.isnan(found.classes[2].auc.value)
    assert found.macro == (1 + 1) / 2 == macro_auc(scores, labels)
    assert [(c.positives, c.negatives, c.missing) for c in found.classes] == [
        (2, 2, 0), (1, 2, 1), (0, 2, 2),
    ]  # fmt: skip
    assert math.isnan(class_aucs(scores[:, 2:], labels[:, 2:]).macro)


def test_class_aucs_refuse():
    with pytest.raises(ValueError, match="row 1, column 0"):
        class_aucs([[0.1, 0.2], [math.nan, 0.2]], [0, 1])
    with pytest.raises(ValueError, match="1 classes for 2 columns"):
        class_aucs([[0.1, 0.2]], [0], ["a"])
    with pytest.raises(ValueError, match="labels contains .*2"):
        class_aucs([[0.1, 0.2]], [[2, 0]])
    with pytest.raises(ValueError, match=r"labels has shape \(1, 1\)"):
        class_aucs([[0.1, 0.2]], [[1]])
    with pytest.raises(ValueError, match="integers from 0 to 1"):
        class_aucs([[0.1, 0.2]], [2])


@pytest.mark.parametrize("seed", range(5))
def test_quadratic_kappa_matches_sklearn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(5, size=80)
    grades = np.clip(labels + rng.integers(-1, 3, size=80), 0, 4)
    want = cohen_kappa_score(labels, grades, weights="quadratic", labels=range(5))
    assert quadratic_kappa(grades, labels) == pytest.approx(want, abs=1e-12)
    assert quadratic_kappa(labels, labels) == 1


def test_quadratic_kappa_at_the_edges():
    assert quadratic_kappa([0, 2, 0, 2], [2, 0, 2, 0]) == -1
    assert math.isnan(quadratic_kappa([3, 3], [3, 3]))
    assert math.isnan(quadratic_kappa(np.zeros(0, int), np.zeros(0, int)))
    for labels in ([0, -1], [0.0, 1.0], [0]):
        with pytest.raises(ValueError, match="equally many integers"):
            quadratic_kappa([0, 1], labels)


def class_case(seed, n=120, classes=5):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    scores = rng.normal(size=(n, classes)) + np.eye(classes)[labels]
    return np.round(scores, 1), labels


@pytest.mark.parametrize("seed", range(8))
def test_macro_auc_matches_sklearn(seed):
    scores, labels = class_case(seed)
    softmax = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    want = roc_auc_score(labels, softmax, multi_class="ovr", average="macro")
    assert macro_auc(softmax, labels) == pytest.approx(want, rel=0, abs=1e-12)
    want = np.mean([roc_auc_score(labels == k, scores[:, k]) for k in range(5)])
    assert macro_auc(scores, labels) == pytest.approx(want, rel=0, abs=1e-12)


def test_macro_auc_leaves_out_classes_that_it_cannot_measure():
    scores, labels = class_case(0)
    rows = labels != 3
    want = np.mean([auc(scores[rows, k], labels[rows] == k) for k in (0, 1, 2, 4)])
    assert macro_auc(scores[rows], labels[rows]) == want
    assert math.isnan(macro_auc(scores, np.zeros_like(labels)))
    assert math.isnan(macro_auc(np.zeros((0, 3)), np.zeros(0, int)))


def test_accuracy():
    scores, labels = class_case(1)
    assert accuracy(scores, labels) == np.mean(scores.argmax(1) == labels)
    assert accuracy([[1, 2], [3, 0], [1, 1]], [1, 1, 0]) == pytest.approx(2 / 3)
    assert type(accuracy(scores, labels)) is float
    assert math.isnan(accuracy(np.zeros((0, 3)), np.zeros(0, int)))


@pytest.mark.parametrize("metric", [macro_auc, accuracy])
@pytest.mark.parametrize(
    "scores, labels, message",
    [
        (np.zeros(3), [0, 1, 2], r"expected \[n, classes\]"),
        (np.full((2, 2), np.nan), [0, 1], "scores contains 4 NaN"),
        (np.zeros((3, 2)), [0, 1], r"labels has shape \(2,\)"),
        (np.zeros((2, 2)), [0, 2], r"integers from 0 to 1"),
        (np.zeros((2, 2)), [-1, 0], r"integers from 0 to 1"),
        (np.zeros((2, 2)), [0.0, 1.0], "labels is float64"),
        (np.zeros((2, 2)), [False, True], "labels is bool"),
    ],
)
def test_class_metrics_refuse(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, labels)
