"""How well a score orders rows: AUC, average precision, the ROC curve. On the host, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Real
from numpy.typing import ArrayLike

from medsiglip_jax.metrics.checks import binary

# From how often each row was drawn, in one resample [n] or in many [b, n], to the statistic.
OfWeights = Callable[[Real[np.ndarray, "*b n"]], Float64[np.ndarray, "*b"]]


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Returns the area under the ROC curve: P(positive scores higher) + P(tie) / 2.

    Computed as the Mann-Whitney U statistic, in which ties count half, in O(n log n).

    Args:
      scores: [n] real numbers, higher meaning more positive. Infinities are ordinary extremes.
      labels: [n] bool, or numbers that are 0 or 1.

    Returns:
      A number in [0, 1]; NaN without positives or without negatives, where it is undefined.

    Raises:
      ValueError: the shapes differ or are not [n], a score is NaN, or a label is neither 0 nor 1.
    """
    return float(auc_of_weights(scores, labels)(np.ones(np.shape(scores))))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Returns the mean precision over the positives, with tied scores taken together.

    This is the area under the precision-recall curve by steps, without interpolation, as in
    scikit-learn. Chance is the share of positives, so compare it only between models on the same
    rows.

    Args:
      scores: [n] real numbers, higher meaning more positive.
      labels: [n] bool, or numbers that are 0 or 1.

    Returns:
      A number in (0, 1]; NaN where one of the two labels is missing.

    Raises:
      ValueError: as for `auc`.
    """
    return float(average_precision_of_weights(scores, labels)(np.ones(np.shape(scores))))


def auc_of_weights(scores: ArrayLike, labels: ArrayLike) -> OfWeights:
    """`auc` of resamples, in which rows are drawn several times or not at all; sorts once."""
    scores, positive = binary(scores, labels)
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
    negatives = negatives[np.argsort(scores[negatives])]
    below, reached = (  # negatives below each positive, and those at most as high
        np.searchsorted(scores[negatives], scores[positives], side) for side in ("left", "right")
    )

    def of_weights(weights):
        ours, theirs = weights.take(positives, axis=-1), weights.take(negatives, axis=-1)
        passed = np.zeros((*theirs.shape[:-1], len(negatives) + 1), theirs.dtype)
        np.cumsum(theirs, axis=-1, out=passed[..., 1:])
        wins = passed.take(below, axis=-1) + passed.take(reached, axis=-1)
        return ratio(np.einsum("...p,...p", ours, wins) / 2, ours.sum(-1) * passed[..., -1])

    return of_weights


def average_precision_of_weights(scores: ArrayLike, labels: ArrayLike) -> OfWeights:
    """`average_precision` of resamples; sorts once."""
    scores, positive = binary(scores, labels)
    tallies = _tallies(-scores, positive)

    def of_weights(weights):
        positives, negatives = tallies(weights)
        true_positives = np.cumsum(positives, axis=-1)
        called = true_positives + np.cumsum(negatives, axis=-1)
        precision = true_positives / np.maximum(called, 1)  # 0 / 0 is 0
        total = positives.sum(-1)
        return ratio((precision * positives).sum(-1), np.where(negatives.any(-1), total, 0))

    return of_weights


def _tallies(scores: np.ndarray, positive: np.ndarray):
    """weights -> the sums over positives and over negatives at each distinct score, ascending."""
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], positive[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))[: len(scores)]
    tied = len(starts) < len(scores)

    def tallies(weights):
        weights = weights[..., order].astype(np.float64, copy=False)
        positives = weights * positive
        negatives = weights - positives
        if not tied:
            return positives, negatives
        return tuple(np.add.reduceat(x, starts, axis=-1) for x in (positives, negatives))

    return tallies


def ratio(x, y):
    """x / y; NaN where y is 0."""
    return np.divide(x, y, out=np.full(np.shape(y), np.nan), where=np.asarray(y) > 0)


@dataclass(frozen=True)
class Roc:
    """The points of an ROC curve, from (0, 0) to (1, 1), one for each distinct score.

    Attributes:
      false_positive_rate: 1 - specificity; NaN without negatives.
      true_positive_rate: sensitivity; NaN without positives.
      thresholds: rows with at least this score are called positive; the first, inf, calls none.
    """

    false_positive_rate: Float64[np.ndarray, " k"]
    true_positive_rate: Float64[np.ndarray, " k"]
    thresholds: Float64[np.ndarray, " k"]


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> Roc:
    """Returns the ROC curve, whose area by the trapezoid rule is `auc`.

    Args:
      scores: [n] real numbers, higher meaning more positive.
      labels: [n] bool, or numbers that are 0 or 1.

    Raises:
      ValueError: as for `auc`.
    """
    scores, positive = binary(scores, labels)
    called = _tallies(-scores, positive)(np.ones(len(scores)))
    false, true = (np.append(0, np.cumsum(x)) for x in called[::-1])
    thresholds = np.append(np.inf, np.unique(scores)[::-1])
    return Roc(ratio(false, np.full_like(false, false[-1])),
               ratio(true, np.full_like(true, true[-1])), thresholds)  # fmt: skip
