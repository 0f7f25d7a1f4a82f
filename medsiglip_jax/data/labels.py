"""What a cell of a label column means, for training, probes and evaluation alike.

A finding has a column of its own: 1, true or yes; 0, false or no; -1 (uncertain) and nothing are
what a `Policy` says. Any other label is the name of a class, in one column for all classes.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

# What messages say of a cell that is no label.
EXPECTED = "expected 0, 1, true, false, yes, no, -1 (uncertain) or nothing, got"

_TRUE = frozenset("1 1.0 true yes".split())
_FALSE = frozenset("0 0.0 false no".split())
_UNCERTAIN = frozenset("-1 -1.0".split())
_CHOICE = {"ignore": np.nan, "positive": 1.0, "negative": 0.0}


@dataclass(frozen=True)
class Policy:
    """What labels mean that are neither 0 nor 1.

    Attributes:
        uncertain: -1 is "ignore" (unknown), "positive" or "negative".
        blank: an empty cell is "ignore" (unknown) or "negative".
    """

    uncertain: str = "ignore"
    blank: str = "ignore"

    def __post_init__(self):
        for name, allowed in (("uncertain", tuple(_CHOICE)), ("blank", ("ignore", "negative"))):
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {given!r}; expected one of {', '.join(allowed)}")


def value(cell: str, policy: Policy = Policy()) -> float | None:
    """The label in a cell of a finding: 0, 1 or NaN (unknown); None if the cell is no label."""
    if is_uncertain(cell) or not cell:
        return _CHOICE[policy.uncertain if cell else policy.blank]
    cell = cell.lower()
    return 1.0 if cell in _TRUE else 0.0 if cell in _FALSE else None


def finding(
    cells: Sequence[str], policy: Policy = Policy()
) -> tuple[Float32[np.ndarray, " n"], list[int]]:
    """The labels of a finding, and the rows of cells that are none (`EXPECTED`), NaN meanwhile."""
    known = {cell: value(cell, policy) for cell in set(cells)}
    wrong = [row for row, cell in enumerate(cells) if known[cell] is None]
    return np.array([known[cell] for cell in cells], np.float32), wrong


def is_uncertain(cell: str) -> bool:
    return cell in _UNCERTAIN


def is_finding(cells: Iterable[str]) -> bool:
    """Whether a column is that of a finding, as its cells are nothing else than its labels."""
    return all(value(cell) is not None for cell in set(cells))


def warn_of_uncertain(path: str, columns: Mapping[str, Sequence[str]]) -> None:
    """Warns once, with counts, if findings have labels -1 where they are ignored.

    Args:
        path: of the table, for the message.
        columns: name of each finding -> its cells.
    """
    counts = {name: sum(map(is_uncertain, cells)) for name, cells in columns.items()}
    if named := [f"{name} {count:,}" for name, count in counts.items() if count]:
        warnings.warn(
            f"{path}: labels of -1 (uncertain) are ignored, as if unknown: {', '.join(named)}",
            stacklevel=2,
        )


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """The class names among cells of which some may be empty; sorted as numbers if all are."""
    found = sorted(set(names) - {""})
    return tuple(sorted(found, key=int) if all(map(str.isdecimal, found)) else found)
