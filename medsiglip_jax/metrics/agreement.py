"""How often the class that a model names is the right one: accuracy, F1, kappa and the like.

All of it follows from the table of named against true classes. Intervals are the bootstrap's, over
whole patients; all figures come from the same resamples.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from medsiglip_jax.metrics.checks import class_scores
from medsiglip_jax.metrics.intervals import Interval, proportion
from medsiglip_jax.metrics.ranking import OfWeights, ratio
from medsiglip_jax.metrics.resampling import Resampling, intervals_of

_Tables = Float64[np.ndarray, "*b c c"]
_Values = Float64[np.ndarray, "*b"]


def top_k_accuracy(scores: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Returns the fraction of rows whose label is among the classes of the k highest scores.

    Of tied scores the first class counts as the highest, as in `accuracy`, which this is for k = 1.
    NaN without rows.

    Args:
      scores: [n, c] real numbers, one column per class.
      labels: [n] integers in [0, c).
      k: from 1 to c.

    Raises:
      ValueError: the shapes disagree, a score is NaN, a label is no class index, or `k` is out of
        range.
    """
    hits = top_k_hits(scores, labels, k)
    return float(hits.mean()) if len(hits) else float("nan")


def top_k_hits(scores: ArrayLike, labels: ArrayLike, k: int) -> np.ndarray:
    """Returns for each row whether `top_k_accuracy` counts it; arguments as there."""
    scores, labels = class_scores(scores, labels)
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k is {k} for {scores.shape[1]} classes; expected 1 to that number")
    first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return (first == labels[:, None]).any(axis=1)


def balanced_accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Returns the mean over classes of their recall: the share of their rows that are found.

    It is over the classes that `labels` has. NaN without rows.

    Args:
      predicted: [n] integers >= 0, the classes that a model names.
      labels: [n] integers >= 0, the true classes.

    Raises:
      ValueError: the shapes disagree, or a class is negative or no integer.
    """
    return _of_all(_balanced_accuracy, predicted, labels)


def macro_f1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Returns the unweighted mean over classes of F1, as scikit-learn does.

    F1 is the harmonic mean of precision and recall: 2 hits / (rows of the class + rows named so).
    The mean is over the classes that either `labels` or `predicted` has. Arguments, errors and NaN
    as for `balanced_accuracy`.
    """
    return _of_all(_macro_f1, predicted, labels)


def weighted_f1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Returns the mean over classes of F1, weighted by their rows, as scikit-learn does.

    Arguments, errors and NaN as for `balanced_accuracy`.
    """
    return _of_all(_weighted_f1, predicted, labels)


def matthews(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Returns Matthews' correlation of named and true classes: 1 agreement, 0 chance.

    Source: Gorodkin, Comput. Biol. Chem. 28 (2004), 367, for several classes. 0 where all named, or
    all true classes are the same, as in scikit-learn. Arguments and errors as for
    `balanced_accuracy`.
    """
    return _of_all(_matthews, predicted, labels)


def cohen_kappa(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Returns Cohen's kappa: 1 agreement, 0 that of independent classes with the same shares.

    Source: Cohen, Educ. Psychol. Meas. 20 (1960), 37. NaN if all classes are the same. Arguments
    and errors as for `balanced_accuracy`; `quadratic_kappa` is that of grades.
    """
    return _of_all(_cohen_kappa, predicted, labels)


def quadratic_kappa(grades: ArrayLike, labels: ArrayLike) -> float:
    """Returns Cohen's kappa with quadratic weights: 1 agreement, 0 chance.

    This is one minus the mean squared difference divided by that of independent grades, which needs
    no table: it is E[g^2] + E[l^2] - 2 E[g] E[l]. Source: Cohen, Psychol. Bull. 70 (1968), 213.

    Args:
      grades: [n] integers, such as the class of the highest score for diabetic retinopathy.
      labels: [n] integers, the true grades.

    Returns:
      A number up to 1; NaN without rows, or if all grades are the same.

    Raises:
      ValueError: the shapes disagree, or a grade is negative or no integer.
    """
    g, l = (x.astype(np.float64) for x in _classes(grades, labels))  # noqa: E741
    if not len(g):
        return float("nan")
    chance = (g * g).mean() + (l * l).mean() - 2 * g.mean() * l.mean()
    return float(1 - ((g - l) ** 2).mean() / chance) if chance > 0 else float("nan")


def class_figures(
    predicted: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Returns all figures of this module with intervals by patient.

    Args:
      predicted: [n] integers >= 0, the classes that a model names.
      labels: [n] integers >= 0, the true classes.
      groups, samples, seed, level: as for `bootstrap`.

    Returns:
      `accuracy` with the interval of `proportion`, `balanced_accuracy`, `macro_f1`, `weighted_f1`,
      `matthews`, `cohen_kappa` and `quadratic_kappa` with BCa limits. Where no resample differs
      from the data, as if all are right, limits are those of a proportion of 1 or 0: a figure from
      -1 to 1 is twice a share minus 1.

    Raises:
      ValueError: as for `balanced_accuracy` and `bootstrap`, or without rows.
    """
    of_weights = _all_of(predicted, labels)  # checks both
    right = np.asarray(predicted) == np.asarray(labels)
    resampling = Resampling(groups, None, samples, seed, level)
    figures = {"accuracy": proportion(right, groups, level)}
    intervals = intervals_of(of_weights, len(right), resampling)
    for name, interval in zip(_FIGURES, intervals, strict=True):
        figures[name] = interval
        if interval.low == interval.high == interval.value:
            figures[name] = _without_variance(name, interval.value, groups, len(right), level)
    return figures


def class_figures_pair(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Returns the figures of one model minus those of another on the same rows.

    Args:
      first: [n] integers >= 0, the classes that one model names.
      second: [n] those that the other names.
      labels: [n] the true classes.
      groups, samples, seed, level: as for `bootstrap`; both have the same resamples.

    Returns:
      The keys of `class_figures`, with BCa limits. Limits are NaN where no resample differs from
      the data although the models do.

    Raises:
      ValueError: as for `class_figures`.
    """
    one, other = (_all_of(predicted, labels, accuracy=True) for predicted in (first, second))
    resampling = Resampling(groups, None, samples, seed, level)
    n = len(np.asarray(labels))
    intervals = intervals_of(lambda w: one(w) - other(w), n, resampling)
    unmoved = [i.value != 0 and i.low == i.high == i.value for i in intervals]
    intervals = [
        replace(i, low=np.nan, high=np.nan) if still else i
        for i, still in zip(intervals, unmoved, strict=True)
    ]
    return dict(zip(("accuracy", *_FIGURES), intervals, strict=True))


# ----------------------------------------------------------------------- from tables [true, named]


def _balanced_accuracy(tables: _Tables) -> _Values:
    rows = tables.sum(-1)
    recalls = ratio(_hits(tables), rows)
    return ratio(np.nansum(recalls, -1), (rows > 0).sum(-1))


def _f1(tables: _Tables) -> tuple[np.ndarray, np.ndarray]:
    """F1 of each class, NaN where it has neither true nor named rows; and its true rows."""
    rows = tables.sum(-1)
    return ratio(2 * _hits(tables), rows + tables.sum(-2)), rows


def _macro_f1(tables: _Tables) -> _Values:
    f1, _ = _f1(tables)
    return ratio(np.nansum(f1, -1), (~np.isnan(f1)).sum(-1))


def _weighted_f1(tables: _Tables) -> _Values:
    f1, rows = _f1(tables)
    return ratio(np.nansum(f1 * rows, -1), rows.sum(-1))


def _matthews(tables: _Tables) -> _Values:
    true, named, n = tables.sum(-1), tables.sum(-2), tables.sum((-2, -1))
    above = _hits(tables).sum(-1) * n - (true * named).sum(-1)
    below = np.sqrt((n**2 - (true**2).sum(-1)) * (n**2 - (named**2).sum(-1)))
    return np.where(n > 0, np.divide(above, below, out=np.zeros_like(n), where=below > 0), np.nan)


def _cohen_kappa(tables: _Tables) -> _Values:
    return _kappa(tables, 1 - np.eye(tables.shape[-1]))


def _quadratic_kappa(tables: _Tables) -> _Values:
    grades = np.arange(tables.shape[-1])
    return _kappa(tables, (grades[:, None] - grades) ** 2.0)


def _kappa(tables: _Tables, weights: np.ndarray) -> _Values:
    """One minus the weighted disagreement divided by that of independent classes."""
    expected = tables.sum(-1)[..., None] * tables.sum(-2)[..., None, :]
    n = tables.sum((-2, -1))
    observed, chance = ((x * weights).sum((-2, -1)) for x in (tables, expected))
    return np.asarray(1 - ratio(n * observed, chance))


def _accuracy(tables: _Tables) -> _Values:
    return ratio(_hits(tables).sum(-1), tables.sum((-2, -1)))


def _hits(tables: _Tables) -> np.ndarray:
    return np.diagonal(tables, axis1=-2, axis2=-1)


_FIGURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _macro_f1,
    "weighted_f1": _weighted_f1,
    "matthews": _matthews,
    "cohen_kappa": _cohen_kappa,
    "quadratic_kappa": _quadratic_kappa,
}
_SIGNED = frozenset(("matthews", "cohen_kappa", "quadratic_kappa"))  # from -1 to 1


def _of_all(figure: Callable[[np.ndarray], np.ndarray], predicted, labels) -> float:
    pair = _classes(predicted, labels)
    names, numbers = np.unique(np.concatenate(pair), return_inverse=True)
    predicted, labels = numbers[: len(pair[0])], numbers[len(pair[0]) :]
    return float(figure(_tables_of(predicted, labels, len(names))(np.ones(len(labels)))))


def _all_of(predicted, labels, accuracy: bool = False) -> OfWeights:
    """weights -> [figures, ...]."""
    predicted, labels = _classes(predicted, labels)
    count = 1 + int(max(predicted.max(initial=0), labels.max(initial=0)))
    tables_of = _tables_of(predicted, labels, count)
    figures = [*([_accuracy] if accuracy else []), *_FIGURES.values()]

    def of_weights(weights) -> np.ndarray:
        tables = tables_of(weights)
        return np.stack([figure(tables) for figure in figures])

    return of_weights


def _classes(predicted: ArrayLike, labels: ArrayLike) -> list[np.ndarray]:
    """Named and true classes of rows, or a ValueError."""
    pair = [np.asarray(predicted), np.asarray(labels)]
    integral = all(x.ndim == 1 and np.issubdtype(x.dtype, np.integer) for x in pair)
    if not integral or len(pair[0]) != len(pair[1]) or any((x < 0).any() for x in pair):
        raise ValueError(
            f"predicted is {pair[0].dtype} {pair[0].shape}, labels {pair[1].dtype} "
            f"{pair[1].shape}; expected equally many integers >= 0, classes or grades. Leave out "
            "the rows without one first."
        )
    return pair


def _tables_of(predicted: np.ndarray, labels: np.ndarray, count: int) -> OfWeights:
    """weights of rows [..., n] -> tables of true against named classes [..., count, count]."""
    cell = labels.astype(np.int64) * count + predicted

    def tables(weights: np.ndarray) -> np.ndarray:
        rows = weights.reshape(int(np.prod(weights.shape[:-1])), len(cell))
        each = [np.bincount(cell, w, count**2) for w in rows]
        return np.array(each, np.float64).reshape(*weights.shape[:-1], count, count)

    return tables


def _without_variance(name: str, value: float, groups, n: int, level: float) -> Interval:
    share = (value + 1) / 2 if name in _SIGNED else value
    if share not in (0.0, 1.0):
        return Interval(value, np.nan, np.nan)
    limits = proportion(np.full(n, share == 1), groups, level)
    low, high = (2 * x - 1 if name in _SIGNED else x for x in (limits.low, limits.high))
    return Interval(value, low, high)
