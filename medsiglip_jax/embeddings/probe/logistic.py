"""Logistic regression, its regularisation strength chosen on validation rows."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy import special

from medsiglip_jax import metrics
from medsiglip_jax.embeddings.probe import solver
from medsiglip_jax.embeddings.probe.solver import Problem

# The number of a class, -1 unknown; or for several findings 0, 1 and NaN for unknown.
Labels = Int[np.ndarray, " _"] | Float[np.ndarray, "_ c"]

# Inverse regularisation strengths (C) to choose from, ascending, for features of mean square 1.
STRENGTHS = tuple(10.0**k for k in range(-6, 4))
# Fits with large C are slow: those above 0.1 take nine tenths of the time.
_PATIENCE = 3


class Fitted(NamedTuple):
    """The regression of each class.

    Attributes:
        coefficients: NaN for a finding that all training rows have, or none.
        intercepts: NaN likewise; -inf for an exclusive class without training rows.
        strengths: the C chosen for each class; exclusive classes share one.
    """

    coefficients: Float64[np.ndarray, "c d"]
    intercepts: Float64[np.ndarray, " c"]
    strengths: tuple[float, ...]


class Labelled(NamedTuple):
    """Vectors, or features made of them, with one label each or one for each finding."""

    vectors: Float[np.ndarray, "_ d"]
    labels: Labels


def fit(
    train: Labelled, validation: Labelled, classes: int, strengths: Sequence[float] = STRENGTHS
) -> Fitted:
    """Fits one multinomial regression, or for findings (labels [n, c]) a binary one each.

    For every C, `solver` finds the optimum, starting from that of the C before; the problem is
    convex, so the solver makes no difference. The C with the highest validation AUC (macro, one
    against the rest) is chosen, among equals the one with the lowest loss; without a validation
    AUC, the middle one. C grows until three in a row are worse than the best.

    Args:
        train: features of equal scale.
        validation: likewise.
        classes: number of classes or findings.
        strengths: C to choose from, ascending; of a single one, validation chooses nothing.

    Raises:
        ValueError: the known training rows are all of one class.
    """
    if train.labels.ndim == 1:
        return _fit_exclusive(train, validation, classes, strengths)
    return _fit_findings(train, validation, classes, strengths)


# ----------------------------------------------------------------------------- exclusive classes


def _fit_exclusive(
    train: Labelled, validation: Labelled, classes: int, strengths: Sequence[float]
) -> Fitted:
    x, y = _known(train)
    present = np.unique(y)
    if len(present) < 2:
        raise ValueError(f"{len(y)} training rows with a label, of {len(present)} class; 2 needed")
    xv, yv = _known(validation)

    def expanded(w, b):
        if len(present) == 2:  # one regression, of the second class against the first
            w, b = np.concatenate([0 * w, w]), np.append(0, b)
        coefficients, intercepts = np.zeros((classes, x.shape[1])), np.full(classes, -np.inf)
        coefficients[present], intercepts[present] = w, b
        return coefficients, intercepts

    def value(w, b):
        if not len(yv):
            return [(np.nan, np.nan)]
        w, b = expanded(w, b)
        logits = xv @ w.T + b
        loss = -special.log_softmax(logits, axis=1)[np.arange(len(yv)), yv].mean()
        return [(metrics.macro_auc(special.softmax(logits, axis=1), yv), loss)]

    several = len(present) > 2
    of_classes = (y[:, None] == (present if several else present[1:])).astype(np.float64)
    problem = Problem(solver.rotate(x), of_classes, np.ones(of_classes.shape, bool), several)
    w, b, (strength,) = _search(problem, strengths, lambda w, b, _: value(w, b))
    return Fitted(*expanded(w, b), (strength,) * classes)


def _known(rows: Labelled) -> tuple[np.ndarray, np.ndarray]:
    """Features and class numbers of the rows whose class is known."""
    known = rows.labels >= 0
    return (rows.vectors if known.all() else rows.vectors[known]), rows.labels[known].astype(int)


# -------------------------------------------------------------------------------------- findings


def _fit_findings(
    train: Labelled, validation: Labelled, classes: int, strengths: Sequence[float]
) -> Fitted:
    labels = np.asarray(train.labels, np.float64)
    both = np.flatnonzero((labels == 0).any(axis=0) & (labels == 1).any(axis=0))
    coefficients = np.full((classes, train.vectors.shape[1]), np.nan)
    intercepts, chosen = np.full(classes, np.nan), np.full(classes, np.nan)
    if len(both):
        rows = (labels[:, both] >= 0).any(axis=1)  # rows without a label tell nothing
        x, y = (train.vectors, labels) if rows.all() else (train.vectors[rows], labels[rows])
        known = y[:, both] >= 0  # False for NaN
        problem = Problem(solver.rotate(x), np.nan_to_num(y[:, both]), known, False)

        def values(w, b, columns):
            logits = validation.vectors @ w.T + b
            labels_of = validation.labels.T[both[columns]]
            return [_value(*pair) for pair in zip(logits.T, labels_of, strict=True)]

        coefficients[both], intercepts[both], chosen[both] = _search(problem, strengths, values)
    return Fitted(coefficients, intercepts, tuple(chosen.tolist()))


def _value(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """AUC and mean loss of one finding on the validation rows that have a label of it."""
    rows = labels >= 0
    if not rows.any():
        return np.nan, np.nan
    logits, positive = logits[rows], labels[rows] == 1
    loss = np.logaddexp(0, np.where(positive, -logits, logits)).mean()
    return metrics.auc(logits, positive), float(loss)


# ------------------------------------------------------------------------------------- strengths


class _Fit(NamedTuple):
    """One regression at one strength, and what it is worth on the validation rows."""

    auc: float
    loss: float
    coefficients: np.ndarray
    intercepts: np.ndarray
    strength: float


# (coefficients, intercepts, columns of the problem) -> AUC and loss of each regression.
_Values = Callable[[np.ndarray, np.ndarray, np.ndarray], list[tuple[float, float]]]


def _search(
    problem: Problem, strengths: Sequence[float], values: _Values
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Coefficients and intercepts at the best C of each regression, and these C.

    Each fit starts from the last, and a finding that is done is left out of the next.
    """
    every = np.arange(problem.labels.shape[1])
    columns = [every] if problem.exclusive else list(every[:, None])  # of each regression
    fits: list[list[_Fit]] = [[] for _ in columns]
    open_, weights = list(range(len(columns))), problem.start
    for strength in strengths:
        some = np.concatenate([columns[i] for i in open_])
        weights[:, some] = solver.minimize(problem.select(some), strength, weights[:, some])
        w, b = problem.features.restored(weights[:, some])
        for i, value in zip(open_, values(w, b, some), strict=True):
            own = np.isin(some, columns[i])
            fits[i].append(_Fit(*value, w[own], b[own], strength))
        open_ = [i for i in open_ if not _is_done(fits[i])]
        if not open_:
            break
    best = [_best(of_regression) for of_regression in fits]
    w, b = (np.concatenate(arrays) for arrays in zip(*(fit[2:4] for fit in best), strict=True))
    return w, b, [fit.strength for fit in best]


def _is_done(fits: Sequence[_Fit]) -> bool:
    """Whether the last few are all worse than the best."""
    best = max(fit.auc for fit in fits)
    return all(fit.auc < best for fit in fits[-_PATIENCE:])


def _best(fits: Sequence[_Fit]) -> _Fit:
    defined = [fit for fit in fits if not np.isnan(fit.auc)]
    if not defined:
        return fits[len(fits) // 2]
    return min(defined, key=lambda fit: (-fit.auc, fit.loss))
