"""Cells that name several classes: lists always, and parts between separators where that is asked.

A cell such as Edema|Effusion may be one name or two: nobody but the user knows, and is asked.
"""

import ast
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float32

from medsiglip_jax.data.labels import sorted_classes
from medsiglip_jax.data.table import Table
from medsiglip_jax.files.documents import loads

WHOLE = "none"  # as a separator: each cell is one name, whatever it holds
_SEPARATORS = ("|", ";")
_LONGEST = 10_000  # characters of a list


def read(
    table: Table, name: str, separator: str | None, classes: Sequence[str]
) -> tuple[Float32[np.ndarray, "n c"], tuple[str, ...]] | None:
    """The labels of a column whose cells name several classes, and the classes; None of another.

    A cell is a list in JSON, as Python prints it or of the table's own type, or with `separator`
    names with that between them. An empty cell is unknown (NaN), a list of nothing is no class.
    What is wrong, and a cell of which nobody can say whether it is one name, is a problem of the
    table.

    Args:
        table: with the column.
        name: of the column.
        separator: what stands between names; `WHOLE` if nothing does.
        classes: in their order; () are those in the cells, sorted.
    """
    if separator == "":
        raise ValueError(f"label_separator is empty; expected one such as | or {WHOLE}")
    cells = table.lists(name)
    if cells is None:
        return None
    lists = [_names(cell, separator) for cell in cells]
    if not any(isinstance(names, list) and names != [cell] for names, cell in _pairs(lists, cells)):
        _ask(table, name, cells, separator, classes)
        return None
    wrong = [row for row, names in enumerate(lists) if isinstance(names, str)]
    table.report(name, cells, wrong, "expected a list of names, as in other rows, got")
    known = [names if isinstance(names, list) else None for names in lists]
    classes = tuple(classes) or sorted_classes(n for names in known for n in names or ())
    unknown = [row for row, names in enumerate(known) if names and {*names} - {*classes}]
    table.report(name, cells, unknown, f"names none of the classes {', '.join(classes[:20])}:")
    return _matrix(known, classes), classes


def _pairs(lists: Sequence, cells: Sequence) -> Iterable[tuple]:
    return zip(lists, cells, strict=True)


def _names(cell: str, separator: str | None) -> list[str] | str | None:
    """The names in a cell; None if it is empty, and the cell itself if it is no list."""
    if not cell:
        return None
    if cell.startswith("[") and cell.endswith("]") and separator != WHOLE:
        return _of_list(cell)
    if separator in (None, WHOLE):
        return cell
    return list(filter(None, (name.strip() for name in cell.split(separator))))


def _of_list(cell: str) -> list[str] | str:
    if len(cell) > _LONGEST:
        return cell
    for parse in (loads, ast.literal_eval):  # 'single quotes' are those of Python's lists
        try:
            items = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(items, list) and all(isinstance(item, str | int) for item in items):
            return list(filter(None, (str(item).strip() for item in items)))
    return cell


def _ask(
    table: Table, name: str, cells: Sequence[str], separator: str | None, classes: Sequence[str]
) -> None:
    """Makes a problem of cells that look like several names, unless the user has said what they
    are."""
    if separator is not None or classes:
        return
    given = {*cells}
    for mark in (*_SEPARATORS, ","):
        rows = [row for row, cell in enumerate(cells) if _splits(cell, mark, given)]
        if rows:
            table.report(name, cells, rows, "one class or several?")
            table.problems.append(
                f"pass --label-separator '{mark}' if such a cell names several, or "
                f"--label-separator {WHOLE} if it is one (in a recipe data.label_separator)"
            )
            return


def _splits(cell: str, mark: str, given: set[str]) -> bool:
    """Whether a cell may be several names; of commas, which names have, too, only if all parts are
    cells of their own."""
    parts = [part.strip() for part in cell.split(mark)]
    return len(parts) > 1 and all(parts) and (mark != "," or {*parts} <= given)


def _matrix(lists: Sequence[list[str] | None], classes: Sequence[str]) -> np.ndarray:
    index = {name: k for k, name in enumerate(classes)}
    labels = np.zeros((len(lists), len(classes)), np.float32)
    for row, names in enumerate(lists):
        if names is None:
            labels[row] = np.nan
        else:
            labels[row, [index[name] for name in names if name in index]] = 1
    return labels
