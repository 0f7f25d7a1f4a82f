"""The tables of two evaluations side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from medsiglip_jax.evaluate.report import tables
from medsiglip_jax.evaluate.report.tables import ReportSection, number, p_value, starred


def sections(comparison: Mapping[str, Any]) -> Iterator[ReportSection]:
    """The tables of what `results.comparison.compare` returns."""
    groups, left_out = comparison["groups"], comparison["left_out"]
    whose = "" if groups is None else f" of {groups:,} patients or groups"
    lost = ""
    if any(left_out.values()):
        lost = f"; left out: {left_out['first']:,} only in A, {left_out['second']:,} only in B"
    text = (
        f"A: {comparison['first']}. B: {comparison['second']}. "
        f"{_judged(comparison)}{whose}{lost}. Differences are B minus A, paired on the "
        "same images. Intervals and p are DeLong's with Student's t; p is also adjusted by Holm "
        f"for all classes together. {tables.FEW}"
    )
    margin, macro = comparison["margin"], comparison["macro"]
    if margin is not None:
        text += (
            f" Not inferior: the interval rules out that B is worse by {margin:g} or more, as its "
            f"lower limit lies above -{margin:g}."
        )
    header = ("class", "A", "B", "B - A", "95 % interval", *_NOT_INFERIOR[: margin is not None],
              "p", "p (Holm)", "positives")  # fmt: skip
    rows = [
        (starred(c), *_tested(c, margin), p_value(c["p_holm"]), f"{c['positives']:,}")
        for c in comparison["classes"]
    ]
    adjusted = p_value(macro["p_holm"]) if "p_holm" in macro else ""
    rows.append(("mean", *_tested(macro, margin), adjusted, ""))
    yield ReportSection("AUC", text, header, rows)
    if comparison["operating_points"]:
        yield _operating_points(comparison)
    if comparison["one_class_each"]:
        yield _one_class_each(comparison)
    if comparison["differs"]:
        rows = [(key, *map(_shown, pair)) for key, pair in comparison["differs"].items()]
        yield ReportSection("What was done differently", "", ("", "A", "B"), rows)


def _judged(comparison: Mapping[str, Any]) -> str:
    """What is compared, and how many there are of it."""
    images = f"{comparison['images']:,} images"
    if not (unit := comparison["unit"]):
        return images
    aggregates = " in A and ".join(dict.fromkeys(unit["aggregates"]))
    aggregates += " in B" if " in A" in aggregates else ""
    return f"{unit['count']:,} of {images}, judged per {unit['per']} ({aggregates})"


_NOT_INFERIOR = ("not inferior",)
_BY_PATIENT = (
    "p is that of Obuchowski's test by patient, or McNemar's mid-p where each image is of another "
    "patient or patients are not known; intervals are Tango's, by patient."
)


def _tested(row: Mapping[str, Any], margin: float | None) -> tables.Cells:
    answer = {None: "–", True: "yes", False: "no"}[row["not_inferior"]]
    return *_compared(row), *([answer] if margin is not None else []), p_value(row["p"])


def _operating_points(comparison: Mapping[str, Any]) -> ReportSection:
    points = [row for row in comparison["operating_points"] if row["rule"] == "youden"]
    text = (
        "At thresholds that each chose on its own validation images by Youden's rule; the JSON "
        f"document has the other rules. {_BY_PATIENT} p is adjusted by Holm for all rules and "
        f"classes. {tables.FEW}"
    )
    header = ("class", "", "A", "B", "B - A", "95 % interval", "only A right", "only B right", "p",
              "p (Holm)")  # fmt: skip
    rows = [
        (starred(row), row["share"], *_compared(row), f"{row['only_first']:,}",
         f"{row['only_second']:,}", p_value(row["p"]), p_value(row["p_holm"]))
        for row in points
    ]  # fmt: skip
    return ReportSection("Sensitivity and specificity", text, header, rows)


def _one_class_each(comparison: Mapping[str, Any]) -> ReportSection:
    each = comparison["one_class_each"]
    right = each["accuracy"]
    rows = [("accuracy", *_compared(right), p_value(right["p"]), p_value(right["p_holm"]))]
    rows += [(name.replace("_", " "), *_compared(x), "", "") for name, x in each["figures"].items()]
    text = (
        f"Of the class of the highest score. {_BY_PATIENT} Other intervals are the bootstrap's. p "
        "is adjusted by Holm for all evaluations that are compared with A."
    )
    header = ("", "A", "B", "B - A", "95 % interval", "p", "p (Holm)")
    return ReportSection("One class for each image", text, header, rows)


def _compared(row: Mapping[str, Any]) -> tables.Cells:
    aucs = number(row["first"]), number(row["second"])
    return *aucs, tables.signed(row["difference"]), tables.interval(row)


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def all_sections(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[ReportSection]:
    """The tables of one comparison, or of several with the same A."""
    for comparison in comparisons:
        for section in sections(comparison):
            which = f", B: {comparison['second']}" if len(comparisons) > 1 else ""
            yield replace(section, title=section.title + which)


def markdown(*comparisons: Mapping[str, Any]) -> str:
    """Comparisons as Markdown."""
    return tables.markdown("Comparison of two evaluations", all_sections(comparisons))
