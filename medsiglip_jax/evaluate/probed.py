"""What learning from labels gives over prompts: the probe's numbers in results.json."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import aucs
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.scores import Scores


def results(
    found: Learned, published: Mapping[str, Any] | None, statistics: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Compares the probe with the prompts on the same test images; None without a probe.

    Classes that the probe could not learn are left out of both means that are compared. Every
    class is tested by DeLong's paired test, and p-values are adjusted by Holm's method over the
    classes; the difference of the means has a paired bootstrap interval.

    Args:
        found: what was learned, and the scores of the prompts.
        published: the task's figures.
        statistics: `resamples` and `seed`.
    """
    if found.probe is None or found.knn is None:
        return None
    published = published or {}
    probe = _of_learned_classes(found.probe, found.probe)
    zero_shot = _of_learned_classes(found.zero_shot, found.probe)
    knn = _of_learned_classes(found.knn, found.probe)
    return {
        **{key: found.probe.meta[key] for key in ("images", "how", "scale", "strengths")},
        "macro_auc": _mean(probe, statistics, published.get("probe_mean")),
        "undefined": _undefined(probe),
        "classes": list(_classes(probe, zero_shot, published.get("probe_auc", {}))),
        "zero_shot_macro": _mean(zero_shot, statistics, published.get("mean")),
        "difference": _difference(probe, zero_shot, statistics),
        "knn": {"k": found.knn.meta["k"], "macro_auc": _mean(knn, statistics, None)},
        "few_shot": _named(found.curves["few_shot"], probe.classes),
        "learning_curve": _named(found.curves["learning_curve"], probe.classes),
    }


def _of_learned_classes(scores: Scores, by: Scores) -> Scores:
    """With no known label of a class that has no scores in `by`, which leaves it out of means."""
    learned = ~np.isnan(by.scores).any(axis=0)
    return replace(
        scores,
        scores=np.where(learned, scores.scores, 0),
        labels=np.where(learned, scores.labels, np.nan),
    )


def _mean(scores: Scores, statistics: Mapping[str, Any], figure: float | None) -> dict[str, Any]:
    return aucs.mean(scores.scores, scores.labels, scores.units, statistics, figure)


def _undefined(scores: Scores) -> Sequence[str]:
    return metrics.class_aucs(scores.scores, scores.labels, scores.classes).undefined


def _classes(
    probe: Scores, zero_shot: Scores, published: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    found = metrics.class_aucs(
        probe.scores, probe.labels, probe.classes, groups=probe.units, student=True
    )
    tests = [_compared(probe, zero_shot, j) for j in range(len(probe.classes))]
    adjusted = metrics.holm([test.p for test in tests])
    for one, test, p_holm in zip(found.classes, tests, adjusted.tolist(), strict=True):
        yield {
            "class": one.name,
            **aucs.limits(one.auc),
            "positives": one.positives,
            "negatives": one.negatives,
            **aucs.against(published.get(one.name), one.auc),
            "minus_zero_shot": aucs.limits(test.difference, "value"),
            "p": test.p,
            "p_holm": p_holm,
        }


def _compared(probe: Scores, zero_shot: Scores, column: int) -> metrics.Comparison:
    labels, units = probe.labels[:, column], probe.units
    rows = ~np.isnan(labels)
    first, second = (scores.scores[rows, column] for scores in (probe, zero_shot))
    groups = None if units is None else units[rows]
    return metrics.delong_test(first, second, labels[rows], groups=groups)


def _difference(
    probe: Scores, zero_shot: Scores, statistics: Mapping[str, Any]
) -> dict[str, float]:
    interval = metrics.bootstrap_difference(
        metrics.macro_auc, probe.scores, zero_shot.scores, probe.labels,
        groups=probe.units, samples=statistics["resamples"], seed=statistics["seed"],
    )  # fmt: skip
    return aucs.limits(interval, "value")


def _named(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a curve, with names of the classes that have no AUC."""
    return [{**row, "undefined": [classes[i] for i in row["undefined"]]} for row in rows]
