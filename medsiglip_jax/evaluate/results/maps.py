"""Whether maps lie where the finding is, as results.json holds it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from medsiglip_jax import metrics
from medsiglip_jax.evaluate.localization import MapFacts
from medsiglip_jax.evaluate.results import aucs
from medsiglip_jax.trust.maps.gradients import TOLERANCE

_SHOWN = 5  # reasons of maps that were not made


def summary(table: pa.Table, facts: MapFacts, classes: Sequence[str]) -> dict[str, Any]:
    """Measures of maps -> the localization of results.json.

    Hit rates have Wilson's interval and mean overlaps Student's, by patient where patients are
    known (`metrics.proportion`, `metrics.mean`).

    Args:
        table: from `localization.compute`.
        facts: what is recorded with it.
        classes: the classes of the task, in order.

    Returns:
        "method", "images", "maps", "errors", "reasons", "better_than_random", "incomplete", "note",
        "other", and for each of "classes" with a region and their "mean": "hit_rate" and "miou"
        ({value, low, high}; "miou" is None of boxes), "chance": the mean share of the image that
        the region covers, and "centre": the hit rate of the centre of the image.
    """
    made = table.filter(table["error"].is_null())
    reasons = Counter(filter(None, table["error"].to_pylist()))
    names = np.array(made["class"].to_pylist(), object)
    rows = [
        _row(name, made.filter(pa.array(names == name)), facts.segmented)
        for name in classes
        if (names == name).any()
    ]
    completeness = made["completeness"].to_pylist()
    return {
        "method": facts.method,
        "images": len(set(made["id"].to_pylist())),
        "maps": len(made),
        "errors": len(table) - len(made),
        "reasons": [{"reason": text, "maps": n} for text, n in reasons.most_common(_SHOWN)],
        "better_than_random": sum(made["better_than_random"].to_pylist()),
        "incomplete": sum(x is not None and not x <= TOLERANCE for x in completeness),
        "note": facts.note,
        "other": facts.other,
        "regions": facts.regions,
        "classes": rows,
        "mean": _mean(rows),
    }


def _row(name: str, maps: pa.Table, segmented: bool) -> dict[str, Any]:
    columns = {key: maps[key].to_pylist() for key in ("hit", "chance", "centre", "iou", "group")}
    groups = columns["group"] if None not in columns["group"] else None
    hits = metrics.proportion(np.array(columns["hit"], bool), groups)
    return {
        "class": name,
        "images": len(maps),
        "groups": None if groups is None else len(set(groups)),
        "hit_rate": aucs.limits(hits, "value"),
        "chance": float(np.mean(columns["chance"])),
        "centre": float(np.mean(columns["centre"])),
        "miou": _overlap(columns["iou"], groups) if segmented else None,
        "better_than_random": sum(maps["better_than_random"].to_pylist()),
    }


def _overlap(ious: Sequence[float | None], groups: Sequence[str] | None) -> dict[str, float]:
    """Of the maps that mark something, as the official evaluation of true positives has it."""
    there = [(i, iou) for i, iou in enumerate(ious) if iou is not None]
    of_groups = None if groups is None else [groups[i] for i, _ in there]
    interval = aucs.limits(metrics.mean([iou for _, iou in there], of_groups), "value")
    return {key: float(np.clip(value, 0, 1)) for key, value in interval.items()}


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Of the classes, each counting the same."""
    if not rows:
        return None
    mean = {key: float(np.mean([row[key] for row in rows])) for key in ("chance", "centre")}
    rates = {"hit_rate": [row["hit_rate"]["value"] for row in rows]}
    rates |= {"miou": [row["miou"]["value"] for row in rows if row["miou"]]}
    return mean | {key: float(np.mean(values)) for key, values in rates.items() if values}
