"""Confidence intervals, those of proportions, and p-values adjusted for several tests."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import ArrayLike
from scipy import special

from medsiglip_jax.metrics.checks import check_level, codes


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence limits; `x in interval` is whether x lies between them.

    Attributes:
      value: the estimate; NaN where it is undefined.
      low: the lower limit; NaN where it cannot be estimated.
      high: the upper limit, likewise.
      dropped: number of bootstrap resamples that the limits ignore, as the estimate was undefined.
    """

    value: float
    low: float
    high: float
    dropped: int = 0

    def __contains__(self, x: float) -> bool:
        return bool(self.low <= x <= self.high)


def normal_quantile(level: float) -> float:
    """The standard errors that a two-sided interval of that level reaches: 1.96 for 0.95."""
    check_level(level)
    return float(special.ndtri(0.5 + level / 2))


def wilson(successes: int, total: int, level: float = 0.95) -> Interval:
    """Returns the score interval of a proportion; NaN if `total` is 0.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927), 209; without continuity correction.

    Raises:
      ValueError: `successes` is not from 0 to `total`, or `level` is out of range.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}; expected 0 to {total} successes")
    z = normal_quantile(level)
    if total == 0:
        return Interval(np.nan, np.nan, np.nan)
    return _score_interval(successes / total, total, z)


def proportion(
    hits: Bool[np.ndarray, " n"], groups: ArrayLike | None = None, level: float = 0.95
) -> Interval:
    """Returns the share of rows that are hits, with its interval; NaN without rows.

    Without groups it is `wilson`. The rows of one group, such as a patient, are alike and tell less
    than rows of different groups. Wilson's interval is then computed for the effective number of
    independent rows, p (1 - p) / (variance of p between groups), with Student's t, as Korn and
    Graubard, Survey Methodology 24 (1998), 193, do for another interval. That number is at most the
    number of rows; where groups do not differ, it is the number of groups, without Student's t.
    Unlike the bootstrap, this interval has a width where nothing or everything is a hit, and it
    needs no draws. It is NaN for a single group of several rows.

    Args:
      hits: whether each row is a hit.
      groups: [n] the group of each row; groups are independent of each other.
      level: confidence level.

    Raises:
      ValueError: `groups` is not [n], or `level` is out of range.
    """
    n = len(hits)
    check_level(level)
    if n == 0 or groups is None:
        return wilson(int(hits.sum()), n, level)
    units = codes("groups", groups, n)
    p, count = float(hits.mean()), int(units.max()) + 1
    if count == 1 < n:
        return Interval(p, np.nan, np.nan)
    apart = np.bincount(units, hits * n - hits.sum()) / n  # exactly 0 where it should be
    squares = float((apart**2).sum()) / n**2
    if not squares:
        return _score_interval(p, count, normal_quantile(level))
    variance = squares * correction_of_sizes(np.bincount(units))
    reach = float(special.stdtrit(count - 1, 0.5 + level / 2))
    return _score_interval(p, min(n, p * (1 - p) / variance), reach)


def mean(values: ArrayLike, groups: ArrayLike | None = None, level: float = 0.95) -> Interval:
    """Returns the mean of rows with Student's t interval; NaN without rows.

    With groups, such as patients, the variance is that of their sums, with the correction of
    `correction_of_sizes`. The interval is NaN for a single group.

    Args:
      values: [n], such as the overlap of two regions in each image.
      groups: [n] the group of each row; groups are independent of each other.
      level: confidence level.

    Raises:
      ValueError: `groups` is not [n], or `level` is out of range.
    """
    values = np.asarray(values, np.float64)
    check_level(level)
    n = len(values)
    if not n:
        return Interval(np.nan, np.nan, np.nan)
    units = np.arange(n) if groups is None else codes("groups", groups, n)
    value, count = float(values.mean()), int(units.max()) + 1
    if count == 1:
        return Interval(value, np.nan, np.nan)
    apart = np.bincount(units, values - value) / n
    variance = float((apart**2).sum()) * correction_of_sizes(np.bincount(units))
    half = float(special.stdtrit(count - 1, 0.5 + level / 2)) * np.sqrt(variance)
    return Interval(value, value - float(half), value + float(half))


def correction_of_sizes(rows: Int64[np.ndarray, " k"]) -> float:
    """Bessel's correction for a mean over k > 1 patients with so many rows.

    Of the squares of w (x - mean), w being the shares of the rows and x of equal variance, the
    expected sum is that of w^2 (1 - 2 w + the sum of w^2). Of equal shares the correction is
    k / (k - 1); of two patients with 3 and 1 rows it is 4.4 instead of 2.
    """
    w = rows / rows.sum()
    second, third = float((w**2).sum()), float((w**3).sum())
    return second / (second * (1 + second) - 2 * third)


def _score_interval(p: float, total: float | int, z: float) -> Interval:
    weight = z * z / total
    centre = (p + weight / 2) / (1 + weight)
    half = z / (1 + weight) * np.sqrt(p * (1 - p) / total + weight / (4 * total))
    low = 0.0 if p == 0 else float(centre - half)
    high = 1.0 if p == 1 else float(centre + half)
    return Interval(p, low, high)


def holm(p: ArrayLike) -> Float64[np.ndarray, " k"]:
    """Returns p-values adjusted for several tests, so that any false rejection stays as rare.

    Source: Holm, Scand. J. Stat. 6 (1979), 65. The p-value NaN of an undefined test stays NaN and
    does not count as a test.

    Args:
      p: [k] p-values of the tests, in any order.

    Raises:
      ValueError: `p` is not [k], or a value is outside of [0, 1].
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or np.any((p < 0) | (p > 1)):
        raise ValueError(f"p is {p}; expected one p-value from 0 to 1 for each test")
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return adjusted
