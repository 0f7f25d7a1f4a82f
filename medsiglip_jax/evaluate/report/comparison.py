"""The tables of two evaluations side by side."""

from collections.abc import Iterator, Mapping
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
        f"{comparison['images']:,} images{whose}{lost}. Differences are B minus A, paired on the "
        "same images. Intervals and p are DeLong's with Student's t; p is also adjusted by Holm "
        f"for all classes together. {tables.FEW}"
    )
    header = ("class", "A", "B", "B - A", "95 % interval", "p", "p (Holm)", "positives")
    rows = [
        (starred(c), *_compared(c), p_value(c["p"]), p_value(c["p_holm"]), f"{c['positives']:,}")
        for c in comparison["classes"]
    ]
    macro = comparison["macro"]
    rows.append(("mean", *_compared(macro), p_value(macro["p"]), "", ""))
    yield ReportSection("AUC", text, header, rows)
    if comparison["differs"]:
        rows = [(key, *map(_shown, pair)) for key, pair in comparison["differs"].items()]
        yield ReportSection("What was done differently", "", ("", "A", "B"), rows)


def _compared(row: Mapping[str, Any]) -> tables.Cells:
    aucs = number(row["first"]), number(row["second"])
    return *aucs, tables.signed(row["difference"]), tables.interval(row)


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    return tables.markdown("Comparison of two evaluations", sections(comparison))
