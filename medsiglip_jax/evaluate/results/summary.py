"""Scores -> the content of results.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import tasks
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.results import aucs, cohort, figures, held_out, probe
from medsiglip_jax.evaluate.results.held_out import COMBINED
from medsiglip_jax.evaluate.scores import Scores, known
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files.json import plain
from medsiglip_jax.metrics.subgroups import FEW


def summarize(
    scores: Scores,
    attributes: Mapping[str, Sequence[str]],
    cells: Sequence[Scores] = (),
    learned: Learned | None = None,
    retrieval: Mapping[str, Any] | None = None,
    localization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Computes the content of results.json.

    AUCs, their means and gaps have score intervals of DeLong's variance with Student's t, by
    patient where patients are known.

    Args:
        scores: the scores of the run; of pairs they have no classes.
        attributes: name -> value per image, for subgroups.
        cells: the scores of the variants of a grid.
        learned: from training and validation images.
        retrieval: see `retrieval.summary`.
        localization: see `results.maps.summary`.

    Returns:
        JSON without NaN: None stands where a number is undefined.
    """
    task = tasks.from_dict(scores.meta["task"])
    of_classes = aucs.of_classes(scores)
    levels = {name: cohort.bands(name, values) for name, values in attributes.items()}
    # All that are compared count in the adjustment of p-values.
    bands = {name: column for name, column in levels.items() if len(set(column)) <= cohort.MOST}
    of_probe = learned and probe.compare(learned, task)
    macro = aucs.mean(scores, task.figures.mean) if scores.classes else None  # None for pairs
    unit = scores.meta.get("unit") or {"aggregate": "mean"}
    combined = unit["aggregate"] != "mean"
    content = {
        "task": task.name,
        "title": task.title,
        **_size(scores),
        "unit": scores.meta.get("unit"),
        "macro_auc": macro,
        "classes_in_mean": len(of_classes.classes) - len(of_classes.undefined),
        "undefined": of_classes.undefined,
        "means": {name: _mean(scores, task, c) for name, c in task.means.items()},
        "classes": [_class(scores, task, j, c) for j, c in enumerate(of_classes.classes)],
        "one_class_each": _one_class_each(scores, task),
        "published": task.published and asdict(task.published),
        "held_out": learned
        and _held_out(learned, task, _of_images(scores, bands, learned), combined),
        "probe": of_probe,
        "retrieval": retrieval,
        "localization": localization,
        "flow": cohort.flow(scores.meta["counts"], _images(scores)),
        "characteristics": cohort.characteristics(attributes, scores.groups),
        "subgroups": _subgroups(scores, bands),
        "not_compared": [name for name in levels if name not in bands],
        "grid": [_cell(cell, task) for cell in cells],
        **{key: scores.meta[key] for key in ("counts", "provenance", "statistics")},
        "leaks": scores.meta.get("leaks", []),
        **{key: getattr(task, key) for key in ("notes", "trained_on", "source", "prompts_source")},
    }
    return plain(content)


def _images(scores: Scores) -> int:
    """How many images were evaluated, whatever is judged."""
    unit = scores.meta.get("unit")
    return unit["images"] if unit else len(scores.ids)


def _size(scores: Scores) -> dict[str, int | None]:
    groups = None if scores.groups is None else len(set(scores.groups))
    return {"images": len(scores.ids), "groups": groups}


def _of_images(
    scores: Scores, attributes: Mapping[str, Sequence[str]], learned: Learned
) -> dict[str, list[str]]:
    """Attributes of the test images, which may be some of all."""
    row_of = {id: row for row, id in enumerate(scores.ids)}
    rows = [row_of[id] for id in learned.zero_shot.ids]
    return {name: [values[row] for row in rows] for name, values in attributes.items()}


def _held_out(
    learned: Learned, task: Task, attributes: Mapping[str, Sequence[str]], combined: bool
) -> dict[str, Any]:
    """Operating points and calibration of the prompts and of the probe.

    `combined`: whether scores are no longer those of a distribution over the classes.
    """

    def judge(validation: Scores, test: Scores, rule: str) -> dict[str, Any]:
        rule = COMBINED if combined and task.exclusive else rule
        return held_out.judge(
            validation, test, rule, task.exclusive, learned.prevalence, attributes
        )

    of_probe = None
    if learned.probe is not None and learned.probe_validation is not None:
        of_probe = judge(learned.probe_validation, learned.probe, "probe")
    return {
        "how": learned.origin,
        "validation": _size(learned.validation),
        "test": _size(learned.zero_shot),
        "zero_shot": judge(learned.validation, learned.zero_shot, task.score),
        "probe": of_probe,
    }


# ------------------------------------------------------------------------------------------ means


def _mean(scores: Scores, task: Task, classes: Sequence[str]) -> dict[str, Any]:
    """The mean over some classes, beside the mean of what was published of them."""
    columns = np.flatnonzero(np.isin(scores.classes, classes))
    figures = [task.figures.auc.get(scores.classes[j]) for j in columns.tolist()]
    figure = None if None in figures else round(float(np.mean(np.array(figures))), 4)
    some = replace(scores, scores=scores.scores[:, columns], labels=scores.labels[:, columns])
    return aucs.mean(some, figure)


# ---------------------------------------------------------------------------------------- classes


def _class(scores: Scores, task: Task, column: int, estimate: metrics.ClassAuc) -> dict[str, Any]:
    rows = known(scores, column)
    return {
        "class": estimate.name,
        **aucs.limits(estimate.auc),
        "positives": estimate.positives,
        "negatives": estimate.negatives,
        "unknown": estimate.missing,
        "few": estimate.fewest < FEW,
        "average_precision": metrics.average_precision(rows.scores, rows.positive),
        **aucs.against(task.figures.auc.get(estimate.name), estimate.auc),
    }


def _one_class_each(scores: Scores, task: Task) -> dict[str, Any] | None:
    """Accuracy and the like; of grades also the AUC of the upper ones against the lower."""
    if not task.exclusive:
        return None
    rows = scores.labels.sum(axis=1) == 1
    values, labels = scores.scores[rows], scores.labels[rows].argmax(axis=1)
    content = {
        "accuracy": metrics.accuracy(values, labels),
        "figures": figures.of_classes(scores, task),
        "others": task.figures.others,
    }
    if first := task.ordinal_from:
        content["quadratic_kappa"] = metrics.quadratic_kappa(values.argmax(axis=1), labels)
        stated = scores.stated[rows]
        above = stated[:, first:].sum(axis=1) - stated[:, :first].sum(axis=1)
        units = None if scores.units is None else scores.units[rows]
        interval = metrics.delong(above, labels >= first, groups=units, student=True)
        content |= {"from": scores.classes[first], "auc_from": aucs.limits(interval)}
    return content


def _subgroups(scores: Scores, attributes: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """All subgroups and classes; p-values of gaps are adjusted for all of them together."""
    rows = []
    columns = [*zip(scores.classes, scores.scores.T, scores.labels.T, strict=True)]
    for name, bands in attributes.items():
        for of_class, x, y in columns:
            subgroups = metrics.subgroup_aucs(x, y, bands, groups=scores.units)
            rows += [{"attribute": name, "class": of_class, **_subgroup(s)} for s in subgroups]
    adjusted = metrics.holm([row["p"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, adjusted.tolist(), strict=True)]


def _subgroup(subgroup: metrics.Subgroup) -> dict[str, Any]:
    gap = {"gap": subgroup.gap.value, "gap_low": subgroup.gap.low, "gap_high": subgroup.gap.high}
    counts = {"positives": subgroup.positives, "negatives": subgroup.negatives}
    auc = {"subgroup": subgroup.name, **aucs.limits(subgroup.auc)}
    return {**auc, **gap, "p": subgroup.p, **counts, "few": subgroup.flagged}


def _cell(cell: Scores, task: Task) -> dict[str, Any]:
    """One cell of the grid: its AUCs and their distance from the published ones."""
    of_classes = {name: known(cell, j) for j, name in enumerate(cell.classes)}
    classes = {name: metrics.auc(rows.scores, rows.positive) for name, rows in of_classes.items()}
    distances = [abs(classes[name] - figure) for name, figure in task.figures.auc.items()]
    mean, figure = metrics.macro_auc(cell.scores, cell.labels), task.figures.mean
    return {
        **cell.meta["cell"],
        "macro_auc": mean,
        "difference": None if figure is None else mean - figure,
        "mean_distance": float(np.mean(distances)) if distances else None,
        "classes": classes,
    }
