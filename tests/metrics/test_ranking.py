"""AUC and curves against scikit-learn and their definitions; errors that save a wrong number."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.metrics import roc_auc_score

from medsiglip_jax.metrics import auc, average_precision, roc_curve

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


@pytest.mark.parametrize("seed", range(50))
def test_auc_matches_sklearn(seed):
    scores, labels = random_case(seed)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), rel=0, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
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


@pytest.mark.parametrize("seed", range(10))
def test_curves_match_sklearn(seed):
    scores, labels = random_case(seed)
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
