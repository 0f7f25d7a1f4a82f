"""Accuracy against coverage as results.json holds it."""

from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.results import aucs

COVERAGE = (1.0, 0.9, 0.8, 0.5)
_POINTS = np.linspace(0.02, 1.0, 50)  # of the curve


def of_answers(
    name: str, confidence: np.ndarray, right: np.ndarray, patients: np.ndarray | None
) -> dict[str, Any]:
    """What is left of the errors if the least confident answers are withheld.

    Args:
        name: the finding, or "top label".
        confidence: float [n], the higher the sooner an image gets an answer.
        right: whether its answer is right.
        patients: number of the patient of each image, if known.
    """
    measured = metrics.selective_accuracy(confidence, right, COVERAGE, groups=patients)
    shares = zip(COVERAGE, measured.coverage, measured.accuracy, strict=True)
    return {
        "of": name,
        "images": len(right),
        "aurc": aucs.limits(measured.aurc, "value"),
        "least": measured.least,
        "accuracy": [
            {"at_least": asked, "coverage": coverage, **aucs.limits(accuracy, "value")}
            for asked, coverage, accuracy in shares
        ],
        "curve": _curve(confidence, right),
    }


def _curve(confidence: np.ndarray, right: np.ndarray) -> dict[str, list[float]]:
    """At the shares of the images at which all that tie have an answer."""
    order = np.argsort(-confidence, kind="stable")
    ends = np.flatnonzero(np.diff(confidence[order], append=np.nan) != 0)
    ends = np.unique(ends[np.searchsorted(ends, np.ceil(_POINTS * len(order)) - 1)])
    accuracy = np.cumsum(right[order])[ends] / (ends + 1)
    return {"coverage": ((ends + 1) / len(order)).tolist(), "accuracy": accuracy.tolist()}
