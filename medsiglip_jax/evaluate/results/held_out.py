"""Operating points and calibration: chosen on validation images, judged on test images."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.results import aucs, figures
from medsiglip_jax.evaluate.scores import Scores, known
from medsiglip_jax.metrics.subgroups import FEW

# How thresholds are chosen; see `metrics.choose_threshold`.
RULES = (("youden", None), *itertools.product(("sensitivity", "specificity"), (0.9, 0.95)))
# Score rules whose numbers are probabilities already, which add up to 1 for an image. Those of
# "pair_softmax", which has a softmax for each class, are log odds: see `Scores.log_odds`.
PROBABILITIES = frozenset(("class_softmax", "classifier", "probe"))
TOP_LABEL, COMBINED = "top label", "combined"  # the latter is a rule of no distribution
# A softmax in float64 reaches 0 and 1, whose logarithms no curve can be fitted to.
_LEAST = 1e-15


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
        prevalence: at which to state predictive values, besides that of the test images.
        attributes: name -> value per test image, for subgroups.

    Returns:
        `operating_points`, for each class and rule; `subgroups`: sensitivity and specificity in
        subgroups at the threshold of Youden's rule, which all share; `calibration`, for each
        finding, or of the "top label"; `undefined`: classes without both, because validation or
        test images do not have both labels of them; `unlearned`: classes without scores, which are
        among those.
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
    scale = _LOG_ODDS if test.log_odds else _OTHER if rule in PROBABILITIES else _SCORES
    if exclusive:
        calibration = list(_temperature(validation, test, scale, rule))
    else:
        calibration = [_platt(name, *pair, patients, scale) for name, pair in classes.items()]
    return {
        "operating_points": points,
        "subgroups": [
            row
            for name, pair in classes.items()
            for row in _subgroups(name, *pair, patients, attributes or {})
        ],
        "calibration": calibration,
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
            for found in metrics.subgroup_shares(right, of_rows[of], groups=units):
                yield {
                    "attribute": attribute,
                    "subgroup": found.name,
                    "class": name,
                    "share": share,
                    **aucs.limits(found.share, "value"),
                    "gap": found.gap.value,
                    "gap_low": found.gap.low,
                    "gap_high": found.gap.high,
                    "images": found.rows,
                    "few": found.flagged,
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


# ------------------------------------------------------------------------------------ calibration


class _Scale(NamedTuple):
    """What scores are, and how they become log odds, log probabilities and probabilities."""

    of_findings: str
    of_classes: str
    to_odds: Callable[[np.ndarray], np.ndarray]
    to_log: Callable[[np.ndarray], np.ndarray]
    to_probabilities: Callable[[np.ndarray], np.ndarray] | None


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, _LEAST))


def _log_odds(p: np.ndarray) -> np.ndarray:
    return special.logit(np.clip(p, _LEAST, 1 - _LEAST))


_SCORES = _Scale("scores", "scores", np.asarray, np.asarray, None)
_OTHER = _Scale("log odds", "log probabilities", _log_odds, _log, np.asarray)
_LOG_ODDS = _Scale("log odds", "log probabilities", np.asarray, special.log_expit, special.expit)


def _platt(
    name: str,
    chosen: metrics.Known,
    judged: metrics.Known,
    patients: np.ndarray | None,
    scale: _Scale,
) -> dict[str, Any]:
    """One finding: a logistic curve of the scores, or of the log odds of probabilities."""
    fitted = metrics.fit_platt(scale.to_odds(chosen.scores), chosen.positive)
    columns = judged.positive, None if patients is None else patients[judged.rows]
    before = scale.to_probabilities and _errors(scale.to_probabilities(judged.scores), *columns)
    return {
        "of": name,
        "method": f"Platt on {scale.of_findings}",
        "parameters": {"slope": fitted.slope, "intercept": fitted.intercept},
        "reversed": fitted.slope < 0,
        "left_out": 0,
        "before": before,
        "after": _errors(fitted(scale.to_odds(judged.scores)), *columns),
    }


def _temperature(
    validation: Scores, test: Scores, scale: _Scale, rule: str
) -> Iterator[dict[str, Any]]:
    """Exclusive classes: a softmax of scores, or of log probabilities, divided by one number.

    Nothing where validation images are not of two classes, or there are no test images.

    The probe has no scores of a class that training lacks. No temperature puts images of that
    class right: those of validation are left out; those of the test count, and the class has
    probability 0.
    """
    (chosen, chosen_labels), (judged, labels) = map(_exclusive, (validation, test))
    learned = validation.learned
    rows = learned[chosen_labels]
    chosen, chosen_labels = chosen[rows], chosen_labels[rows]
    if len(np.unique(chosen_labels)) < 2 or not len(judged):
        return
    number = np.cumsum(learned) - 1  # among the classes that have scores
    fitted = metrics.fit_temperature(scale.to_log(chosen[:, learned]), number[chosen_labels])
    after = np.zeros(judged.shape)
    after[:, learned] = fitted(scale.to_log(judged[:, learned]))
    units = None if test.units is None else test.units[test.labels.sum(axis=1) == 1]
    yield {
        "of": TOP_LABEL,
        "method": f"temperature on {scale.of_classes}",
        "parameters": {"temperature": fitted.value},
        "reversed": False,
        "left_out": int((~rows).sum()),
        "before": _top_label_errors(judged, labels, units) if rule in PROBABILITIES else None,
        "after": _top_label_errors(after, labels, units),
    }


def _exclusive(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Scores and class number of the images of exactly one class; a missing score is 0."""
    values, _, labels = figures.one_class(scores)
    return np.nan_to_num(values), labels


def _errors(
    predicted: np.ndarray, labels: np.ndarray, patients: np.ndarray | None
) -> dict[str, Any]:
    """Distances between probabilities and labels, see `metrics`, with 15 bins."""
    curves = {k: metrics.reliability(predicted, labels, equal=k) for k in ("width", "mass")}
    line = metrics.recalibration(predicted, labels, groups=patients)
    return {
        "ece": curves["width"].error,
        "ece_mass": curves["mass"].error,
        "brier": metrics.brier(predicted, labels),
        "slope": aucs.limits(line.slope, "value"),
        "intercept": aucs.limits(line.intercept, "value"),
        "curve": _columns(curves["width"]),
        "curve_mass": _columns(curves["mass"]),
    }


def _columns(curve: metrics.Reliability) -> dict[str, list[float]]:
    return {name: column.tolist() for name, column in vars(curve).items()}


def _top_label_errors(
    predicted: np.ndarray, labels: np.ndarray, patients: np.ndarray | None
) -> dict[str, Any]:
    """Of the highest probability of each image; Brier's score is over all classes, from 0 to 2."""
    errors = _errors(*metrics.top_label(predicted, labels), patients)
    return {**errors, "brier": metrics.brier(predicted, labels)}
