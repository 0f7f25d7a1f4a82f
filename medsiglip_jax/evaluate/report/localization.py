"""Whether maps lie where the finding is: the table of a report."""

from collections.abc import Iterator, Mapping
from typing import Any

from medsiglip_jax.evaluate.report.tables import ReportSection, interval, number

_METHODS = {
    "ig": "integrated gradients",
    "occlusion": "occlusion",
    "rollout": "attention rollout, which does not depend on the finding",
}


def section(results: Mapping[str, Any]) -> ReportSection | None:
    """The table of maps; None where none were made."""
    maps = results.get("localization")
    if not maps:
        return None
    segmented = any(row["miou"] for row in maps["classes"])
    header = ("class", "images", "hit rate", "95 % interval", "chance", "centre")
    header += ("mIoU", "95 % interval") if segmented else ()
    header += ("better than random maps",)
    rows = [_cells(row, segmented) for row in maps["classes"]]
    if mean := maps["mean"]:
        overlap = (number(mean["miou"]), "") if segmented else ()
        figures = number(mean["hit_rate"]), "", number(mean["chance"]), number(mean["centre"])
        rows.append(("mean", "", *figures, *overlap, ""))
    return ReportSection("Localization", " ".join(_text(maps, segmented)), header, rows)


def _cells(row: Mapping[str, Any], segmented: bool) -> tuple[str, ...]:
    rate, overlap = row["hit_rate"], row["miou"]
    figures = number(rate["value"]), interval(rate), number(row["chance"]), number(row["centre"])
    overlaps = (number(overlap["value"]), interval(overlap)) if segmented else ()
    better = f"{row['better_than_random']:,}"
    return (row["class"], f"{row['images']:,}", *figures, *overlaps, better)


def _text(maps: Mapping[str, Any], segmented: bool) -> Iterator[str]:
    yield (
        f"{maps['maps']:,} maps of {maps['images']:,} images by {_METHODS[maps['method']]}: of "
        "each class in each image for which the data set says where it lies. Hit rate: how often "
        "the maximum of the map lies there (pointing game). Chance: the mean share of the image "
        "that the region covers, which is the hit rate of a random point; centre: the hit rate of "
        "the centre of the image. Intervals are by patient where patients are known."
    )
    if segmented:
        yield (
            "mIoU: mean intersection over union of the region and what the map marks by Otsu's "
            "threshold; by marking whole images it would equal chance."
        )
    worse = maps["maps"] - maps["better_than_random"]
    yield f"{worse:,} maps are not better than random ones by insertion and deletion."
    if maps["incomplete"]:
        yield f"{maps['incomplete']:,} maps do not sum to their logit within 1 %."
    if maps["errors"]:
        reasons = "; ".join(f"{row['reason']} ({row['maps']:,})" for row in maps["reasons"])
        yield f"{maps['errors']:,} maps could not be measured: {reasons}."
    if maps["other"]:
        named = ", ".join(f"{name} ({n:,})" for name, n in maps["other"].items())
        yield f"Regions of what is no class of the task were left out: {named}."
    yield maps["note"]
