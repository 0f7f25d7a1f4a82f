"""AUCs as results.json holds them: with an interval, beside the published figure."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

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


def mean(scores: Scores, figure: float | None = None) -> dict[str, Any]:
    """The mean AUC of classes with its interval, by patient where patients are known.

    Args:
        scores: the scores of images for classes.
        figure: the published one.
    """
    macro = metrics.macro_delong(scores.scores, scores.labels, groups=scores.units)
    facts = {"lone": macro.lone, "withheld": macro.withheld or None}
    return {**limits(macro.auc), **facts} | against(figure, macro.auc)


def counts(
    labels: Float[np.ndarray, " n"], units: Int64[np.ndarray, " n"] | None
) -> dict[str, Any]:
    """How many labels are 1 and 0, and whether one of them is rare.

    Rare is what few patients have, or few images where patients are not known.
    """
    there = ~np.isnan(labels)
    positive, units = labels[there] == 1, None if units is None else units[there]
    few = metrics.fewest_units(positive, units) < FEW
    return {"positives": int(positive.sum()), "negatives": int((~positive).sum()), "few": few}


def limits(interval: Interval, name: str = "auc") -> dict[str, float]:
    """An estimate under this name, and its limits."""
    return {name: interval.value, "low": interval.low, "high": interval.high}


def against(figure: float | None, interval: Interval) -> dict[str, Any]:
    """A published figure, its difference from this one, and whether it lies in the interval."""
    if figure is None:
        return {"published": None, "difference": None, "inside": None}
    inside = None if math.isnan(interval.low) else figure in interval
    return {"published": figure, "difference": interval.value - figure, "inside": inside}
