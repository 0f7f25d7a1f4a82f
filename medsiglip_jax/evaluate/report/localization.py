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
    found = results.get("localization")
    if not found:
        return None
    segmented = any(row["miou"] for row in found["classes"])
    header = ("class", "images", "hit rate", "95 % interval", "chance", "centre")
    header += ("mIoU", "95 % interval") if segmented else ()
    header += ("better than random maps",)
    rows = [_cells(row, segmented) for row in found["classes"]]
    if mean := found["mean"]:
        overlap = (number(mean["miou"]), "") if segmented else ()
        figures = number(mean["hit_rate"]), "", number(mean["chance"]), number(mean["centre"])
        rows.append(("mean", "", *figures, *overlap, ""))
    return ReportSection("Localization", " ".join(_text(found, segmented)), header, rows)


def _cells(row: Mapping[str, Any], segmented: bool) -> tuple[str, ...]:
    rate, overlap = row["hit_rate"], row["miou"]
    figures = number(rate["value"]), interval(rate), number(row["chance"]), number(row["centre"])
    overlaps = (number(overlap["value"]), interval(overlap)) if segmented else ()
    better = f"{row['better_than_random']:,}"
    return (row["class"], f"{row['images']:,}", *figures, *overlaps, better)


def _text(found: Mapping[str, Any], segmented: bool) -> Iterator[str]:
    yield (
        f"{found['maps']:,} maps of {found['images']:,} images by {_METHODS[found['method']]}: of "
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
    worse = found["maps"] - found["better_than_random"]
    yield f"{worse:,} maps are not better than random ones by insertion and deletion."
    if found["incomplete"]:
        yield f"{found['incomplete']:,} maps do not sum to their logit within 1 %."
    if found["errors"]:
        reasons = "; ".join(f"{row['reason']} ({row['maps']:,})" for row in found["reasons"])
        yield f"{found['errors']:,} maps could not be measured: {reasons}."
    if found["other"]:
        named = ", ".join(f"{name} ({n:,})" for name, n in found["other"].items())
        yield f"Regions of what is no class of the task were left out: {named}."
    yield found["note"]
