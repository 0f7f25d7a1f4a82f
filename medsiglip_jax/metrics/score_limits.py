"""Limits and tests of AUCs, their means and their gaps, from how far these spread (`spread`)."""

import numpy as np
from scipy import optimize, special

from medsiglip_jax.metrics.intervals import Interval
from medsiglip_jax.metrics.spread import Total, binormal

# What Newcombe's variance weighs, in degrees of freedom, beside the estimated one, and the degrees
# that Student's t has beyond those of the estimated one. In 1,000 draws each of scores that are
# normal (of equal and of unequal variance), logistic or exponential, with 5, 10 or 30 positives,
# 500 negatives and AUCs of 0.8 to 0.99, the worst of 48 coverages was 90.0 %; with a weight of 4,
# and Newcombe's formula at the limits, it was 87.1 %.
PRIOR, FREEDOM = 2, 4
# Two scores of the same quality need six misordered pairs to differ at 5 %, all of one of them.
FEW_MISORDERED = 6
# Where the p-value of a gap is looked for: from 1e-12, below which nobody tells p-values apart.
_LOG_P = (-12 * np.log(10), 0.0)


def score_limits(total: Total, level: float) -> tuple[float, float]:
    """The AUCs from which the found one is as far as Student's t allows.

    As Wilson's interval, it takes the variance at the limit, not at the estimate, and so has a
    width where the AUC is 0 or 1. From the estimate to the limit the variance changes as that of
    `binormal`; at the estimate it is the estimated one, where `_expected` also counts for `PRIOR`
    degrees of freedom (Smyth, Stat. Appl. Genet. Mol. Biol. 3 (2004), 3). Few positives, or nearly
    all in perfect order, say little about the variance and have few degrees; then the formula
    decides, as it does for positives that are all tied.
    """
    value = total.value
    if np.isnan(total.variance) or np.isnan(value):
        return np.nan, np.nan
    if total.variance == 0 and 0 < value < 1:  # a constant score
        return value, value
    variance, degrees = _moderated(total)
    here = binormal(value, total.shape)
    factor = variance / here if here else 1.0
    reach = special.stdtrit(degrees + FREEDOM, 0.5 + level / 2) ** 2 * factor
    return _root(value, reach, total.shape), 1 - _root(1 - value, reach, total.shape)


def _moderated(total: Total) -> tuple[float, float]:
    """The estimated variance and the expected one in one; the degrees of the estimated one."""
    degrees = 0.0 if total.flat else total.degrees
    return (degrees * total.variance + PRIOR * total.expected) / (degrees + PRIOR), degrees


def _root(value: float, reach: float, shape: tuple[float, float]) -> float:
    """The lower AUC x with (value - x)^2 = reach * variance at x."""
    if value <= 0:
        return 0.0
    arguments = value, reach, shape
    top = min(value, 1 - 1e-12)  # 1 always solves it, but is no limit
    if _beyond(top, *arguments) >= 0:  # no reach
        return value
    return optimize.root_scalar(_beyond, args=arguments, bracket=(0.0, top), xtol=1e-14).root


def _beyond(x: float, value: float, reach: float, shape: tuple[float, float]) -> float:
    """Positive where x is too far below the value."""
    return (value - x) ** 2 - reach * binormal(x, shape)


def perfect_limit(total: Total, level: float) -> float:
    """The lower limit of an AUC of 1 with as many positives and negatives."""
    reach = special.stdtrit(FREEDOM, 0.5 + level / 2) ** 2
    return _root(1.0, reach, total.shape) if total.variance >= 0 else np.nan


def gap_limits(first: Total, second: Total, level: float) -> tuple[float, float]:
    """Limits of the difference of two AUCs, from the limits of both.

    Source: Zou, Stat. Med. 27 (2008), 1350 (MOVER), with the correlation of patients in both.
    """
    (low1, high1), (low2, high2) = (score_limits(total, level) for total in (first, second))
    down1, up1 = first.value - low1, high1 - first.value
    down2, up2 = second.value - low2, high2 - second.value
    difference, r = first.value - second.value, _correlation(first, second)
    return (
        difference - hypotenuse(down1, up2, r),
        difference + hypotenuse(up1, down2, r),
    )


def misordered(total: Total) -> float:
    """How many of the independent trials failed that would tell as much as the AUC.

    The number of trials is AUC (1 - AUC) / variance, as that of rows in `intervals.proportion`.
    """
    value = min(total.value, 1 - total.value)
    return value**2 * (1 - value) / _moderated(total)[0] if value else 0.0


def hypotenuse(x: float, y: float, r: float = 0.0) -> float:
    """The reach of a difference from those of two numbers with the correlation r."""
    return float(np.sqrt(np.maximum(x * x + y * y - 2 * r * x * y, 0.0)))  # NaN stays NaN


def _correlation(first: Total, second: Total) -> float:
    product = first.variance * second.variance
    if not product > 0:
        return 0.0
    return float(np.clip((first.pulls * second.pulls).sum() / np.sqrt(product), -1, 1))


def gap_p(first: Total, second: Total) -> float:
    """The two-sided p-value of no difference: 1 minus the level whose limit is 0."""
    difference = first.value - second.value
    arguments = first, second, np.sign(difference)
    if np.isnan(_inner_limit(_LOG_P[0], *arguments)):
        return np.nan
    if difference == 0:
        return 1.0
    if _inner_limit(_LOG_P[0], *arguments) > 0:
        return float(np.exp(_LOG_P[0]))
    solution = optimize.root_scalar(_inner_limit, args=arguments, bracket=_LOG_P, xtol=1e-9)
    return float(np.exp(solution.root))


def _inner_limit(log_p: float, first: Total, second: Total, sign: float) -> float:
    """The limit at the side of 0, of the level 1 - p; times the sign of the gap."""
    low, high = gap_limits(first, second, -np.expm1(log_p))
    return low if sign > 0 else -high


def as_interval(total: Total, level: float) -> Interval:
    """The value with `score_limits`."""
    return Interval(total.value, *score_limits(total, level))
