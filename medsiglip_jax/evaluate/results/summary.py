"""Scores -> numbers: everything that results.json holds, and nothing but scores is needed."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import aucs, held_out, probed
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.scores import Scores, known
from medsiglip_jax.metrics.subgroups import FEW

_AGES = ((40, "under 40"), (65, "40 to 64"), (math.inf, "65 and over"))
_NOTHING = {"mean": None, "auc": {}}


def results(
    scores: Scores,
    attributes: Mapping[str, Sequence[str]],
    cells: Sequence[Scores] = (),
    learned: Learned | None = None,
    retrieval: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Computes results.json.

    AUCs have DeLong's interval with Student's t, by patient where patients are known; means over
    classes have a bootstrap interval: whole patients are drawn, and the mean is inside the loop.

    Args:
        scores: of the run; of pairs without classes.
        attributes: name -> value per image, for subgroups.
        cells: of the grid.
        learned: from training and validation images.
        retrieval: of `retrieval.summary`.

    Returns:
        JSON without NaN: None stands where a number is undefined.
    """
    task, statistics = scores.meta["task"], scores.meta["statistics"]
    found = metrics.class_aucs(
        scores.scores, scores.labels, scores.classes, groups=scores.units, student=True
    )
    probe = learned and probed.results(learned, task, statistics)
    content = {
        "task": task["name"],
        "title": task["title"],
        **_size(scores),
        "macro_auc": _macro(scores, task, statistics, learned, probe),
        "classes_in_mean": len(found.classes) - len(found.undefined),
        "undefined": found.undefined,
        "means": {
            name: _mean(scores, task, statistics, np.isin(scores.classes, classes))
            for name, classes in task["means"].items()
        },
        "classes": [_class(scores, task, j, c) for j, c in enumerate(found.classes)],
        "one_class_each": _of_one_class_each(scores, task),
        "published": task["published"],
        "held_out": learned and _held_out(learned, task),
        "probe": probe,
        "retrieval": retrieval,
        "subgroups": _subgroups(scores, attributes, statistics),
        "grid": [_cell(cell, task) for cell in cells],
        **{key: scores.meta[key] for key in ("counts", "provenance", "statistics")},
        **{key: task[key] for key in ("notes", "trained_on", "source", "prompts_source")},
    }
    return aucs.plain(content)


def _size(scores: Scores) -> dict[str, int | None]:
    groups = None if scores.groups is None else len(set(scores.groups))
    return {"images": len(scores.ids), "groups": groups}


def _held_out(learned: Learned, task: Mapping[str, Any]) -> dict[str, Any]:
    """Operating points and calibration of the prompts and of the probe."""

    def judge(validation: Scores, test: Scores, rule: str) -> dict[str, Any]:
        return held_out.judge(validation, test, rule, task["kind"], learned.prevalence)

    found = {
        "how": learned.how,
        "validation": _size(learned.validation),
        "test": _size(learned.zero_shot),
        "zero_shot": judge(learned.validation, learned.zero_shot, task["score"]),
        "probe": None,
    }
    if learned.probe is not None and learned.probe_validation is not None:
        found["probe"] = judge(learned.probe_validation, learned.probe, "probe")
    return found


def _macro(
    scores: Scores,
    task: Mapping[str, Any],
    statistics: Mapping[str, int],
    learned: Learned | None,
    probe: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """The mean over all classes, None of pairs. Where the probe was compared with the prompts on
    the same images and classes, it is known already; the bootstrap is what takes time."""
    if not scores.classes:
        return None
    if probe and learned and learned.probe and learned.zero_shot is scores:
        if learned.probe.learned.all():
            return probe["zero_shot_macro"]
    return _mean(scores, task, statistics)


def _mean(
    scores: Scores,
    task: Mapping[str, Any],
    statistics: Mapping[str, int],
    inside: Bool[np.ndarray, " c"] | None = None,
) -> dict[str, Any]:
    """The mean AUC of some classes, by default all, and what was published of it."""
    published = task["published"] or _NOTHING
    figure = published["mean"]
    columns = np.arange(len(scores.classes)) if inside is None else np.flatnonzero(inside)
    if inside is not None:
        figures = [published["auc"].get(scores.classes[j]) for j in columns.tolist()]
        figure = None if None in figures else round(float(np.mean(figures)), 4)
    values, labels = scores.scores[:, columns], scores.labels[:, columns]
    return aucs.mean(values, labels, scores.units, statistics, figure)


def _class(
    scores: Scores, task: Mapping[str, Any], column: int, found: metrics.ClassAuc
) -> dict[str, Any]:
    rows, published = known(scores, column), task["published"] or _NOTHING
    return {
        "class": found.name,
        **aucs.limits(found.auc),
        "positives": found.positives,
        "negatives": found.negatives,
        "unknown": found.missing,
        "few": min(found.positives, found.negatives) < FEW,
        "average_precision": metrics.average_precision(rows.scores, rows.positive),
        **aucs.against(published["auc"].get(found.name), found.auc),
    }


def _of_one_class_each(scores: Scores, task: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracy, and for grades agreement and the AUC of the grades from one on."""
    if task["kind"] != "multi_class":
        return None
    rows = scores.labels.sum(axis=1) == 1
    values, labels = scores.scores[rows], scores.labels[rows].argmax(axis=1)
    found = {"accuracy": metrics.accuracy(values, labels)}
    if first := task["ordinal_from"]:
        grades = values.argmax(axis=1)
        found["quadratic_kappa"] = metrics.quadratic_kappa(grades, labels)
        above = values[:, first:].sum(axis=1) - values[:, :first].sum(axis=1)
        units = None if (u := scores.units) is None else u[rows]
        interval = metrics.delong(above, labels >= first, groups=units, student=True)
        found |= {"from": scores.classes[first], "auc_from": aucs.limits(interval)}
    return found


def _subgroups(
    scores: Scores, attributes: Mapping[str, Sequence[str]], statistics: Mapping[str, int]
) -> list[dict[str, Any]]:
    found = []
    for name, values in attributes.items():
        bands = [_age(v) for v in values] if name == "age" else [v or "unknown" for v in values]
        for j, column in enumerate(scores.classes):
            of_class = metrics.subgroup_aucs(
                scores.scores[:, j],
                scores.labels[:, j],
                bands,
                groups=scores.units,
                samples=max(1, statistics["resamples"] // 4),  # there are many
                seed=statistics["seed"],
            )
            found += [{"attribute": name, "class": column, **_subgroup(g)} for g in of_class]
    return found


def _subgroup(found: metrics.Subgroup) -> dict[str, Any]:
    gap = {"gap": found.gap.value, "gap_low": found.gap.low, "gap_high": found.gap.high}
    counts = {"positives": found.positives, "negatives": found.negatives, "few": found.flagged}
    return {"subgroup": found.name, **aucs.limits(found.auc), **gap, **counts}


def _age(cell: str) -> str:
    """The band of an age; NIH writes "058Y"."""
    match = re.match(r"\d+", cell)
    return next(band for end, band in _AGES if int(match[0]) < end) if match else "unknown"


def _cell(cell: Scores, task: Mapping[str, Any]) -> dict[str, Any]:
    """One cell of the grid: AUCs and how far they are from what was published."""
    found = {
        name: metrics.auc(rows.scores, rows.positive)
        for name, rows in ((n, known(cell, j)) for j, n in enumerate(cell.classes))
    }
    published = task["published"] or _NOTHING
    apart = [abs(found[name] - figure) for name, figure in published["auc"].items()]
    mean, figure = metrics.macro_auc(cell.scores, cell.labels), published["mean"]
    return {
        **cell.meta["cell"],
        "macro_auc": mean,
        "difference": None if figure is None else mean - figure,
        "mean_distance": float(np.mean(apart)) if apart else None,
        "classes": found,
    }
