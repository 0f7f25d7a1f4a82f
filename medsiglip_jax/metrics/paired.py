"""Two models that call the same rows: how much more often the one is right, by patient."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike
from scipy import optimize, special

from medsiglip_jax.metrics.checks import units_of
from medsiglip_jax.metrics.intervals import Interval, normal_quantile


@dataclass(frozen=True)
class PairedShares:
    """Two shares of the same rows, such as sensitivities, and McNemar's test.

    Attributes:
      difference: share of the first minus that of the second.
      first_only: number of rows that only the first gets right.
      second_only: number of rows that only the second gets right.
      chi_square: of McNemar without continuity correction; by patient that of Obuchowski.
      p: the two-sided p-value to read: `p_mid`, or by patient that of `chi_square`.
      p_exact: of the binomial test of the rows that only one gets right; NaN by patient.
      p_mid: likewise, with half the probability of what was found; NaN by patient.
    """

    difference: Interval
    first_only: int
    second_only: int
    chi_square: float
    p: float
    p_exact: float
    p_mid: float


def paired_shares(
    first: Bool[np.ndarray, " n"],
    second: Bool[np.ndarray, " m"],
    groups: ArrayLike | None = None,
    level: float = 0.95,
) -> PairedShares:
    """Compares the shares of rows that two models get right.

    With b rows that only the first, and c that only the second gets right, McNemar's statistic is
    (b - c)^2 / (b + c) (Psychometrika 12 (1947), 153), the exact p is the binomial one, and the
    mid-p subtracts half the probability of b (Fagerland, Lydersen and Laake, BMC Med. Res.
    Methodol. 13 (2013), 91, who recommend it). The interval is Tango's (Stat. Med. 17 (1998), 891),
    which has a width where b and c are 0.

    Rows of one patient are alike, and none of these p-values holds for them. With groups of several
    rows, the statistic is that of Obuchowski (Stat. Med. 17 (1998), 1495), (b - c)^2 divided by the
    sum over the K patients of their (b - c)^2, times (K - 1) / K; p is that of Student's t with
    K - 1 degrees of freedom, and there are no exact p-values. Tango's interval is then that of the
    effective number of rows: the variance of the difference between rows divided by that between
    patients, or the number of patients where nobody differs.

    Args:
      first: [n] whether the first model gets each row right.
      second: [n] whether the second does.
      groups: [n] patient of each row; by default rows are independent.
      level: confidence level.

    Returns:
      The comparison; p is 1 where no row differs. All is NaN without rows, and the difference has
      no limits for a single patient.

    Raises:
      ValueError: the shapes differ, `groups` is not [n], or `level` is out of range.
    """
    if first.shape != second.shape:
        raise ValueError(f"first has shape {first.shape} and second {second.shape}; expected equal")
    n, z = len(first), normal_quantile(level)
    units, patients = units_of(groups, n)
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    if not n:
        return PairedShares(Interval(np.nan, np.nan, np.nan), 0, 0, *[np.nan] * 4)
    apart = np.bincount(units, first.astype(float) - second, patients)
    if patients == n:
        statistic, exact = (b - c) ** 2 / max(1, b + c), _binomial(b, c)
        effective, p = float(n), exact[1]
    else:
        statistic = _obuchowski(apart)
        p = float(2 * special.stdtr(patients - 1, -np.sqrt(statistic))) if b + c else 1.0
        effective, exact = _effective(apart, np.bincount(units), b, c), (np.nan, np.nan)
    limits = _tango(b / n, c / n, effective, z)
    return PairedShares(Interval((b - c) / n, *limits), b, c, float(statistic), p, *exact)


def _binomial(b: int, c: int) -> tuple[float, float]:
    """The exact two-sided p, and the mid-p."""
    if b == c:
        return 1.0, 1.0
    # The factors of the binomial overflow beyond some 1,000 rows; its logarithm does not.
    log_choices = -special.betaln(b + 1, c + 1) - np.log(b + c + 1)
    tail, point = special.bdtr(min(b, c), b + c, 0.5), np.exp(log_choices - (b + c) * np.log(2))
    return float(min(1.0, 2 * tail)), float(min(1.0, 2 * tail - point))


def _obuchowski(apart: np.ndarray) -> float:
    count, squares = len(apart), (apart**2).sum()
    if count < 2:
        return np.nan
    return float((count - 1) / count * apart.sum() ** 2 / squares) if squares else 0.0


def _effective(apart: np.ndarray, sizes: np.ndarray, b: int, c: int) -> float:
    """The number of independent rows that would tell as much."""
    count, n = len(apart), sizes.sum()
    difference = (b - c) / n
    between = count / max(1, count - 1) * ((apart - sizes * difference) ** 2).sum() / n**2
    of_rows = (b + c) / n - difference**2
    if count < 2:
        return np.nan
    return float(min(n, of_rows / between)) if between > 0 and of_rows > 0 else float(count)


def _tango(b: float, c: float, n: float, z: float) -> tuple[float, float]:
    """The differences that the score test does not reject, from shares of n rows."""
    if np.isnan(n):
        return np.nan, np.nan
    if b == c == 0:
        reach = z * z / (n + z * z)
        return -reach, reach
    if abs(b - c) == 1:
        least = (n - z * z) / (n + z * z)
        return (least, 1.0) if b else (-1.0, -least)
    return _tango_root(b, c, n, z, -1.0), _tango_root(b, c, n, z, 1.0)


def _tango_root(b: float, c: float, n: float, z: float, end: float) -> float:
    arguments = (b, c, n, z)
    if _beyond(end, *arguments) <= 0:
        return end
    return optimize.root_scalar(_beyond, args=arguments, bracket=(b - c, end), xtol=1e-14).root


def _beyond(x: float, b: float, c: float, n: float, z: float) -> float:
    """Positive where the difference x is rejected."""
    linear, constant = (2 - b + c) * x - b - c, -c * x * (1 - x)
    share = (np.sqrt(max(0.0, linear**2 - 8 * constant)) - linear) / 4  # of c, given x
    variance = max(0.0, 2 * share + x * (1 - x)) / n
    return (b - c - x) ** 2 - z * z * variance
