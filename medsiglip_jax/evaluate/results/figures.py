"""Figures of images with one class each that are no AUC, as results.json holds them."""

from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.results import aucs
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.task_parts import FIGURES
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.metrics.agreement import top_k_hits

_TOP = (3, 5)


def of_classes(scores: Scores, task: Task) -> dict[str, dict[str, Any]]:
    """Accuracy, F1, kappa and so on, by patient where patients are known; empty without images.

    `quadratic_kappa` is only there for grades, `top_k_accuracy` only for more than k classes.
    """
    single, units, labels = one_class(scores)
    if not len(labels):
        return {}
    statistics = aucs.Statistics(**scores.meta["statistics"])
    intervals = metrics.class_figures(
        single.argmax(axis=1), labels, groups=units, samples=statistics.resamples,
        seed=statistics.seed,
    )  # fmt: skip
    if not task.ordinal_from:
        del intervals["quadratic_kappa"]
    for k in (k for k in _TOP if k < single.shape[1]):
        hits = top_k_hits(single, labels, k)
        intervals[f"top_{k}_accuracy"] = metrics.proportion(hits, units)
    published = {key: getattr(task.figures, key) for key in FIGURES}
    return {
        name: {**aucs.limits(x, "value"), **aucs.against(published.get(name), x)}
        for name, x in intervals.items()
    }


def one_class(scores: Scores) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Scores, patients and class number of the images of exactly one class."""
    rows = scores.labels.sum(axis=1) == 1  # NaN is not
    units = None if scores.units is None else scores.units[rows]
    return scores.scores[rows], units, scores.labels[rows].argmax(axis=1)
