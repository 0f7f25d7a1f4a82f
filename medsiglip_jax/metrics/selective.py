"""Selective prediction: how accurate a model is on the rows of which it is most confident."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike
from scipy import special

from medsiglip_jax.metrics.checks import binary, check_level, units_of
from medsiglip_jax.metrics.intervals import Interval, proportion


@dataclass(frozen=True)
class Selective:
    """Accuracy against coverage, the share of rows that get an answer.

    Attributes:
      aurc: the area under the curve of risk, the share of wrong rows, against coverage. 0 at best;
        for a confidence that knows nothing it is the risk of all rows. See `aurc`.
      least: the area for a confidence that puts all wrong rows last.
      coverage: [k] at least the shares that were asked for: rows that tie get an answer together.
      accuracy: [k] of the rows that get an answer, with intervals as of `proportion`.
    """

    aurc: Interval
    least: float
    coverage: tuple[float, ...]
    accuracy: tuple[Interval, ...]


def selective_accuracy(
    confidence: ArrayLike,
    right: ArrayLike,
    coverage: Sequence[float] = (1.0, 0.9, 0.8, 0.5),
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
) -> Selective:
    """Returns how accurate the most confident rows are.

    Source: El-Yaniv and Wiener, JMLR 11 (2010), 1605.

    Args:
      confidence: [n] real numbers, higher meaning more confident.
      right: [n] bool, whether the answer is right.
      coverage: shares of the rows, in (0, 1].
      groups: [n] patient, lesion or study of each row; by default rows are independent.
      level: confidence level of the intervals.

    Raises:
      ValueError: as for `aurc`, or a coverage outside of (0, 1].
    """
    if wrong := [share for share in coverage if not 0 < share <= 1]:
        raise ValueError(f"coverage has {wrong[0]}; expected shares above 0 and up to 1")
    area = aurc(confidence, right, groups=groups, level=level)
    scores, hits = binary(confidence, right)
    units, ordered = units_of(groups, len(hits))[0], np.sort(scores)[::-1]
    # 0.9 x 10 is a little more than 9.
    last = [int(np.ceil(share * len(hits) - 1e-9)) - 1 for share in coverage]
    answered = [scores >= ordered[row] for row in last]
    shares = [proportion(hits[rows], None if groups is None else units[rows], level)
              for rows in answered]  # fmt: skip
    least = aurc(hits, hits).value
    return Selective(area, least, tuple(float(x.mean()) for x in answered), tuple(shares))


def aurc(
    confidence: ArrayLike, right: ArrayLike, *, groups: ArrayLike | None = None, level: float = 0.95
) -> Interval:
    """Returns the area under the curve of risk against coverage: the mean over k of the share of
    wrong rows among the k most confident ones.

    Source: Geifman, Uziel and El-Yaniv, ICLR 2019 (arXiv 1805.08206), equation 2. Rows that tie are
    in random order; the area is the expectation over it. The limits are those of the logit with the
    area's influence function, summed by group, and Student's t. They hold the truth in 94 to 95 %
    of 2,000 draws (200 patients with 1 image, 60 with 5, 30 with 3, 20 with 10; areas 0.06 to 0.5),
    and in 92 to 93 % where some 15 rows are wrong (areas 0.01 to 0.03).

    Args:
      confidence, right, groups, level: as for `selective_accuracy`.

    Returns:
      The area; without limits where no row is wrong, or every one, or there is one group.

    Raises:
      ValueError: shapes that differ, no rows, scores that are NaN, answers that are neither right
        nor wrong.
    """
    check_level(level)
    scores, hits = binary(confidence, right)
    if not len(hits):
        raise ValueError("there are no rows; expected at least one")
    units, count = units_of(groups, len(hits))
    area, pulls = _influence(scores, ~hits)
    if count < 2 or not 0 < area < 1:
        return Interval(area, np.nan, np.nan)
    pulled = np.bincount(units, pulls, count) / len(hits)
    error = np.sqrt((pulled**2).sum() * count / (count - 1)) / (area * (1 - area))
    reach = float(special.stdtrit(count - 1, 0.5 + level / 2)) * error * np.array([-1, 1])
    low, high = special.expit(special.logit(area) + reach)
    return Interval(area, float(low), float(high))


def _influence(
    scores: Float64[np.ndarray, " n"], wrong: np.ndarray
) -> tuple[float, Float64[np.ndarray, " n"]]:
    """The area, and how much each row pulls at it.

    With G(x) the share of rows at least as confident as x, the area is the mean of
    -wrong(x) ln G(x). A row adds its own term, and raises G for all rows that are less confident.
    """
    block = np.unique(-scores, return_inverse=True)[1]  # 0 is the most confident
    order = np.argsort(block, kind="stable")
    of_order = block[order]

    def over_ties(values: np.ndarray) -> np.ndarray:
        """The mean over the places that tied rows may take."""
        sums = np.bincount(of_order, values)
        return (sums / np.bincount(of_order))[of_order]

    k = np.arange(1, len(scores) + 1)
    risk = over_ties(wrong[order].astype(np.float64))
    area = float((np.cumsum(risk) / k).mean())
    logs = over_ties(np.cumsum((1 / k)[::-1])[::-1])  # of 1 / G, as sums of 1 / j
    raised = over_ties(np.cumsum((risk / k)[::-1])[::-1])
    pulls = np.empty(len(scores))
    pulls[order] = wrong[order] * logs - area + risk.mean() - raised
    return area, pulls
