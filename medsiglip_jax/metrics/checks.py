"""Checks of the arguments of metrics; messages say what is wrong where, and what to do."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import ArrayLike


class Known(NamedTuple):
    """The rows whose label is known.

    Attributes:
      scores: the scores of these rows.
      positive: their labels.
      rows: True for these rows, among all that were given.
      missing: the number of rows left out.
    """

    scores: Float64[np.ndarray, " n"]
    positive: Bool[np.ndarray, " n"]
    rows: Bool[np.ndarray, " all"]
    missing: int


def known(scores: ArrayLike, labels: ArrayLike) -> Known:
    """Leaves out the rows without a label and counts them.

    Args:
      scores: [n] real numbers.
      labels: [n] of 0 and 1, and NaN, None or -1 where the label is unknown.

    Raises:
      ValueError: the shapes differ, a score is NaN (even in a row without a label), or a label is
        something else.
    """
    scores, labels = real_scores(scores, ndim=1), np.asarray(labels)
    check_length(scores, labels)
    values = np.asarray(labels, np.float64)
    rows = ~(np.isnan(values) | (values == -1))
    positive = zeros_and_ones(values[rows])
    return Known(scores[rows], positive, rows, int((~rows).sum()))


def binary(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns float64 scores [n] and bool labels [n], or raises ValueError."""
    scores, labels = real_scores(scores, ndim=1), np.asarray(labels)
    check_length(scores, labels)
    return scores, zeros_and_ones(labels)


def zeros_and_ones(labels: np.ndarray) -> np.ndarray:
    """Returns as bool labels that are all 0 or 1, or raises ValueError."""
    positive = labels == 1
    if not np.all(positive | (labels == 0)):
        odd = labels[~(positive | (labels == 0))][0]
        raise ValueError(
            f"labels contains {odd!r}; expected only 0 and 1, or bool. Drop the uncertain or"
            " unlabelled rows (metrics.known does, and counts them), or map them to 0 or 1."
        )
    return positive


def real_scores(scores: ArrayLike, ndim: int) -> np.ndarray:
    """Returns float64 scores with `ndim` axes and no NaN, or raises ValueError."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim != ndim:
        expected = "[n]" if ndim == 1 else "[n, classes]"
        raise ValueError(
            f"scores has shape {scores.shape}; expected {expected}. Use auc for one score per row,"
            " macro_auc or accuracy for one column per class."
        )
    if nans := int(np.isnan(scores).sum()):
        first = np.argwhere(np.isnan(scores))[0].tolist()
        where = f"row {first[0]}" + (f", column {first[1]}" if ndim == 2 else "")
        raise ValueError(
            f"scores contains {nans} NaN of {scores.size}, the first at {where}; expected numbers."
            " Find out why (unreadable image, overflow in the model), or drop those rows."
        )
    return scores


def probabilities(values: ArrayLike, ndim: int = 1) -> np.ndarray:
    """Returns float64 scores that all lie in [0, 1], or raises ValueError."""
    values = real_scores(values, ndim)
    outside = np.argwhere((values < 0) | (values > 1))
    if len(outside):
        raise ValueError(
            f"probabilities contains {values[tuple(outside[0])]:.6g} at row {outside[0][0]}"
            f" ({len(outside)} are outside of [0, 1]). Use fit_temperature or fit_platt first."
        )
    return values


def check_length(scores: np.ndarray, labels: np.ndarray) -> None:
    """Raises ValueError unless there is one label per row."""
    if labels.shape != scores.shape[:1]:
        raise ValueError(
            f"labels has shape {labels.shape} and scores {scores.shape}; expected labels of shape"
            f" {scores.shape[:1]}, one label for each row of scores."
        )


def codes(name: str, values: ArrayLike, n: int) -> np.ndarray:
    """Returns the number of the distinct value of each of n rows, or raises ValueError."""
    values = np.asarray(values)
    if values.shape != (n,):
        raise ValueError(f"{name} has shape {values.shape}; expected ({n},), one for each row")
    return np.unique(values, return_inverse=True)[1]


def units_of(groups: ArrayLike | None, n: int) -> tuple[np.ndarray, int]:
    """Returns the number of the patient of each of n rows, and how many there are.

    Without groups every row is a patient.
    """
    if groups is None:
        return np.arange(n), n
    units = codes("groups", groups, n)
    return units, int(units.max(initial=-1)) + 1


def fewest_units(positive: np.ndarray, groups: ArrayLike | None) -> int:
    """Returns the number of patients among the positives, or the negatives if theirs is smaller."""
    units, _ = units_of(groups, len(positive))
    return min(len(np.unique(units[mine])) for mine in (positive, ~positive))


def class_scores(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns float64 scores [n, c] and labels [n] that are columns, or raises ValueError."""
    scores, labels = real_scores(scores, ndim=2), np.asarray(labels)
    check_length(scores, labels)
    classes = scores.shape[1]
    if not np.issubdtype(labels.dtype, np.integer) or np.any((labels < 0) | (labels >= classes)):
        raise ValueError(
            f"labels is {labels.dtype} with values {np.unique(labels)[:8]}; expected integers from"
            f" 0 to {classes - 1}, the columns of scores. Map class names to column numbers first."
        )
    return scores, labels


def check_level(level: float) -> None:
    """Raises ValueError unless a confidence level lies between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected more than 0 and less than 1, such as 0.95")
