"""What learning from labels gives over prompts: the probe's numbers in results.json."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import aucs
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.scores import Scores, common, known
from medsiglip_jax.metrics.subgroups import FEW


def results(
    found: Learned, task: Mapping[str, Any], statistics: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Compares the probe with the prompts on the same test images; None without a probe.

    Classes that the probe could not learn are left out of both means that are compared. Every
    class is tested by DeLong's paired test, and p-values are adjusted by Holm's method over the
    classes; the difference of the means has a paired bootstrap interval.

    Args:
        found: what was learned, and the scores of the prompts.
        task: its `kind` and what was `published`.
        statistics: `resamples` and `seed`.
    """
    if found.probe is None or found.probe_validation is None or found.knn is None:
        return None
    published, exclusive = task["published"] or {}, task["kind"] == "multi_class"
    probe = _of_learned_classes(found.probe, found.probe)
    zero_shot = _of_learned_classes(found.zero_shot, found.probe)
    knn = _of_learned_classes(found.knn, found.probe)
    pair = metrics.bootstrap_pair(
        metrics.macro_auc, probe.scores, zero_shot.scores, probe.labels,
        groups=probe.units, samples=statistics["resamples"], seed=statistics["seed"],
    )  # fmt: skip
    of_probe = metrics.class_aucs(
        probe.scores, probe.labels, probe.classes, groups=probe.units, student=True
    )
    columns = (common(probe, zero_shot, j) for j in range(len(probe.classes)))
    tests = [metrics.delong_test(*rows, groups=units) for *rows, units in columns]
    return {
        "exclusive": exclusive,
        **{key: found.probe.meta[key] for key in ("images", "how", "scale", "strengths")},
        "unchosen": _unchosen(found.probe_validation, exclusive),
        "macro_auc": aucs.mean_of(pair.first, published.get("probe_mean")),
        "undefined": of_probe.undefined,
        "classes": list(_classes(of_probe, found.probe.labels, tests, published)),
        "zero_shot_macro": aucs.mean_of(pair.second, published.get("mean")),
        "difference": aucs.limits(pair.difference, "value"),
        "knn": {"k": found.knn.meta["k"], "macro_auc": _mean(knn, statistics)},
        "few_shot": _named(found.curves["few_shot"], probe.classes),
        "learning_curve": _named(found.curves["learning_curve"], probe.classes),
    }


def _of_learned_classes(scores: Scores, by: Scores) -> Scores:
    """With no known label of a class that has no scores in `by`, which leaves it out of means."""
    learned = by.learned
    return replace(
        scores,
        scores=np.where(learned, scores.scores, 0),
        labels=np.where(learned, scores.labels, np.nan),
    )


def _unchosen(validation: Scores, exclusive: bool) -> Sequence[str]:
    """Classes that were learned, but with no AUC on validation images to choose a strength by;
    exclusive classes have one strength, and all or none."""
    if exclusive:
        one = validation.select(np.flatnonzero(validation.labels.sum(axis=1) == 1))
        chosen = np.full(len(one.classes), len(np.unique(one.labels.argmax(axis=1))) > 1)
    else:
        labels = [known(validation, j).positive for j in range(len(validation.classes))]
        chosen = np.array([len(np.unique(column)) > 1 for column in labels])
    unchosen = validation.learned & ~chosen
    return [name for name, is_one in zip(validation.classes, unchosen, strict=True) if is_one]


def _mean(scores: Scores, statistics: Mapping[str, Any]) -> dict[str, Any]:
    return aucs.mean(scores.scores, scores.labels, scores.units, statistics, None)


def _classes(
    found: metrics.ClassAucs,
    labels: Float[np.ndarray, "n c"],
    tests: Sequence[metrics.Comparison],
    published: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Rows of the classes; those that could not be learned are counted in `labels` all the same."""
    counts = [[int((column == value).sum()) for value in (1, 0)] for column in labels.T]
    figures = published.get("probe_auc", {})
    adjusted = metrics.holm([test.p for test in tests])
    rows = zip(found.classes, counts, tests, adjusted.tolist(), strict=True)
    for one, (positives, negatives), test, p_holm in rows:
        yield {
            "class": one.name,
            **aucs.limits(one.auc),
            "positives": positives,
            "negatives": negatives,
            "few": min(positives, negatives) < FEW,
            **aucs.against(figures.get(one.name), one.auc),
            "minus_zero_shot": aucs.limits(test.difference, "value"),
            "p": test.p,
            "p_holm": p_holm,
        }


def _named(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a curve, with names of the classes that have no AUC."""
    return [{**row, "undefined": [classes[i] for i in row["undefined"]]} for row in rows]
