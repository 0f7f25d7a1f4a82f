"""Calibration of held-out scores, and the accuracy of those that are most confident."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.results import aucs, figures, selective
from medsiglip_jax.evaluate.scores import Scores

# Score rules whose numbers are probabilities already, which add up to 1 for an image. Those of
# "pair_softmax", which has a softmax for each class, are log odds: see `Scores.log_odds`.
PROBABILITIES = frozenset(("class_softmax", "classifier", "probe"))
TOP_LABEL = "top label"
# A softmax in float64 reaches 0 and 1, whose logarithms no curve can be fitted to.
_LEAST = 1e-15


class Scale(NamedTuple):
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


_SCORES = Scale("scores", "scores", np.asarray, np.asarray, None)
_OTHER = Scale("log odds", "log probabilities", _log_odds, _log, np.asarray)
_LOG_ODDS = Scale("log odds", "log probabilities", np.asarray, special.log_expit, special.expit)


def scale_of(rule: str, log_odds: bool) -> Scale:
    """What the scores of a rule are: `log_odds` says that they are log odds of each class."""
    return _LOG_ODDS if log_odds else _OTHER if rule in PROBABILITIES else _SCORES


def platt(
    name: str,
    chosen: metrics.Known,
    judged: metrics.Known,
    patients: np.ndarray | None,
    scale: Scale,
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


def answers(
    name: str,
    chosen: metrics.Known,
    judged: metrics.Known,
    patients: np.ndarray | None,
    scale: Scale,
) -> dict[str, Any] | None:
    """A finding is called at the threshold of Youden's rule; far from it the call is confident."""
    threshold = metrics.choose_threshold(chosen.scores, chosen.positive)
    if not np.isfinite(threshold):
        return None
    distance = scale.to_odds(judged.scores) - scale.to_odds(np.array([threshold]))
    right = (judged.scores >= threshold) == judged.positive
    units = None if patients is None else patients[judged.rows]
    return selective.of_answers(name, np.abs(distance), right, units)


@dataclass(frozen=True)
class Softmax:
    """Exclusive classes: a softmax of scores, or of log probabilities, divided by one number.

    The probe has no scores of a class that training lacks. No temperature puts images of that
    class right: those of validation are left out; those of the test count, and the class has
    probability 0.

    Attributes:
        scale: what the scores are.
        temperature: fitted on validation images.
        left_out: how many validation images are of classes without scores.
        before, after: scores and probabilities of the test images.
        labels, units: their classes and patients.
    """

    scale: Scale
    temperature: float
    left_out: int
    before: np.ndarray
    after: np.ndarray
    labels: np.ndarray
    units: np.ndarray | None

    @classmethod
    def fitted(cls, validation: Scores, test: Scores, scale: Scale) -> "Softmax | None":
        """None where validation images are not of two classes, or there are no test images."""
        (chosen, chosen_labels), (judged, labels) = map(_exclusive, (validation, test))
        learned = validation.learned
        rows = learned[chosen_labels]
        chosen, chosen_labels = chosen[rows], chosen_labels[rows]
        if len(np.unique(chosen_labels)) < 2 or not len(judged):
            return None
        number = np.cumsum(learned) - 1  # among the classes that have scores
        temperature = metrics.fit_temperature(
            scale.to_log(chosen[:, learned]), number[chosen_labels]
        )
        after = np.zeros(judged.shape)
        after[:, learned] = temperature(scale.to_log(judged[:, learned]))
        units = None if test.units is None else test.units[test.labels.sum(axis=1) == 1]
        return cls(scale, temperature.value, int((~rows).sum()), judged, after, labels, units)

    def errors(self, rule: str) -> dict[str, Any]:
        """The row of calibration."""
        known = self.labels, self.units
        return {
            "of": TOP_LABEL,
            "method": f"temperature on {self.scale.of_classes}",
            "parameters": {"temperature": self.temperature},
            "reversed": False,
            "left_out": self.left_out,
            "before": _top_label_errors(self.before, *known) if rule in PROBABILITIES else None,
            "after": _top_label_errors(self.after, *known),
        }

    def answers(self) -> dict[str, Any]:
        """The row of accuracy against coverage: the highest probability is the confidence."""
        confidence, right = metrics.top_label(self.after, self.labels)
        return selective.of_answers(TOP_LABEL, confidence, right, self.units)


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
