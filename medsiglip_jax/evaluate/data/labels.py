"""Cells of tables -> 0, 1 and unknown, one column per class."""

import ast
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from medsiglip_jax.data.labels import EXPECTED, Policy, finding, sorted_classes
from medsiglip_jax.evaluate.data.layout import LabelColumns

TableRow = Mapping[str, str]


def columns(rows: Sequence[TableRow], values: Sequence[str], layout: LabelColumns) -> list[str]:
    """Names of the columns that hold labels."""
    if layout.column:
        return [layout.column]
    return list(values or (name for name in rows[0] if name not in layout.except_))


def of_rows(
    rows: Sequence[TableRow],
    values: Sequence[str],
    layout: LabelColumns,
    policy: Policy,
    exclusive: bool = False,
) -> tuple[Float32[np.ndarray, "n c"], tuple[str, ...]]:
    """Labels, and what the data calls their classes.

    Args:
        rows: all with the same columns, at least one.
        values: classes; if empty, those that the data holds.
        layout: where the labels of a row are.
        policy: what -1 and empty cells mean.
        exclusive: an image shows exactly one class, so that an empty cell is unknown in any case.

    Raises:
        ValueError: cells that are no labels, of all columns in one message; or `policy` gives empty
            cells of exclusive classes a meaning.
    """
    if not layout.column:
        return _of_columns(rows, columns(rows, values, layout), policy)
    named = [_names(row[layout.column], layout) for row in rows]
    ignored = set(layout.ignore)
    values = tuple(values) or sorted_classes({name for cell in named for name in cell} - ignored)
    known = ignored.union(values)
    unknown = Counter(name for cell in named for name in cell if name not in known)
    if unknown and not layout.ignore_others:
        shown = ", ".join(f"{name!r} ({count})" for name, count in unknown.most_common(5))
        raise ValueError(
            f"column {layout.column!r}: not among the classes {', '.join(values[:30])}: {shown}"
        )
    index = {value: i for i, value in enumerate(values)}
    labels = np.zeros((len(rows), len(values)), np.float32)
    for i, cell in enumerate(named):
        labels[i, [index[name] for name in cell if name in index]] = 1
    policy.check_names(values)
    if exclusive and policy.blank != "ignore":
        raise ValueError(
            f"column {layout.column!r}: blank is {policy.blank!r}, but an image shows exactly one "
            "of the classes, and is no negative of all; leave out --blank, and images without a "
            "class are left out"
        )
    empty = np.array([not cell for cell in named])
    for i, value in enumerate(values):
        labels[empty, i] = np.nan if exclusive else policy.of(value).label("")
    return labels, values


def _of_columns(rows: Sequence[TableRow], names: Sequence[str], policy: Policy):
    policy.check_names(names)
    labels, problems = np.empty((len(rows), len(names)), np.float32), []
    for j, name in enumerate(names):
        cells = [row[name] for row in rows]
        labels[:, j], wrong = finding(cells, policy.of(name))
        if wrong:
            count = f" ({len(wrong)} rows in all)" if len(wrong) > 1 else ""
            problems.append(f"column {name!r}: {EXPECTED} {cells[wrong[0]]!r}{count}")
    if problems:
        raise ValueError("; ".join(problems))
    return labels, tuple(names)


def _names(cell: str, layout: LabelColumns) -> list[str]:
    """The names in a cell; none if it is empty."""
    if layout.literal:
        return _literal(cell, layout.column)
    if layout.separator:
        return [name.strip() for name in cell.split(layout.separator) if name.strip()]
    return [cell] if cell else []


# What `ast.literal_eval` raises for text that is none.
_NO_LITERAL = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)


def _literal(cell: str, column: str) -> list[str]:
    try:
        names = ast.literal_eval(cell or "[]")
        if isinstance(names, (list, tuple, dict)):
            return [str(name) for name in names]
    except _NO_LITERAL:
        pass
    raise ValueError(f"column {column!r}: {cell[:60]!r} is no Python list")
