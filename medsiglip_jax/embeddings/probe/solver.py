"""The optimum of several logistic regressions at once, by L-BFGS with one factorisation.

The regressions share their features, so that a step of all of them is a product of matrices. The
features are rotated to their principal axes once. There the Hessian of every regression, for every
strength of regularisation, is nearly diagonal, and its diagonal preconditions L-BFGS (Nocedal and
Wright, Numerical Optimization, 2006, algorithm 7.4). The ten strengths of `logistic` for 4,096 rows
of 1,152 numbers and 14 findings take a tenth of the time of scikit-learn's solver
(`scripts/bench.py probe`), which has to fit them one after the other; the optimum is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from scipy import linalg, special

_MEMORY = 10  # pairs that L-BFGS remembers
_MOST_STEPS = 2_000  # the largest strength of 4,096 x 1,152 takes 323
_MOST_TRIALS = 10  # step lengths per step; two are enough on average
_FLAT = 0.1  # share of the slope that may remain along a step
# Of the estimated distance of the mean loss from its minimum.
_TOLERANCE = 1e-12
# Principal axes whose share of the largest variance is less are rounding noise.
_NOISE = 1e-14


@dataclass(frozen=True, eq=False)
class Rotated:
    """Centred features in the basis of their principal axes, and a last column of ones.

    Attributes:
        rows: the features of n rows along r axes; there are at most n - 1 of them, and d.
        spectrum: the mean square of each column.
        mean: that was subtracted.
        axes: the principal axes.
    """

    rows: Float64[np.ndarray, "n r1"]
    spectrum: Float64[np.ndarray, "r1 1"]
    mean: Float64[np.ndarray, " d"]
    axes: Float64[np.ndarray, "d r"]

    def restored(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients [k, d] and intercepts [k] for the features as they were."""
        coefficients = (self.axes @ weights[:-1]).T
        return coefficients, weights[-1] - coefficients @ self.mean


class Problem(NamedTuple):
    """What is minimised, for k regressions.

    Attributes:
        features: of the rows.
        labels: 0 and 1, any number where unknown.
        known: which labels count.
        exclusive: whether the columns are the classes of one multinomial regression.
    """

    features: Rotated
    labels: Float64[np.ndarray, "n k"]
    known: Bool[np.ndarray, "n k"]
    exclusive: bool

    def select(self, columns: np.ndarray) -> "Problem":
        """Some of several binary regressions."""
        labels, known = self.labels[:, columns], self.known[:, columns]
        return self._replace(labels=labels, known=known)

    @property
    def start(self) -> Float64[np.ndarray, "r1 k"]:
        """Weights of zero."""
        return np.zeros((self.features.rows.shape[1], self.labels.shape[1]))


def rotate(features: Float64[np.ndarray, "n d"]) -> Rotated:
    """Rotates features to their principal axes; no distance between two rows changes."""
    mean = features.mean(axis=0)
    x = features - mean
    n, d = x.shape
    if n > d:
        squares, axes = linalg.eigh(x.T @ x)
    else:
        _, lengths, transposed = linalg.svd(x, full_matrices=False)
        squares, axes = lengths**2, transposed.T
    kept = squares > max(_NOISE * squares.max(initial=0), 0)
    rows = np.concatenate([x @ axes[:, kept], np.ones((n, 1))], axis=1)
    spectrum = np.append(squares[kept] / n, 1.0)[:, None]
    return Rotated(rows, spectrum, mean, axes[:, kept])


def minimize(problem: Problem, strength: float, start: np.ndarray) -> Float64[np.ndarray, "r1 k"]:
    """The weights that minimise the sum of losses times `strength` plus half the squared length.

    That is scikit-learn's LogisticRegression(C=strength): the intercept, the last weight, is not
    regularised, and the loss of exclusive classes is multinomial.

    Args:
        problem: what to minimise.
        strength: the inverse strength of regularisation, C.
        start: weights to start from.
    """
    loss = _Loss(problem, strength)
    weights, logits = start.copy(), problem.features.rows @ start
    errors = loss.errors(logits)
    gradient, scale = loss.gradient(errors, weights), loss.scale(logits)
    inner, memory = loss.inner, _Memory(loss.inner)
    for _ in range(_MOST_STEPS):
        open_ = inner(gradient, scale * gradient) > _TOLERANCE
        if not open_.any():
            break
        step = np.where(open_, -memory.times(gradient, scale), 0)
        along = problem.features.rows @ step
        length, errors = loss.search(logits, along, weights, step, inner(gradient, step))
        weights = weights + length * step
        logits += length * along
        previous, gradient = gradient, loss.gradient(errors, weights)
        memory.add(length * step, gradient - previous)
    return weights


class _Loss:
    """The mean loss of each regression, regularised."""

    def __init__(self, problem: Problem, strength: float):
        self.problem = problem
        self.all_known = bool(problem.known.all())
        self.count = problem.known.sum(axis=0, keepdims=True)
        penalised = np.ones_like(problem.features.spectrum)
        penalised[-1] = 0
        self.ridge = penalised / (strength * self.count)
        # A multinomial regression has one step length for all of its columns.
        self.axes = (0, 1) if problem.exclusive else (0,)
        self.probabilities: Callable[[np.ndarray], np.ndarray] = (
            (lambda logits: special.softmax(logits, axis=1)) if problem.exclusive else special.expit
        )

    def inner(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The inner product of each regression."""
        return (first * second).sum(axis=self.axes, keepdims=True)

    def errors(self, logits: np.ndarray) -> np.ndarray:
        """The derivative of the loss of each row by its logit, divided by the number of rows."""
        errors = self.probabilities(logits) - self.problem.labels
        return (errors if self.all_known else errors * self.problem.known) / self.count

    def gradient(self, errors: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return self.problem.features.rows.T @ errors + self.ridge * weights

    def scale(self, logits: np.ndarray) -> np.ndarray:
        """The inverse of the diagonal of the Hessian, as if all rows had the mean curvature."""
        p = self.probabilities(logits)
        curvature = (p * (1 - p) * self.problem.known).sum(axis=0, keepdims=True) / self.count
        return 1 / (np.maximum(curvature, 1e-8) * self.problem.features.spectrum + self.ridge)

    def search(
        self, logits: np.ndarray, along: np.ndarray, weights: np.ndarray, step: np.ndarray,
        slope: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Step lengths at which the slope is a tenth of what it was, and the errors there.

        The loss is convex, so its slope grows along the step: secants find where it is zero, from
        both sides as soon as both are known.
        """
        linear, square = self.inner(self.ridge * weights, step), self.inner(self.ridge * step, step)
        low, low_slope = np.zeros_like(slope), slope
        high, high_slope = np.full_like(slope, np.inf), np.ones_like(slope)
        length, errors = np.ones_like(slope), self.errors(logits + along)
        for _ in range(_MOST_TRIALS):
            here = self.inner(errors, along) + linear + length * square
            flat = np.abs(here) <= _FLAT * np.abs(slope)
            if flat.all():
                break
            below = here < 0
            low, low_slope = np.where(below, length, low), np.where(below, here, low_slope)
            high, high_slope = np.where(below, high, length), np.where(below, high_slope, here)
            length = np.where(flat, length, _between(low, low_slope, high, high_slope))
            errors = self.errors(logits + length * along)
        return length, errors


def _between(low, low_slope, high, high_slope) -> np.ndarray:
    """Where the secant is zero, away from the ends; three times as far without an upper end."""
    width = np.where(np.isinf(high), 0, high - low)
    share = low_slope / np.minimum(low_slope - high_slope, -np.finfo(float).tiny)
    inside = low + width * np.clip(share, 0.05, 0.95)
    return np.where(np.isinf(high), 3 * low, inside)


class _Memory:
    """The last steps and the changes of the gradient, which estimate the inverse Hessian."""

    def __init__(self, inner: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        self.inner = inner
        self.pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, step: np.ndarray, change: np.ndarray) -> None:
        """Remembers a step; one without curvature, as of a finished regression, has no weight."""
        curvature = self.inner(step, change)
        weight = np.where(curvature > 0, 1 / np.where(curvature > 0, curvature, 1), 0)
        self.pairs = [*self.pairs[1 - _MEMORY :], (step, change, weight)]

    def times(self, gradient: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The estimated inverse Hessian times the gradient: the two loops of L-BFGS."""
        vector, shares = gradient.copy(), []
        for step, change, weight in reversed(self.pairs):
            shares.append(weight * self.inner(step, vector))
            vector -= shares[-1] * change
        vector *= scale
        for (step, change, weight), share in zip(self.pairs, reversed(shares), strict=True):
            vector += (share - weight * self.inner(change, vector)) * step
        return vector
