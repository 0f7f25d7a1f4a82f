"""AUCs as results.json holds them: with an interval, beside what was published."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from medsiglip_jax import metrics
from medsiglip_jax.metrics import Interval


def mean(
    scores: Float[np.ndarray, "n c"],
    labels: Float[np.ndarray, "n c"],
    units: Int64[np.ndarray, " n"] | None,
    statistics: Mapping[str, Any],
    figure: float | None,
) -> dict[str, Any]:
    """The mean AUC of classes with a bootstrap interval, the mean being inside the loop.

    Args:
        scores: of images for classes.
        labels: 0, 1 and NaN (unknown).
        units: patient of each image; whole patients are drawn.
        statistics: `resamples` and `seed`.
        figure: what was published.
    """
    interval = metrics.bootstrap(
        metrics.macro_auc, scores, labels,
        groups=units, samples=statistics["resamples"], seed=statistics["seed"],
    )  # fmt: skip
    return mean_of(interval, figure)


def mean_of(interval: Interval, figure: float | None) -> dict[str, Any]:
    """A mean AUC whose bootstrap interval is known."""
    return {**limits(interval), "dropped": interval.dropped} | against(figure, interval)


def limits(interval: Interval, name: str = "auc") -> dict[str, float]:
    """An estimate under that name, and its limits."""
    return {name: interval.value, "low": interval.low, "high": interval.high}


def against(figure: float | None, interval: Interval) -> dict[str, Any]:
    """A published figure, how far this one is from it, and whether it lies in the interval."""
    if figure is None:
        return {"published": None, "difference": None, "inside": None}
    inside = None if math.isnan(interval.low) else figure in interval
    return {"published": figure, "difference": interval.value - figure, "inside": inside}


def plain(value: Any) -> Any:
    """JSON has neither NaN nor tuples nor NumPy's numbers."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
