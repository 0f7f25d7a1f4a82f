"""Classification metrics on the host, in float64: AUC by ranks, its mean over classes, accuracy."""

import numpy as np
from numpy.typing import ArrayLike


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Returns the area under the ROC curve: P(positive scores higher) + P(tie) / 2.

    Computed as the Mann-Whitney U statistic with mid-ranks for ties, in O(n log n).

    Args:
      scores: [n] real numbers, higher meaning more positive. Infinities are ordinary extremes.
      labels: [n] bool, or numbers that are 0 or 1.

    Returns:
      A number in [0, 1]; NaN where it is undefined, that is without positives or without negatives.

    Raises:
      ValueError: the shapes differ or are not [n], a score is NaN, or a label is neither 0 nor 1.
    """
    scores, labels = _scores(scores, ndim=1), np.asarray(labels)
    _check_length(scores, labels)
    positive = labels == 1
    if not np.all(positive | (labels == 0)):
        odd = labels[~(positive | (labels == 0))][0]
        raise ValueError(
            f"labels contains {odd!r}; expected only 0 and 1, or bool. Drop the uncertain or"
            " unlabelled rows, or map them to 0 or 1, before computing the AUC."
        )
    n_positive = int(positive.sum())
    n_negative = len(labels) - n_positive
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    u = _mid_ranks(scores)[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(u / (n_positive * n_negative))


def macro_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Returns the mean over classes of the one-vs-rest `auc` of column k for the label k.

    A class that no row, or every row, belongs to has no AUC and is left out of the mean: a small
    split that lacks a rare class still gets a number, over the classes that it can measure. NaN
    only if that leaves none.

    Args:
      scores: [n, c] real numbers, one column per class; they need not be probabilities.
      labels: [n] integers in [0, c).

    Raises:
      ValueError: shapes disagree, a score is NaN, or a label is no class index.
    """
    scores, labels = _class_scores(scores, labels)
    per_class = [auc(column, labels == k) for k, column in enumerate(scores.T)]
    defined = [value for value in per_class if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """Returns the fraction of rows whose highest score is that of their label.

    Of tied scores the first class counts as the highest, as in `argmax`. NaN without rows.

    Args:
      scores: [n, c] real numbers, one column per class.
      labels: [n] integers in [0, c).

    Raises:
      ValueError: shapes disagree, a score is NaN, or a label is no class index.
    """
    scores, labels = _class_scores(scores, labels)
    return float(np.mean(scores.argmax(axis=1) == labels)) if len(labels) else float("nan")


def _mid_ranks(scores):
    """Ranks from 1, equal scores sharing the mean of theirs."""
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _scores(scores, ndim):
    scores = np.asarray(scores, np.float64)
    if scores.ndim != ndim:
        expected = "[n]" if ndim == 1 else "[n, classes]"
        raise ValueError(
            f"scores has shape {scores.shape}; expected {expected}. Use auc for one score per row,"
            " macro_auc or accuracy for one column per class."
        )
    if nans := int(np.isnan(scores).sum()):
        raise ValueError(
            f"scores contains {nans} NaN of {scores.size}; expected numbers. Find out why the model"
            " produced them (unreadable image, overflow), or drop those rows."
        )
    return scores


def _check_length(scores, labels):
    if labels.shape != scores.shape[:1]:
        raise ValueError(
            f"labels has shape {labels.shape} and scores {scores.shape}; expected labels of shape"
            f" {scores.shape[:1]}. Pass one label for each row of scores."
        )


def _class_scores(scores, labels):
    scores, labels = _scores(scores, ndim=2), np.asarray(labels)
    _check_length(scores, labels)
    classes = scores.shape[1]
    if not np.issubdtype(labels.dtype, np.integer) or np.any((labels < 0) | (labels >= classes)):
        raise ValueError(
            f"labels is {labels.dtype} with values {np.unique(labels)[:8]}; expected integers from"
            f" 0 to {classes - 1}, the columns of scores. Map class names to column numbers first."
        )
    return scores, labels
