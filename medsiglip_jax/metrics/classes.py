"""Metrics of many classes: one-vs-rest AUCs and their mean, accuracy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from medsiglip_jax.metrics.auc_variance import delong
from medsiglip_jax.metrics.checks import Known, class_scores, fewest_units, known, real_scores
from medsiglip_jax.metrics.intervals import Interval
from medsiglip_jax.metrics.ranking import OfWeights, auc, auc_of_weights, ratio


@dataclass(frozen=True)
class ClassAuc:
    """One class against the rest.

    Attributes:
      name: the class.
      auc: its AUC with DeLong's interval.
      positives: number of rows of the class.
      negatives: number of rows of other classes.
      missing: number of rows left out because their label is unknown.
      fewest: number of patients with the class, or of those without it if they are fewer.
    """

    name: str
    auc: Interval
    positives: int
    negatives: int
    missing: int
    fewest: int


@dataclass(frozen=True)
class ClassAucs:
    """All classes, and the mean over those that have an AUC.

    Attributes:
      macro: the unweighted mean; NaN if no class has an AUC.
      classes: in the order of the columns.
    """

    macro: float
    classes: tuple[ClassAuc, ...]

    @property
    def undefined(self) -> tuple[str, ...]:
        """The classes that the mean leaves out, as all their known rows have the same label."""
        return tuple(c.name for c in self.classes if np.isnan(c.auc.value))


def class_aucs(
    scores: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str] | None = None,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    student: bool = False,
) -> ClassAucs:
    """Returns the AUC of each class against the rest, with intervals and counts.

    Args:
      scores: [n, c] real numbers, one column per class; they need not be probabilities.
      labels: [n] class numbers, -1 unknown; or [n, c] of 0 and 1, NaN or -1 unknown.
      classes: names of the columns; default their numbers.
      groups: [n] patient of each row, for the intervals; see `delong`.
      level: confidence level.
      student: wider intervals, for few positives; see `delong`.

    Raises:
      ValueError: the shapes disagree, a score is NaN, or a label is none of these.
    """
    scores = real_scores(scores, ndim=2)
    names = [str(k) for k in range(scores.shape[1])] if classes is None else list(classes)
    if len(names) != scores.shape[1]:
        raise ValueError(
            f"{len(names)} classes for {scores.shape[1]} columns of scores; expected one name each"
        )
    aucs = []
    for name, rows in zip(names, class_rows(scores, labels), strict=True):
        units = None if groups is None else np.asarray(groups)[rows.rows]
        interval = delong(rows.scores, rows.positive, groups=units, level=level, student=student)
        positives = int(rows.positive.sum())
        negatives = len(rows.positive) - positives
        fewest = fewest_units(rows.positive, units)
        aucs.append(ClassAuc(name, interval, positives, negatives, rows.missing, fewest))
    return ClassAucs(float(_mean(np.array([c.auc.value for c in aucs]))), tuple(aucs))


def macro_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Returns the mean over classes of the one-vs-rest `auc` of column k for the label k.

    A class to which no row or every row belongs has no AUC and is left out of the mean, so that a
    small split that lacks a rare class still gets a number over the other classes. NaN only if none
    is left. `class_aucs` lists the classes that were left out.

    Args:
      scores: [n, c] real numbers, one column per class; they need not be probabilities.
      labels: [n] integers in [0, c); or [n, c] of 0 and 1, where NaN or -1 leaves the row out of
        that class.

    Raises:
      ValueError: the shapes disagree, a score is NaN, or a label is no class index.
    """
    values = [auc(rows.scores, rows.positive) for rows in _columns(scores, labels)]
    return float(_mean(np.array(values)))


def macro_auc_of_weights(scores: ArrayLike, labels: ArrayLike) -> OfWeights:
    """`macro_auc` of resamples; sorts once."""
    columns = [
        (auc_of_weights(rows.scores, rows.positive), np.flatnonzero(rows.rows))
        for rows in _columns(scores, labels)
    ]
    return lambda weights: _mean(np.stack([of(weights.take(rows, -1)) for of, rows in columns]))


def class_rows(scores: ArrayLike, labels: ArrayLike) -> Iterator[Known]:
    """The known rows of each class.

    Args:
      scores: [n, c] real numbers.
      labels: [n] class numbers, -1 unknown; or [n, c] of 0 and 1, NaN or -1 unknown.
    """
    scores = real_scores(scores, ndim=2)
    return map(known, scores.T, _label_columns(scores, labels))


def _columns(scores: ArrayLike, labels: ArrayLike) -> Iterator[Known]:
    """The known rows of each class; labels that are class numbers are all known."""
    if np.ndim(labels) == 2:
        return class_rows(scores, labels)
    return class_rows(*class_scores(scores, labels))


def _label_columns(scores: np.ndarray, labels: ArrayLike) -> np.ndarray:
    """Labels of each class, [c, n] of 0, 1 and NaN, from class numbers or a matrix of findings."""
    labels = np.asarray(labels)
    if labels.ndim == 2:
        if labels.shape != scores.shape:
            raise ValueError(
                f"labels has shape {labels.shape} and scores {scores.shape}; expected equal shapes"
            )
        return np.asarray(labels, np.float64).T
    unknown = labels == -1
    _, labels = class_scores(scores, np.where(unknown, 0, labels))
    one_hot = labels == np.arange(scores.shape[1])[:, None]
    return np.where(unknown, np.nan, one_hot)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of the values that are not NaN; NaN if there are none."""
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0).sum(0), there.sum(0))


def accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """Returns the fraction of rows whose highest score is that of their label.

    Of tied scores the first class counts as the highest, as in `argmax`. NaN without rows.

    Args:
      scores: [n, c] real numbers, one column per class.
      labels: [n] integers in [0, c).

    Raises:
      ValueError: the shapes disagree, a score is NaN, or a label is no class index.
    """
    scores, labels = class_scores(scores, labels)
    return float(np.mean(scores.argmax(axis=1) == labels)) if len(labels) else float("nan")
