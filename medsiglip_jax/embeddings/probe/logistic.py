"""Logistic regression by scikit-learn, its regularisation strength chosen on validation rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy import special

from medsiglip_jax import metrics

# The number of a class, -1 unknown; or for several findings 0, 1 and NaN for unknown.
Labels = Int[np.ndarray, " _"] | Float[np.ndarray, "_ c"]

# Inverse regularisation strengths (C) to choose from, ascending, for features of mean square 1.
STRENGTHS = tuple(10.0**k for k in range(-6, 4))
_ITERATIONS = 10_000
_TOLERANCE = 1e-5
# Fits with large C are slow: those above 0.1 take 11.6 of 12.7 s for 4,096 x 1152.
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


def fit(train: Labelled, validation: Labelled, classes: int) -> Fitted:
    """Fits one multinomial regression, or for findings (labels [n, c]) a binary one each.

    For every C of `STRENGTHS`, L-BFGS finds the optimum, starting from that of the C before; the
    problem is convex, so the solver makes no difference. The C with the highest validation AUC
    (macro, one against the rest) is chosen, among equals the one with the lowest loss; without a
    validation AUC, the middle one. C grows until three in a row are worse than the best.

    Args:
        train: features of equal scale.
        validation: likewise.
        classes: number of classes or findings.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: the known training rows are all of one class.
    """
    if train.labels.ndim == 1:
        return _fit_exclusive(train, validation, classes)
    fits = [_fit_finding(train, validation, k) for k in range(classes)]
    coefficients, intercepts, chosen = zip(*fits, strict=True)
    return Fitted(np.stack(coefficients), np.array(intercepts), chosen)


def _fit_exclusive(train: Labelled, validation: Labelled, classes: int) -> Fitted:
    x, y = _known(train)
    present = np.unique(y)
    if len(present) < 2:
        raise ValueError(f"{len(y)} training rows with a label, of {len(present)} class; 2 needed")
    xv, yv = _known(validation)

    def expanded(w, b):
        if len(present) == 2:  # one row, of the second class against the first
            w, b = np.concatenate([0 * w, w]), np.append(0, b)
        coefficients, intercepts = np.zeros((classes, x.shape[1])), np.full(classes, -np.inf)
        coefficients[present], intercepts[present] = w, b
        return coefficients, intercepts

    def value(w, b):
        w, b = expanded(w, b)
        logits = xv @ w.T + b
        loss = -special.log_softmax(logits, axis=1)[np.arange(len(yv)), yv].mean()
        return metrics.macro_auc(special.softmax(logits, axis=1), yv), loss

    w, b, strength = _search(x, y, value)
    return Fitted(*expanded(w, b), (strength,) * classes)


def _fit_finding(train: Labelled, validation: Labelled, k: int):
    x, y = _known(train, k)
    if len(np.unique(y)) < 2:
        return np.full(x.shape[1], np.nan), np.nan, np.nan
    xv, yv = _known(validation, k)

    def value(w, b):
        logits = xv @ w[0] + b[0]
        return metrics.auc(logits, yv), np.logaddexp(0, np.where(yv, -logits, logits)).mean()

    w, b, strength = _search(x, y, value)
    return w[0], b[0], strength


def _known(rows: Labelled, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the rows whose label, for finding k, is known."""
    labels = rows.labels if k is None else rows.labels[:, k]
    known = labels >= 0  # False for NaN
    return (rows.vectors if known.all() else rows.vectors[known]), labels[known].astype(np.int64)


def _search(
    x: np.ndarray, y: np.ndarray, value: Callable[..., tuple[float, float]]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Coefficients and intercepts of the best C, and that C; each fit starts from the last.

    It runs on one thread: products with a vector are as fast as memory is, and where other
    processes keep a core busy, two threads wait for each other (104 s instead of 12.7).

    Args:
        x, y: features and labels of the training rows.
        value: AUC and loss on the validation rows, of coefficients and intercepts.
    """
    regression, threads = installed()
    model, fits, values = regression(warm_start=True, max_iter=_ITERATIONS, tol=_TOLERANCE), [], []
    with threads(1):
        for strength in STRENGTHS:
            model.set_params(C=strength).fit(x, y)
            fits.append((model.coef_.copy(), model.intercept_.copy(), strength))
            values.append(value(*fits[-1][:2]))
            if all(auc < max(values)[0] for auc, _ in values[-_PATIENCE:]):
                break
    aucs, losses = np.array(values).T
    if np.isnan(aucs).all():
        return fits[len(fits) // 2]
    best = np.flatnonzero(aucs == np.nanmax(aucs))
    return fits[best[np.argmin(losses[best])]]


def installed() -> tuple[Any, Any]:
    """scikit-learn's LogisticRegression, and threadpoolctl's limit of threads.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits  # scikit-learn depends on it
    except ImportError:
        raise ModuleNotFoundError(
            "fitting a probe needs scikit-learn; pip install 'medsiglip-jax[evaluate]'"
        ) from None
    return LogisticRegression, threadpool_limits
