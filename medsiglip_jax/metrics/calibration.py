"""Calibration of probabilities: measured, and fitted to scores."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike
from scipy import optimize, special

from medsiglip_jax.metrics.checks import (
    binary,
    check_level,
    class_scores,
    probabilities,
    units_of,
)
from medsiglip_jax.metrics.intervals import Interval

_LEAST = 1e-15  # probabilities of 0 and 1 have no log odds
# Condition of the information above which inverting it loses more than half of the digits.
_SINGULAR = 1e8


@dataclass(frozen=True)
class Reliability:
    """A reliability curve: the bins that hold any rows, by increasing probability.

    Attributes:
      predicted: mean probability in each bin.
      observed: fraction of positives in each bin.
      rows: number of rows in each bin.
    """

    predicted: Float64[np.ndarray, " b"]
    observed: Float64[np.ndarray, " b"]
    rows: Int64[np.ndarray, " b"]

    @property
    def error(self) -> float:
        """The expected calibration error: |observed - predicted|, weighted by rows."""
        if not len(self.rows):
            return float("nan")
        return float(np.average(np.abs(self.observed - self.predicted), weights=self.rows))


def reliability(
    predicted: ArrayLike, labels: ArrayLike, bins: int = 15, equal: str = "width"
) -> Reliability:
    """Returns the reliability curve of probabilities.

    Bins are those of scikit-learn's calibration_curve: a value on an edge belongs to the lower one.

    Args:
      predicted: [n] probabilities of being positive.
      labels: [n] bool, or numbers that are 0 or 1.
      bins: number of bins, including empty ones.
      equal: "width" (of [0, 1]), or "mass" for equally many rows in each bin, as far as ties allow.

    Raises:
      ValueError: as for `auc`, values outside of [0, 1], no bins, or an unknown `equal`.
    """
    p, positive = binary(probabilities(predicted), labels)
    if bins < 1 or equal not in ("width", "mass"):
        raise ValueError(
            f"bins is {bins} and equal {equal!r}; expected at least 1, and 'width' or 'mass'"
        )
    edges = np.linspace(0, 1, bins + 1)
    if equal == "mass" and len(p):
        edges = np.percentile(p, edges * 100)
    bin_of = np.searchsorted(edges[1:-1], p)
    rows = np.bincount(bin_of, minlength=bins)
    filled, n = rows > 0, rows[rows > 0]
    predicted, observed = (np.bincount(bin_of, x, bins)[filled] / n for x in (p, positive))
    return Reliability(predicted, observed, n)


def expected_calibration_error(
    predicted: ArrayLike, labels: ArrayLike, bins: int = 15, equal: str = "width"
) -> float:
    """Returns the mean distance of probabilities from observed fractions; 0 is calibrated.

    Source: Guo et al., arXiv 1706.04599, eq. 3 (15 bins of equal width); for bins of equal mass
    Nguyen and O'Connor, arXiv 1508.05154. It is biased upwards, the more the fewer rows a bin has,
    so compare it only for the same rows and bins. With several classes, apply `top_label` first.

    Args:
      predicted: [n] probabilities of being positive.
      labels: [n] bool, or numbers that are 0 or 1.
      bins: number of bins.
      equal: "width" or "mass", as in `reliability`.

    Returns:
      A number in [0, 1]; NaN without rows.

    Raises:
      ValueError: as for `reliability`.
    """
    return reliability(predicted, labels, bins, equal).error


def top_label(
    predicted: ArrayLike, labels: ArrayLike
) -> tuple[Float64[np.ndarray, " n"], np.ndarray]:
    """Returns the highest probability of each row, and whether its class is right.

    Args:
      predicted: [n, c] probabilities.
      labels: [n] integers in [0, c).

    Raises:
      ValueError: the shapes disagree, values outside of [0, 1], or a label is no class index.
    """
    p, labels = class_scores(probabilities(predicted, ndim=2), labels)
    return p.max(axis=1), p.argmax(axis=1) == labels


def brier(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Returns the mean squared distance of probabilities from the labels; lower is better.

    Source: Brier, Mon. Weather Rev. 78 (1950), 1. With a column per class it is summed over the
    classes, as in the source: from 0 to 2, and for two classes twice that of one column.

    Args:
      predicted: [n] probabilities of being positive, or [n, c] of each class.
      labels: [n] of 0 and 1, or for columns integers in [0, c).

    Returns:
      A number in [0, 2]; NaN without rows.

    Raises:
      ValueError: the shapes disagree, values outside of [0, 1], or a label is none of these.
    """
    if np.ndim(predicted) == 2:
        p, labels = class_scores(probabilities(predicted, ndim=2), labels)
        squares = (p - np.eye(p.shape[1])[labels]) ** 2
    else:
        p, positive = binary(probabilities(predicted), labels)
        squares = (p - positive)[:, None] ** 2
    return float(squares.sum(axis=1).mean()) if len(squares) else float("nan")


@dataclass(frozen=True)
class Temperature:
    """Calibration by one number: probabilities of `scores / value`, with every ranking kept.

    Attributes:
      value: above 1 if the scores were overconfident, below 1 if underconfident.
    """

    value: float

    def __call__(self, scores: ArrayLike) -> np.ndarray:
        """Sigmoid of [n] scores, or softmax over the classes of [n, c]."""
        x = np.asarray(scores, np.float64) / self.value
        return special.softmax(x, axis=1) if x.ndim == 2 else special.expit(x)


def fit_temperature(scores: ArrayLike, labels: ArrayLike) -> Temperature:
    """Finds the temperature with the highest likelihood; fit it on validation data.

    Source: Guo et al., arXiv 1706.04599, section 4.2. The log-likelihood is concave in
    1 / temperature; at the optimum the expected mean score equals that of the labels.

    Args:
      scores: [n] logits of being positive, or [n, c] of each class.
      labels: [n] of 0 and 1, or for columns integers in [0, c).

    Returns:
      A temperature between 1e-6 and 1e6 times the largest score; at these bounds if the scores are
      always right, or no better than chance.

    Raises:
      ValueError: the shapes disagree, no rows, an infinite score, or a label is none of these.
    """
    check = class_scores if np.ndim(scores) == 2 else binary
    x, labels = check(scores, labels)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"{len(x)} scores; a temperature needs at least one, and all finite")
    scale = np.abs(x).max() or 1.0
    observed = x[labels].sum() if x.ndim == 1 else x[np.arange(len(x)), labels].sum()

    def slope(log_inverse: float) -> float:
        expected = Temperature(float(scale * np.exp(-log_inverse)))(x) * x
        return (expected.sum() - observed) / (scale * len(x))

    low, high = -np.log(1e6), np.log(1e6)
    if slope(low) >= 0 or slope(high) <= 0:
        best = low if slope(low) >= 0 else high
    else:
        best = optimize.root_scalar(slope, bracket=(low, high), xtol=1e-13).root
    return Temperature(float(scale * np.exp(-best)))


@dataclass(frozen=True)
class Platt:
    """Calibration by a logistic curve: sigmoid(slope * score + intercept)."""

    slope: float
    intercept: float

    def __call__(self, scores: ArrayLike) -> Float64[np.ndarray, " n"]:
        """Probabilities of [n] scores."""
        return special.expit(self.slope * np.asarray(scores, np.float64) + self.intercept)


def fit_platt(scores: ArrayLike, labels: ArrayLike) -> Platt:
    """Fits a logistic curve from scores of any scale to labels; fit it on validation data.

    Source: Platt, in Advances in Large Margin Classifiers (1999), 61. The targets are
    (n+ + 1) / (n+ + 2) and 1 / (n- + 2), so that the curve is no step where the scores separate the
    labels.

    Args:
      scores: [n] real numbers, such as a difference of cosines.
      labels: [n] bool, or numbers that are 0 or 1.

    Raises:
      ValueError: as for `auc`, an infinite score, or only one of the two labels.
    """
    x, positive = binary(scores, labels)
    n_positive = int(positive.sum())
    if n_positive in (0, len(x)) or not np.isfinite(x).all():
        raise ValueError(
            f"{n_positive} positives in {len(x)} rows; a curve takes both labels and finite scores"
        )
    targets = np.where(positive, (n_positive + 1) / (n_positive + 2),
                       1 / (len(x) - n_positive + 2))  # fmt: skip
    centre, scale = x.mean(), x.std() or 1.0
    slope, intercept = _logistic((x - centre) / scale, targets)
    return Platt(float(slope / scale), float(intercept - slope * centre / scale))


@dataclass(frozen=True)
class Recalibration:
    """The logistic regression of labels on the log odds of probabilities.

    Attributes:
      slope: 1 is calibrated; below 1 the probabilities are too far from 1/2 (overconfident), below
        0 they order the rows the wrong way round.
      intercept: 0 is calibrated, if the slope is 1.
    """

    slope: Interval
    intercept: Interval


def recalibration(
    predicted: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
) -> Recalibration:
    """Returns how log odds would have to be changed for these labels; measured on test data.

    Source: Cox, Biometrika 45 (1958), 562. Intervals are Wald's with Student's t and a variance
    between patients (Liang and Zeger, Biometrika 73 (1986), 13).

    Args:
      predicted: [n] probabilities of being positive.
      labels: [n] bool, or numbers that are 0 or 1.
      groups: [n] patient of each row; by default rows are independent.
      level: confidence level.

    Returns:
      Slope and intercept; NaN where labels or probabilities are all the same, or a threshold
      (all but) separates the labels, so that no slope is steep enough. Limits are NaN for fewer
      than 3 patients.

    Raises:
      ValueError: as for `auc`, values outside of [0, 1], `groups` is not [n], or `level` is out of
        range.
    """
    p, positive = binary(probabilities(predicted), labels)
    check_level(level)
    units, size = units_of(groups, len(p))
    x = special.logit(np.clip(p, _LEAST, 1 - _LEAST))
    nothing = Interval(np.nan, np.nan, np.nan)
    if _separated(x, positive):
        return Recalibration(nothing, nothing)
    # Of standard scores, so that the information can be inverted where the curve is steep.
    centre, scale = x.mean(), x.std()
    columns = np.stack([(x - centre) / scale, np.ones_like(x)], axis=1)
    standard = np.array(_logistic(columns[:, 0], positive.astype(float)))
    fitted = special.expit(columns @ standard)
    information = columns.T @ (columns * (fitted * (1 - fitted))[:, None])
    if np.linalg.cond(information) > _SINGULAR:
        return Recalibration(nothing, nothing)
    bread = np.linalg.inv(information)
    pulls = columns * (positive - fitted)[:, None]
    sums = np.stack([np.bincount(units, pull, size) for pull in pulls.T])
    back = np.array([[1 / scale, 0], [-centre / scale, 1]])
    estimates, roots = back @ standard, back @ bread @ sums
    error = np.sqrt((roots**2).sum(axis=1) * size / max(1, size - 1))
    reach = (special.stdtrit(size - 2, 0.5 + level / 2) if size > 2 else np.nan) * error
    columns = zip(estimates.tolist(), reach.tolist(), strict=True)
    slope, intercept = (Interval(x, x - step, x + step) for x, step in columns)
    return Recalibration(slope, intercept)


def _separated(x: np.ndarray, positive: np.ndarray) -> bool:
    """Whether the logistic curve is a step, or nothing."""
    ours, theirs = x[positive], x[~positive]
    if not len(ours) or not len(theirs) or x.min() == x.max():
        return True
    return bool(ours.min() >= theirs.max() or theirs.min() >= ours.max())


def _logistic(x: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Slope and intercept with the lowest cross-entropy: where its gradient is 0, to all digits."""
    columns = np.stack([x, np.ones_like(x)], axis=1)

    def gradient(w: np.ndarray) -> np.ndarray:
        return columns.T @ (special.expit(columns @ w) - targets)

    def hessian(w: np.ndarray) -> np.ndarray:
        p = special.expit(columns @ w)
        return columns.T @ (columns * (p * (1 - p))[:, None])

    # Convex. It may report that it makes no more progress: the last digit is reached.
    return optimize.root(gradient, np.zeros(2), jac=hessian, tol=1e-12).x
