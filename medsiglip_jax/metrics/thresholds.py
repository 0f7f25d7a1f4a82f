"""Operating points: a threshold chosen on validation data, and what it does on test data."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from medsiglip_jax.metrics.checks import known
from medsiglip_jax.metrics.intervals import Interval, wilson
from medsiglip_jax.metrics.ranking import roc_curve

RULES = ("youden", "sensitivity", "specificity")


def choose_threshold(
    scores: ArrayLike, labels: ArrayLike, rule: str = "youden", at_least: float | None = None
) -> float:
    """Returns the score from which on rows are called positive; choose it on validation data.

    Args:
      scores: [n] real numbers, higher meaning more positive.
      labels: [n] bool, or numbers that are 0 or 1.
      rule: "youden": the highest sensitivity + specificity (Youden, Cancer 3 (1950), 32);
        "sensitivity": the most specific that is at least so sensitive; "specificity": the most
        sensitive that is at least so specific.
      at_least: the sensitivity or specificity that is asked for, in [0, 1].

    Returns:
      One of the scores, the highest of equally good ones; inf if only calling nothing positive is
      specific enough; NaN where one of the two labels is missing.

    Raises:
      ValueError: as for `auc`, an unknown rule, or `at_least` that does not go with it.
    """
    check_rule(rule, at_least)
    curve = roc_curve(scores, labels)
    sensitivity, specificity = curve.true_positive_rate, 1 - curve.false_positive_rate
    if np.isnan(sensitivity).any() or np.isnan(specificity).any():
        return float("nan")
    if rule == "youden":
        chosen = np.argmax(sensitivity - curve.false_positive_rate)
    elif rule == "sensitivity":
        chosen = np.argmax(sensitivity >= at_least)
    else:
        enough = np.flatnonzero(specificity >= at_least)
        chosen = np.argmax(sensitivity == sensitivity[enough[-1]])
    return float(curve.thresholds[chosen])


def check_rule(rule: str, at_least: float | None) -> None:
    """Raises ValueError unless `choose_threshold` would take these."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}")
    if (at_least is None) != (rule == "youden"):
        raise ValueError(f"rule {rule!r} with at_least {at_least}; give it for all but youden")
    if at_least is not None and not 0 <= at_least <= 1:
        raise ValueError(f"at_least is {at_least}; expected from 0 to 1")


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold does, with Wilson intervals.

    Attributes:
      threshold: rows that score at least this are called positive.
      true_positives, false_positives, true_negatives, false_negatives: rows.
      missing: rows left out for want of a label.
      sensitivity: share of the positives that are called so.
      specificity: share of the negatives that are called so.
      ppv: share of those called positive that are, at the prevalence of these rows.
      npv: share of those called negative that are, likewise.
    """

    threshold: float
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    missing: int
    sensitivity: Interval
    specificity: Interval
    ppv: Interval
    npv: Interval


def operating_point(
    scores: ArrayLike, labels: ArrayLike, threshold: float, level: float = 0.95
) -> OperatingPoint:
    """Returns what a threshold that was fixed elsewhere does on these rows.

    Args:
      scores: [n] real numbers, higher meaning more positive.
      labels: [n] of 0 and 1; rows of NaN or -1 are left out, and counted.
      threshold: from `choose_threshold` on other rows.
      level: of the intervals.

    Raises:
      ValueError: as for `known`, or the threshold is NaN.
    """
    if np.isnan(threshold):
        raise ValueError("threshold is NaN: the data it was chosen on had only one of the labels")
    scores, positive, _, missing = known(scores, labels)
    called = scores >= threshold
    tp, fp = int((called & positive).sum()), int((called & ~positive).sum())
    tn, fn = int((~called & ~positive).sum()), int((~called & positive).sum())
    return OperatingPoint(
        float(threshold), tp, fp, tn, fn, missing,
        wilson(tp, tp + fn, level), wilson(tn, tn + fp, level),
        wilson(tp, tp + fp, level), wilson(tn, tn + fn, level),
    )  # fmt: skip


def predictive_values(
    sensitivity: float, specificity: float, prevalence: float
) -> tuple[float, float]:
    """Returns (PPV, NPV) where a share `prevalence` of all are positive, by Bayes' rule.

    Data sets are rarely as common in disease as the clinic; NaN where nothing is called so.

    Raises:
      ValueError: a value outside of [0, 1].
    """
    if not all(0 <= x <= 1 for x in (sensitivity, specificity, prevalence)):
        raise ValueError("sensitivity, specificity and prevalence: expected from 0 to 1")
    tp, fn = prevalence * sensitivity, prevalence * (1 - sensitivity)
    tn, fp = (1 - prevalence) * specificity, (1 - prevalence) * (1 - specificity)
    nan = float("nan")
    return tp / (tp + fp) if tp + fp else nan, tn / (tn + fn) if tn + fn else nan
