"""AUC against scikit-learn and against its definition; the errors that save a wrong number."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medsiglip_jax.metrics import accuracy, auc, macro_auc

pytestmark = pytest.mark.float


def random_case(seed):
    """Scores with more or fewer ties, both classes present, n from 2 to about 200."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 200))
    labels = rng.random(n) < rng.uniform(0.05, 0.95)
    labels[:2] = [True, False]
    scores = rng.normal(size=n) + labels * rng.uniform(-1, 2)
    levels = rng.choice([0, 1, 3, 20, 1000])
    return (np.round(scores * levels) if levels else scores), labels


@pytest.mark.parametrize("seed", range(200))
def test_auc_matches_sklearn(seed):
    scores, labels = random_case(seed)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), rel=0, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_auc_is_the_probability_of_the_right_order(seed):
    scores, labels = random_case(seed)
    positive, negative = scores[labels][:, None], scores[~labels]
    wins = (positive > negative) + 0.5 * (positive == negative)
    assert auc(scores, labels) == pytest.approx(wins.mean(), rel=0, abs=1e-12)
    assert auc(-scores, labels) == pytest.approx(1 - wins.mean(), rel=0, abs=1e-12)


def test_auc_known_values():
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auc([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert auc([1, 2, 3, 4], [1, 1, 0, 0]) == 0
    assert auc([7, 7, 7, 7], [1, 0, 0, 1]) == 0.5


def test_auc_sees_differences_that_float32_would_lose():
    assert auc([1.0, 1.0 + 1e-12], [0, 1]) == 1


@pytest.mark.parametrize("kind", [bool, np.int64, np.uint8, np.float32])
def test_auc_takes_any_zeros_and_ones(kind):
    scores, labels = random_case(3)
    value = auc(scores, labels.astype(kind))
    assert value == auc(scores.tolist(), labels.astype(kind).tolist()) == auc(scores, labels)
    assert type(value) is float


def test_auc_takes_jax_arrays():
    assert auc(jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])) == 0.75
    assert auc(jnp.array([1, 2, 3, 4], jnp.bfloat16), jnp.array([0, 0, 1, 1])) == 1


def test_auc_of_many_rows_is_quick_and_exact():
    # 10^6 positives x 10^6 negatives: the pairs would not fit, and their number needs 41 bits.
    n = 1_000_000
    scores = np.arange(2 * n) // 2
    assert auc(scores, np.arange(2 * n) % 2) == 0.5


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], [True, True], []])
def test_auc_of_one_class_is_nan(labels):
    assert math.isnan(auc(np.zeros(len(labels)), labels))


def test_infinite_scores_are_ordinary_extremes():
    scores = [-np.inf, -np.inf, 0, 1, np.inf, np.inf]
    labels = [0, 1, 0, 1, 1, 0]
    finite = np.clip(scores, -9, 9)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, finite), abs=1e-12)


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        ([0.1, np.nan], [0, 1], "scores contains 1 NaN of 2"),
        ([np.nan, np.nan], [1, 1], "scores contains 2 NaN"),
        ([0.1, 0.2], [0, 1, 1], r"labels has shape \(3,\)"),
        ([0.1, 0.2], [[0, 1]], r"expected labels of shape \(2,\)"),
        ([[0.1, 0.2]], [0], r"scores has shape \(1, 2\); expected \[n\].*macro_auc"),
        ([0.1, 0.2], [0, 2], "labels contains .*2.*expected only 0 and 1"),
        ([0.1, 0.2], [-1, 1], "labels contains .*-1.*Drop the uncertain"),
        ([0.1, 0.2], [0, np.nan], "labels contains .*nan"),
        ([0.1, 0.2], [0, 0.5], "labels contains .*0.5"),
        ([0.1, 0.2], ["0", "1"], "labels contains"),
        ([0.1, 0.2], [None, 1], "labels contains None"),
    ],
)
def test_auc_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        auc(scores, labels)


# ------------------------------------------------------------------------------------ many classes


def class_case(seed, n=120, classes=5):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    scores = rng.normal(size=(n, classes)) + np.eye(classes)[labels]
    return np.round(scores, 1), labels


@pytest.mark.parametrize("seed", range(20))
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
