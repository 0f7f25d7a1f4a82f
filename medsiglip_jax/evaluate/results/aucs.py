"""AUCs as results.json holds them: with an interval, beside the published figure."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.metrics import Interval
from medsiglip_jax.metrics.subgroups import FEW


class Statistics(NamedTuple):
    """Resamples and seed of bootstraps."""

    resamples: int
    seed: int


def of_classes(scores: Scores) -> metrics.ClassAucs:
    """The AUC of each class with DeLong's interval, by patient where patients are known."""
    columns = scores.scores, scores.labels, scores.classes
    return metrics.class_aucs(*columns, groups=scores.units, student=True)


def mean(scores: Scores, statistics: Statistics, figure: float | None = None) -> dict[str, Any]:
    """The mean AUC of classes with a bootstrap interval; each resample has its own mean.

    Args:
        scores: of images for classes; whole patients are drawn.
        statistics: of the bootstrap.
        figure: the published one.
    """
    interval = metrics.bootstrap(
        metrics.macro_auc, scores.scores, scores.labels,
        groups=scores.units, samples=statistics.resamples, seed=statistics.seed,
    )  # fmt: skip
    return mean_of(interval, figure)


def mean_of(interval: Interval, figure: float | None) -> dict[str, Any]:
    """A mean AUC whose bootstrap interval is known."""
    return {**limits(interval), "dropped": interval.dropped} | against(figure, interval)


def counts(labels: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """How many labels are 1 and 0, and whether one of them is rare."""
    positives, negatives = (int((labels == value).sum()) for value in (1, 0))
    few = min(positives, negatives) < FEW
    return {"positives": positives, "negatives": negatives, "few": few}


def limits(interval: Interval, name: str = "auc") -> dict[str, float]:
    """An estimate under this name, and its limits."""
    return {name: interval.value, "low": interval.low, "high": interval.high}


def against(figure: float | None, interval: Interval) -> dict[str, Any]:
    """A published figure, its difference from this one, and whether it lies in the interval."""
    if figure is None:
        return {"published": None, "difference": None, "inside": None}
    inside = None if math.isnan(interval.low) else figure in interval
    return {"published": figure, "difference": interval.value - figure, "inside": inside}
