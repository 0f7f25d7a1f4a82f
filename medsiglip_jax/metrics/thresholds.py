"""Operating points: a threshold chosen on validation data and evaluated on test data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from medsiglip_jax.metrics.checks import codes, known
from medsiglip_jax.metrics.classes import class_aucs
from medsiglip_jax.metrics.intervals import Interval, proportion
from medsiglip_jax.metrics.ranking import ratio, roc_curve

RULES = ("youden", "sensitivity", "specificity")


def choose_threshold(
    scores: ArrayLike, labels: ArrayLike, rule: str = "youden", at_least: float | None = None
) -> float:
    """Returns the score from which rows are called positive; choose it on validation data.

    Args:
      scores: [n] real numbers, higher meaning more positive.
      labels: [n] bool, or numbers that are 0 or 1.
      rule: "youden": the highest sensitivity + specificity (Youden, Cancer 3 (1950), 32);
        "sensitivity": the highest specificity with at least the sensitivity `at_least`;
        "specificity": the highest sensitivity with at least the specificity `at_least`.
      at_least: the minimum sensitivity or specificity, in [0, 1].

    Returns:
      One of the scores, the highest of equally good ones; inf if the specificity is only reached by
      calling nothing positive; NaN where one of the two labels is missing.

    Raises:
      ValueError: as for `auc`, an unknown rule, or a rule without the `at_least` that it needs.
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
    """Raises ValueError unless `choose_threshold` accepts these."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}")
    if (at_least is None) != (rule == "youden"):
        expected = "None" if rule == "youden" else "a share from 0 to 1"
        raise ValueError(f"at_least is {at_least} for the rule {rule!r}; expected {expected}")
    if at_least is not None and not 0 <= at_least <= 1:
        raise ValueError(f"at_least is {at_least}; expected from 0 to 1")


@dataclass(frozen=True)
class OperatingPoint:
    """The performance of a threshold, with intervals as of `proportion`.

    Attributes:
      threshold: rows with at least this score are called positive.
      true_positives, false_positives, true_negatives, false_negatives: numbers of rows.
      missing: number of rows left out because their label is unknown.
      sensitivity: fraction of the positives that are called positive.
      specificity: fraction of the negatives that are called negative.
      ppv: fraction of the rows called positive that are positive, at the prevalence of these rows.
      npv: fraction of the rows called negative that are negative, likewise.
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
    scores: ArrayLike,
    labels: ArrayLike,
    threshold: float,
    level: float = 0.95,
    *,
    groups: ArrayLike | None = None,
) -> OperatingPoint:
    """Returns the performance on these rows of a threshold that was chosen on others.

    Of 60 patients with 5 images each, whose scores share 80 % of their variance, the 95 % interval
    of the sensitivity holds the truth in 71 % of 2,000 draws without groups, and in 95 % with them;
    so it does for 20 patients with 10 images each (73 and 95 %; `scripts/bench.py coverage`).

    Args:
      scores: [n] real numbers, higher meaning more positive.
      labels: [n] of 0 and 1; rows with NaN or -1 are left out and counted.
      threshold: from `choose_threshold` on other rows.
      level: confidence level of the intervals.
      groups: [n] patient, lesion or study of each row; by default rows are independent.

    Raises:
      ValueError: as for `known`, `groups` is not [n], or the threshold is NaN.
    """
    if np.isnan(threshold):
        raise ValueError(
            "threshold is NaN: the rows that it was chosen on had only one of the two labels; "
            "choose it on rows with both"
        )
    scores, positive, rows, missing = known(scores, labels)
    units = None if groups is None else codes("groups", groups, len(rows))[rows]
    called = scores >= threshold

    def share(of: np.ndarray, hits: np.ndarray) -> Interval:
        return proportion(hits[of], None if units is None else units[of], level)

    return OperatingPoint(
        threshold=float(threshold),
        true_positives=int((called & positive).sum()),
        false_positives=int((called & ~positive).sum()),
        true_negatives=int((~called & ~positive).sum()),
        false_negatives=int((~called & positive).sum()),
        missing=missing,
        sensitivity=share(positive, called),
        specificity=share(~positive, ~called),
        ppv=share(called, positive),
        npv=share(~called, ~positive),
    )


def judge_classes(
    scores: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    thresholds: ArrayLike,
    groups: ArrayLike | None = None,
) -> dict[str, Any]:
    """Returns how good a classifier is on rows that it was neither trained nor chosen on.

    Args:
      scores: [n, c] probabilities; NaN in the column of a class that was not learned.
      labels: [n, c] of 0 and 1, NaN or -1 unknown.
      classes: names of the columns.
      thresholds: [c] from `choose_threshold` on other rows; NaN where there is none.
      groups: [n] patient of each row, for the intervals; see `delong`.

    Returns:
      `macro_auc`, `undefined` (names of classes without an AUC), and for each of `classes`: `auc`,
      `low`, `high`, `threshold`, `sensitivity`, `specificity`, `positives`, `negatives`, `missing`.
      Undefined numbers are NaN.

    Raises:
      ValueError: the shapes disagree, a label is none of these, or two classes have one name.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    thresholds = np.asarray(thresholds, np.float64)
    if thresholds.shape != (len(classes),) or len(set(classes)) < len(classes):
        raise ValueError(
            f"thresholds has shape {thresholds.shape} for the classes {', '.join(classes)}; "
            "expected one threshold for each class, and different names"
        )
    learned = ~np.isnan(scores).any(axis=0)
    aucs = class_aucs(
        np.where(learned, scores, 0), np.where(learned, labels, np.nan), classes, groups=groups,
        student=True,
    )  # fmt: skip
    judged = {}
    for auc, threshold, known_labels, column in zip(
        aucs.classes, thresholds, labels.T, scores.T, strict=True
    ):
        rates = dict.fromkeys(("sensitivity", "specificity"), float("nan"))
        if not np.isnan(threshold):
            point = operating_point(column, known_labels, threshold)
            rates = {name: getattr(point, name).value for name in rates}
        judged[auc.name] = dict(
            auc=auc.auc.value, low=auc.auc.low, high=auc.auc.high, threshold=float(threshold),
            **rates, positives=int((known_labels == 1).sum()),
            negatives=int((known_labels == 0).sum()),
            missing=int((np.isnan(known_labels) | (known_labels == -1)).sum()),
        )  # fmt: skip
    return {"macro_auc": aucs.macro, "undefined": list(aucs.undefined), "classes": judged}


def predictive_values(
    sensitivity: float, specificity: float, prevalence: float
) -> tuple[float, float]:
    """Returns (PPV, NPV) at another prevalence, by Bayes' rule.

    The prevalence in a data set is rarely that of the clinic. NaN if no row is called positive, or
    negative.

    Raises:
      ValueError: a value outside of [0, 1].
    """
    if not all(0 <= x <= 1 for x in (sensitivity, specificity, prevalence)):
        raise ValueError(
            f"sensitivity, specificity and prevalence are {sensitivity}, {specificity}, "
            f"{prevalence}; expected numbers from 0 to 1"
        )
    tp, fn = prevalence * sensitivity, prevalence * (1 - sensitivity)
    tn, fp = (1 - prevalence) * specificity, (1 - prevalence) * (1 - specificity)
    return float(ratio(tp, tp + fp)), float(ratio(tn, tn + fn))
