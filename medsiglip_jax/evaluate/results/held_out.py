"""What validation images fix and test images judge: operating points, calibration."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import special

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import aucs
from medsiglip_jax.evaluate.scores import Scores, known

# How thresholds are chosen; see `metrics.choose_threshold`.
RULES = (
    ("youden", None),
    ("sensitivity", 0.9),
    ("sensitivity", 0.95),
    ("specificity", 0.9),
    ("specificity", 0.95),
)
# Score rules whose numbers are probabilities already; of pairs, those of an image have no sum.
PROBABILITIES = frozenset(("pair_softmax", "class_softmax", "probe"))
DISTRIBUTIONS = PROBABILITIES - {"pair_softmax"}
TOP_LABEL = "top label"
# A softmax in float64 reaches 0 and 1, whose logarithms no curve can be fitted to.
_LEAST = 1e-15


def judge(
    validation: Scores, test: Scores, rule: str, kind: str, prevalence: float | None = None
) -> dict[str, Any]:
    """Fixes thresholds and probabilities on validation images; what they do on test images.

    Nothing is chosen on the test images: their labels are only counted.

    Args:
        validation: scores of other patients.
        test: scores by the same model and prompts, or the same probe.
        rule: that made the scores: of `zero_shot.RULES`, or "probe".
        kind: of the task. One class an image ("multi_class") is calibrated by one temperature,
            findings by a logistic curve each (Platt).
        prevalence: at which predictive values are stated besides that of the test images.

    Returns:
        `operating_points`, for each class and rule; `calibration`, for each finding, or of the
        "top label"; `undefined`: classes of which validation or test images do not have both
        labels, and which therefore have neither; `unlearned`: those of them that have no scores.
    """
    pairs = [(known(validation, j), known(test, j)) for j in range(len(test.classes))]
    named = dict(zip(test.classes, pairs, strict=True))
    undefined = [name for name, pair in named.items() if not all(map(_both, pair))]
    named = {name: pair for name, pair in named.items() if name not in undefined}
    points = [
        point
        for name, pair in named.items()
        for point in _points(name, *pair, prevalence=prevalence)
    ]
    if kind == "multi_class":
        calibration = list(_temperature(validation, test, rule))
    else:
        calibration = [_platt(name, *pair, rule=rule) for name, pair in named.items()]
    return {
        "operating_points": points,
        "calibration": calibration,
        "undefined": undefined,
        "unlearned": np.array(test.classes, object)[~validation.learned].tolist(),
    }


def _both(rows: metrics.Known) -> bool:
    return bool(rows.positive.any()) and not rows.positive.all()


# ------------------------------------------------------------------------------- operating points


def _points(
    name: str, chosen: metrics.Known, judged: metrics.Known, prevalence: float | None
) -> Iterator[dict[str, Any]]:
    for rule, at_least in RULES:
        threshold = metrics.choose_threshold(chosen.scores, chosen.positive, rule, at_least)
        found = metrics.operating_point(judged.scores, judged.positive, threshold)
        yield {
            "class": name,
            "rule": rule,
            "at_least": at_least,
            "threshold": threshold,
            **{key: aucs.limits(getattr(found, key), "value") for key in _SHARES},
            "positives": found.true_positives + found.false_negatives,
            "negatives": found.true_negatives + found.false_positives,
            "stated": None if prevalence is None else _stated(found, prevalence),
        }


_SHARES = ("sensitivity", "specificity", "ppv", "npv")


def _stated(found: metrics.OperatingPoint, prevalence: float) -> dict[str, float]:
    shares = found.sensitivity.value, found.specificity.value
    ppv, npv = metrics.predictive_values(*shares, prevalence)
    return {"prevalence": prevalence, "ppv": ppv, "npv": npv}


# ------------------------------------------------------------------------------------ calibration


def _platt(name: str, chosen: metrics.Known, judged: metrics.Known, rule: str) -> dict[str, Any]:
    """One finding: a logistic curve of the scores, or of the log odds of probabilities."""
    of, x = ("scores", lambda s: s) if rule not in PROBABILITIES else ("log odds", _log_odds)
    fitted = metrics.fit_platt(x(chosen.scores), chosen.positive)
    labels = judged.positive
    before = None if rule not in PROBABILITIES else _errors(judged.scores, labels)
    return {
        "of": name,
        "method": f"Platt on {of}",
        "parameters": {"slope": fitted.slope, "intercept": fitted.intercept},
        "left_out": 0,
        "before": before,
        "after": _errors(fitted(x(judged.scores)), labels),
    }


def _temperature(validation: Scores, test: Scores, rule: str) -> Iterator[dict[str, Any]]:
    """One class an image: a softmax of scores, or of the logarithms of probabilities, divided by
    one number; none where validation images are not of two classes, or test images of none.

    No temperature makes right an image of a class that the probe has no scores of: validation
    images of it have no say. Those of the test count, and the class has probability 0.
    """
    of, x = ("scores", lambda s: s) if rule not in PROBABILITIES else ("log probabilities", _log)
    (chosen, chosen_labels), (judged, labels) = map(_exclusive, (validation, test))
    learned = validation.learned
    rows = learned[chosen_labels]
    if len(np.unique(chosen_labels[rows])) < 2 or not len(judged):
        return
    number = np.cumsum(learned) - 1  # among the classes that have scores
    fitted = metrics.fit_temperature(x(chosen[rows][:, learned]), number[chosen_labels[rows]])
    after = np.zeros(judged.shape)
    after[:, learned] = fitted(x(judged[:, learned]))
    before = None if rule not in DISTRIBUTIONS else _top_label_errors(judged, labels)
    yield {
        "of": TOP_LABEL,
        "method": f"temperature on {of}",
        "parameters": {"temperature": fitted.value},
        "left_out": int((~rows).sum()),
        "before": before,
        "after": _top_label_errors(after, labels),
    }


def _exclusive(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and the number of the class, of the images that are of one class; those that are not
    there are 0."""
    rows = scores.labels.sum(axis=1) == 1
    return np.nan_to_num(scores.scores[rows]), scores.labels[rows].argmax(axis=1)


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, _LEAST))


def _log_odds(p: np.ndarray) -> np.ndarray:
    return special.logit(np.clip(p, _LEAST, 1 - _LEAST))


def _errors(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How far probabilities are from what happened: `metrics` with 15 bins."""
    curve = metrics.reliability(predicted, labels)
    error: Callable[..., float] = metrics.expected_calibration_error
    return {
        "ece": curve.error,
        "ece_mass": error(predicted, labels, equal="mass"),
        "brier": metrics.brier(predicted, labels),
        "curve": {
            "predicted": curve.predicted.tolist(),
            "observed": curve.observed.tolist(),
            "rows": curve.rows.tolist(),
        },
    }


def _top_label_errors(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Of the highest probability of each image; Brier's score is of all classes, from 0 to 2."""
    found = _errors(*metrics.top_label(predicted, labels))
    return {**found, "brier": metrics.brier(predicted, labels)}
