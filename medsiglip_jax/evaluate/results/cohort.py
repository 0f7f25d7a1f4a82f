"""Which images were evaluated, and of whom: what TRIPOD asks for in its items 13a and 13b."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_AGES = ((40, "under 40"), (65, "40 to 64"), (math.inf, "65 and over"))
# Reasons for which an image that the tables name is not evaluated, in the order in which they act.
_LOST = (
    "missing in the data set itself", "missing", "conflicting", "without a text", "unlabelled",
    "unreadable",
)  # fmt: skip
MOST = 20  # levels of an attribute; of one with more, numbers are summarised and names counted


def flow(counts: Mapping[str, int], images: int) -> list[dict[str, Any]]:
    """From the images that the tables name to those that were evaluated, one row for each step.

    Args:
        counts: images left out, by reason.
        images: the number that were evaluated.
    """
    lost = {reason: counts.get(reason, 0) for reason in _LOST}
    left = images + sum(lost.values())
    rows = [{"step": "named by the data set", "images": left, "left": left}]
    for reason, count in lost.items():
        left -= count
        rows += [{"step": reason, "images": -count, "left": left}] if count else []
    return [*rows, {"step": "evaluated", "images": left, "left": left}]


def characteristics(
    attributes: Mapping[str, Sequence[str]], groups: Sequence[str] | None
) -> list[dict[str, Any]]:
    """How many images, and patients where they are known, have each value of each attribute.

    A patient with images of several values counts for each of them. Of numbers the median and the
    quartiles are stated, too.
    """
    return [
        {"attribute": name, **row}
        for name, column in attributes.items()
        for row in _of_attribute(name, column, groups)
    ]


def bands(name: str, column: Sequence[str]) -> list[str]:
    """The values of an attribute as subgroups: bands of an age, and "unknown" for ""."""
    if name == "age":
        return [_age(cell) for cell in column]
    return [cell or "unknown" for cell in column]


def _age(cell: str) -> str:
    """The band of an age; NIH writes "058Y"."""
    match = re.match(r"\d+", cell)
    return next(band for end, band in _AGES if int(match[0]) < end) if match else "unknown"


def _of_attribute(
    name: str, column: Sequence[str], groups: Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    numbers = _numbers(name, column)
    if numbers is not None:
        low, middle, high = np.percentile(numbers, (25, 50, 75)).tolist()
        value = f"median {middle:g} (quartiles {low:g} to {high:g})"
        yield _row(value, [i for i, cell in enumerate(column) if cell], groups)
    levels = bands(name, column)
    distinct = sorted(set(levels))
    if len(distinct) > MOST:
        if numbers is None:
            yield _row(f"{len(distinct):,} different values", range(len(column)), groups)
        return
    for level in distinct:
        yield _row(level, [i for i, own in enumerate(levels) if own == level], groups)


def _row(value: str, rows: Sequence[int], groups: Sequence[str] | None) -> dict[str, Any]:
    patients = None if groups is None else len({groups[i] for i in rows})
    return {"value": value, "images": len(rows), "groups": patients}


def _numbers(name: str, column: Sequence[str]) -> np.ndarray | None:
    """The numbers of a column that holds several of them and no words; of an age its digits."""
    cells = [cell for cell in column if cell]
    if name == "age":
        cells = [match[0] for cell in cells if (match := re.match(r"\d+", cell))]
    try:
        numbers = np.array([float(cell) for cell in cells])
    except ValueError:
        return None
    return numbers if len(np.unique(numbers)) > 4 and np.isfinite(numbers).all() else None
