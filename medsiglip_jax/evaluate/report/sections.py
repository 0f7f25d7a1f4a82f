"""results.json -> the tables of a report, whatever they are written in."""

from collections.abc import Iterator, Mapping
from typing import Any

from medsiglip_jax.evaluate.report.learned_sections import learned, probe_line
from medsiglip_jax.evaluate.report.tables import AGAINST, Row, Section, against, interval, number

__all__ = ["Row", "Section", "classes", "interval", "number", "sections"]


def sections(results: Mapping[str, Any]) -> Iterator[Section]:
    """All of a report but its pictures."""
    yield _summary(results)
    for make in (classes, _grades, _grid):
        if (section := make(results)) is not None:
            yield section
    yield from learned(results)
    for make in (_subgroups, _left_out):
        if (section := make(results)) is not None:
            yield section
    yield _provenance(results)


def _summary(results: Mapping[str, Any]) -> Section:
    macro, groups = results["macro_auc"], results["groups"]
    whose = "" if groups is None else f" of {groups:,} patients or groups"
    text = [f"{results['images']:,} images{whose}."]
    if macro is not None:
        text.append(
            f"Macro AUC {number(macro['auc'])} ({interval(macro)}) over "
            f"{results['classes_in_mean']} classes, zero-shot: by prompts alone."
        )
    if probe := results["probe"]:
        text.append(f"Linear probe: {probe_line(probe)}.")
    if results["undefined"]:
        text.append(
            "Not in the mean, because all their images have the same label: "
            f"{', '.join(results['undefined'])}."
        )
    if published := results["published"]:
        same = "" if published["same_images"] else " on other images, so not the same thing"
        text.append(f"Published: {published['where']}{same}. {published['note']}".strip())
        if published["images"] not in (None, results["images"]) and published["same_images"]:
            text.append(f"The published figures are of {published['images']:,} images.")
    if results["trained_on"]:
        text.append(f"Seen by MedSigLIP in training: {results['trained_on']}.")
    text += results["notes"]
    return Section("Result", " ".join(text))


def classes(results: Mapping[str, Any]) -> Section | None:
    """The table of classes and means; None of pairs."""
    if not results["classes"]:
        return None
    means = {"mean": results["macro_auc"], **results["means"]}
    compared = any(f["published"] is not None for f in (*results["classes"], *means.values()))
    columns = against if compared else lambda found: ()
    counts = ("positives", "negatives", "unknown")
    header = ("class", "AUC", "95 % interval", *(AGAINST if compared else ()), *counts, "AP")
    rows = [
        (
            found["class"] + (" *" if found["few"] else ""),
            number(found["auc"]),
            interval(found),
            *columns(found),
            *(f"{found[key]:,}" for key in counts),
            number(found["average_precision"]),
        )
        for found in results["classes"]
    ]
    for name, found in means.items():
        rows.append((name, number(found["auc"]), interval(found), *columns(found), *[""] * 4))
    text = (
        "Intervals: of a class DeLong's on the logit scale with Student's t, of a mean the "
        "bootstrap's; of whole patients where they are known. AP: average precision. * fewer than "
        "10 positives or negatives: read little into it."
    )
    return Section("Classes", text, header, rows)


def _grades(results: Mapping[str, Any]) -> Section | None:
    found = results["one_class_each"]
    if found is None:
        return None
    rows = [("accuracy of the highest score", number(found["accuracy"]))]
    if "from" in found:
        rows += [
            ("quadratic weighted kappa", number(found["quadratic_kappa"])),
            (
                f"AUC of {found['from']} and above",
                f"{number(found['auc_from']['auc'])} ({interval(found['auc_from'])})",
            ),
        ]
    return Section("One class for each image", "", ("", ""), rows)


def _grid(results: Mapping[str, Any]) -> Section | None:
    if not (cells := results["grid"]):
        return None
    names = [found["class"] for found in results["classes"]]
    shown = names if len(names) <= 16 else []
    choices = ("preprocess", "reading", "temperature")
    header = (*choices, "macro AUC", "difference", "mean distance", *shown)
    rows = [
        (
            *(cell[key] for key in choices),
            *(number(cell[key]) for key in ("macro_auc", "difference", "mean_distance")),
            *(number(cell["classes"][name]) for name in shown),
        )
        for cell in cells
    ]
    text = (
        "The published figures do not say which of these they are of. Difference: macro AUC minus "
        "the published mean; mean distance: of the AUCs of the classes, without sign."
    )
    return Section("All variants", text, header, rows)


def _subgroups(results: Mapping[str, Any]) -> Section | None:
    if not results["subgroups"]:
        return None
    header = ("", "subgroup", "class", "AUC", "95 % interval", "minus the others",
              "95 % interval", "positives", "negatives")  # fmt: skip
    rows = [
        (
            found["attribute"].replace("_", " "),
            found["subgroup"] + (" *" if found["few"] else ""),
            found["class"],
            number(found["auc"]),
            interval(found),
            number(found["gap"]),
            interval(found, "gap_low", "gap_high"),
            f"{found['positives']:,}",
            f"{found['negatives']:,}",
        )
        for found in results["subgroups"]
    ]
    text = (
        "Intervals of differences are of the bootstrap, with a quarter of the resamples. * fewer "
        "than 10 positives or negatives: read little into it."
    )
    return Section("Subgroups", text, header, rows)


def _left_out(results: Mapping[str, Any]) -> Section | None:
    rows = [(name, f"{count:,}") for name, count in results["counts"].items() if count]
    return Section("Left out", "", ("what", "how many"), rows) if rows else None


def _provenance(results: Mapping[str, Any]) -> Section:
    rows = [(name, _shown(value)) for name, value in results["provenance"].items()]
    rows += [(name, _shown(value)) for name, value in results["statistics"].items()]
    rows += [("data from", results["source"]), ("prompts by", results["prompts_source"])]
    return Section("Provenance", "", ("", ""), [row for row in rows if row[1]])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        there = ((key, _shown(item)) for key, item in value.items() if item is not None)
        return ", ".join(f"{key} {item}" for key, item in there)
    return "" if value is None else str(value)
