"""The table of a report, and how numbers stand in it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Sequence[str]
CAUTION = "Not a medical device. Scores are not probabilities of disease."


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph and a table; any of the last two may be empty."""

    title: str
    text: str = ""
    header: Row = ()
    rows: Sequence[Row] = ()


def markdown(title: str, sections: Iterable[Section]) -> str:
    """A report as Markdown."""
    parts = [f"# {title}"]
    for section in sections:
        table = [section.header, ["---"] * len(section.header), *section.rows]
        lines = [f"| {' | '.join(map(_cell, row))} |" for row in table if section.rows]
        parts += [f"## {section.title}", section.text, "\n".join(lines)]
    return "\n\n".join(part for part in [*parts, CAUTION] if part) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def interval(found: Mapping[str, Any], low: str = "low", high: str = "high") -> str:
    return f"{number(found[low])} to {number(found[high])}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def p_value(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else number(value)


AGAINST = ("published", "difference", "inside")


def against(found: Mapping[str, Any]) -> Row:
    """Published figure, difference, whether it lies in the interval."""
    if found["published"] is None:
        return ("–", "–", "–")
    inside = {None: "–", True: "yes", False: "no"}[found["inside"]]
    return (number(found["published"]), signed(found["difference"]), inside)
