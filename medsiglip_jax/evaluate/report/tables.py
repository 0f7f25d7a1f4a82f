"""The section of a report, and how numbers are written in it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medsiglip_jax.evaluate.zero_shot import CLASSIFIER
from medsiglip_jax.pages import markdown as md

Cells = Sequence[str]
CAUTION = "Not a medical device. Scores are not probabilities of disease."
FEW = "* fewer than 10 patients (or images, if unknown) with it or without it: read little into it."


@dataclass(frozen=True)
class ReportSection:
    """A heading, a paragraph and a table; paragraph and table may be empty."""

    title: str
    text: str = ""
    header: Cells = ()
    rows: Sequence[Cells] = ()


def markdown(title: str, sections: Iterable[ReportSection]) -> str:
    """A report as Markdown."""
    parts = [f"# {md.escape(title)}", *(in_markdown(section) for section in sections), CAUTION]
    return "\n\n".join(parts) + "\n"


def in_markdown(section: ReportSection, level: int = 2) -> str:
    """A section, below a heading of a level."""
    table = md.table(section.header, section.rows) if section.rows else ""
    heading = f"{'#' * level} {md.escape(section.title)}"
    return "\n\n".join(filter(None, (heading, md.escape(section.text), table)))


def scores_of(results: Mapping[str, Any]) -> str:
    """Whose scores the test images have."""
    return "the classifier's scores" if _by_classifier(results) else "zero-shot scores"


def how_scored(results: Mapping[str, Any]) -> str:
    """How the test images were scored."""
    own = _by_classifier(results)
    return "by the model's own classifier" if own else "zero-shot: by prompts alone"


def _by_classifier(results: Mapping[str, Any]) -> bool:
    return results["provenance"].get("score") == CLASSIFIER


def judged(results: Mapping[str, Any]) -> str:
    """What has a score, in the plural."""
    unit = results.get("unit")
    if unit is None:
        return "images"
    return "patients or groups" if unit["per"] == "patient" else f"units by {unit['per']}"


def number(value: float | None) -> str:
    """Three decimals; a dash for None."""
    return "–" if value is None else f"{value:.3f}"


def interval(estimate: Mapping[str, Any], low: str = "low", high: str = "high") -> str:
    """The limits that an estimate has under these keys."""
    return f"{number(estimate[low])} to {number(estimate[high])}"


def estimated(estimate: Mapping[str, Any], key: str = "auc") -> str:
    """A number with its interval in brackets."""
    if estimate[key] is None:
        return "–"
    return f"{number(estimate[key])} ({interval(estimate)})"


def signed(value: float | None) -> str:
    """A difference: three decimals with their sign; a dash for None."""
    return "–" if value is None else f"{value:+.3f}"


def p_value(value: float | None) -> str:
    """As the AMA Manual of Style writes it: two digits, three below 0.01 and
    where two would round it to 0.05."""
    if value is None:
        return "–"
    if value < 0.001:
        return "< 0.001"
    if value > 0.99:
        return "> 0.99"
    return f"{value:.3f}" if value < 0.01 or 0.045 <= value < 0.05 else f"{value:.2f}"


def starred(row: Mapping[str, Any], key: str = "class") -> str:
    """The name of a row, with a star if it has few positives or negatives."""
    return row[key] + (" *" if row["few"] else "")


def auc_columns(
    estimates: Iterable[Mapping[str, Any]],
) -> tuple[Cells, Callable[[Mapping[str, Any]], Cells]]:
    """Header and cells of AUCs; beside published figures, if there are any."""
    compared = any(estimate["published"] is not None for estimate in estimates)

    def cells(estimate: Mapping[str, Any]) -> Cells:
        shown = number(estimate["auc"]), interval(estimate)
        return (*shown, *_against(estimate)) if compared else shown

    against = ("published", "difference", "inside") if compared else ()
    return ("AUC", "95 % interval", *against), cells


def _against(estimate: Mapping[str, Any]) -> Cells:
    """Published figure, difference, and whether the figure lies in the interval."""
    if estimate["published"] is None:
        return ("–", "–", "–")
    inside = {None: "–", True: "yes", False: "no"}[estimate["inside"]]
    return (number(estimate["published"]), signed(estimate["difference"]), inside)
