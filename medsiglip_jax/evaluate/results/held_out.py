"""Operating points and calibration: chosen on validation images, judged on test images."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.results import aucs, calibrated
from medsiglip_jax.evaluate.scores import Scores, known
from medsiglip_jax.metrics.subgroups import FEW

# How thresholds are chosen; see `metrics.choose_threshold`.
RULES = (("youden", None), *itertools.product(("sensitivity", "specificity"), (0.9, 0.95)))
COMBINED = "combined"  # a rule of scores that are no distribution over the classes


def judge(
    validation: Scores,
    test: Scores,
    rule: str,
    exclusive: bool,
    prevalence: float | None = None,
    attributes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Chooses thresholds and calibration on validation images, and judges them on test images.

    Nothing is chosen on the test images: their labels are only counted.

    Args:
        validation: scores of other patients.
        test: scores by the same model and prompts, or the same probe.
        rule: how the scores were made: a key of `zero_shot.RULES`, or "probe".
        exclusive: whether an image shows exactly one class. Such tasks are calibrated by one
            temperature, findings by a logistic curve each (Platt).
        prevalence: a share of positives, in (0, 1), for which predictive values are stated, too,
            besides that of the test images.
        attributes: name -> value per test image, for subgroups.

    Returns:
        `operating_points`, for each class and rule; `subgroups`: sensitivity and specificity in
        subgroups at the threshold of Youden's rule, which all share; `calibration`, for each
        finding, or of the "top label"; `selective`: accuracy against coverage, likewise;
        `undefined`: classes without all of these, because validation or test images do not have
        both labels of them; `unlearned`: classes without scores, which are among those.
    """
    classes = {name: (known(validation, j), known(test, j)) for j, name in enumerate(test.classes)}
    patients = test.units
    undefined = [name for name, pair in classes.items() if not all(map(_both, pair))]
    classes = {name: pair for name, pair in classes.items() if name not in undefined}
    points = [
        {**point, **_stated_threshold(point["threshold"], test.log_odds)}
        for name, pair in classes.items()
        for point in _points(name, *pair, patients, prevalence)
    ]
    scale = calibrated.scale_of(rule, test.log_odds)
    if exclusive:
        softmax = calibrated.Softmax.fitted(validation, test, scale)
        calibration = [softmax.errors(rule)] if softmax else []
        answers = [softmax.answers()] if softmax else []
    else:
        findings = [(name, *pair, patients, scale) for name, pair in classes.items()]
        calibration = [calibrated.platt(*finding) for finding in findings]
        answers = [calibrated.answers(*finding) for finding in findings]
    return {
        "operating_points": points,
        "subgroups": [
            row
            for name, pair in classes.items()
            for row in _subgroups(name, *pair, patients, attributes or {})
        ],
        "calibration": calibration,
        "selective": [row for row in answers if row],
        "undefined": undefined,
        "unlearned": np.array(test.classes, object)[~validation.learned].tolist(),
    }


def _both(rows: metrics.Known) -> bool:
    """Whether there are positives and negatives."""
    return bool(rows.positive.any()) and not rows.positive.all()


# ------------------------------------------------------------------------------- operating points


def _points(
    name: str,
    chosen: metrics.Known,
    judged: metrics.Known,
    patients: np.ndarray | None,
    prevalence: float | None,
) -> Iterator[dict[str, Any]]:
    units = None if patients is None else patients[judged.rows]
    few = metrics.fewest_units(judged.positive, units) < FEW
    for rule, at_least in RULES:
        threshold = metrics.choose_threshold(chosen.scores, chosen.positive, rule, at_least)
        point = metrics.operating_point(judged.scores, judged.positive, threshold, groups=units)
        yield {
            "class": name,
            "rule": rule,
            "at_least": at_least,
            "threshold": threshold,
            **{key: aucs.limits(getattr(point, key), "value") for key in _SHARES},
            "positives": point.true_positives + point.false_negatives,
            "negatives": point.true_negatives + point.false_positives,
            "few": few,
            "stated": None if prevalence is None else _stated(point, prevalence),
        }


def _subgroups(
    name: str,
    chosen: metrics.Known,
    judged: metrics.Known,
    patients: np.ndarray | None,
    attributes: Mapping[str, Sequence[str]],
) -> Iterator[dict[str, Any]]:
    called = judged.scores >= metrics.choose_threshold(chosen.scores, chosen.positive)
    for attribute, values in attributes.items():
        of_rows = np.array(values, object)[judged.rows]
        for share, of in zip(_SHARES[:2], (judged.positive, ~judged.positive), strict=True):
            units = None if patients is None else patients[judged.rows][of]
            right = called[of] == judged.positive[of]
            for subgroup in metrics.subgroup_shares(right, of_rows[of], groups=units):
                yield {
                    "attribute": attribute,
                    "subgroup": subgroup.name,
                    "class": name,
                    "share": share,
                    **aucs.limits(subgroup.share, "value"),
                    "gap": subgroup.gap.value,
                    "gap_low": subgroup.gap.low,
                    "gap_high": subgroup.gap.high,
                    "images": subgroup.rows,
                    "few": subgroup.flagged,
                }


def _stated_threshold(threshold: float, log_odds: bool) -> dict[str, float]:
    """As a probability where scores are log odds; these tell thresholds near 1 apart."""
    if not log_odds:
        return {"threshold": threshold}
    return {"threshold": float(special.expit(threshold)), "threshold_log_odds": threshold}


_SHARES = ("sensitivity", "specificity", "ppv", "npv")


def _stated(point: metrics.OperatingPoint, prevalence: float) -> dict[str, float]:
    shares = point.sensitivity.value, point.specificity.value
    ppv, npv = metrics.predictive_values(*shares, prevalence)
    return {"prevalence": prevalence, "ppv": ppv, "npv": npv}
