"""Cells of tables -> 0, 1 and unknown, one column per class."""

import ast
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from medsiglip_jax.evaluate.data.dataset import Policy
from medsiglip_jax.evaluate.data.layout import LabelColumns

TableRow = Mapping[str, str]

_YES = frozenset("1 1.0 yes true".split())
_NO = frozenset("0 0.0 no false".split())
_UNCERTAIN = frozenset("-1 -1.0".split())
_VALUES = {"ignore": np.nan, "positive": 1.0, "negative": 0.0}


def columns(rows: Sequence[TableRow], values: Sequence[str], layout: LabelColumns) -> list[str]:
    """Names of the columns that hold labels."""
    if layout.column:
        return [layout.column]
    return list(values or (name for name in rows[0] if name not in layout.except_))


def of_rows(
    rows: Sequence[TableRow], values: Sequence[str], layout: LabelColumns, policy: Policy
) -> tuple[Float32[np.ndarray, "n c"], tuple[str, ...]]:
    """Labels, and what the data calls their classes.

    Args:
        rows: all with the same columns, at least one.
        values: classes; if empty, those that the data holds.
        layout: where the labels of a row are.
        policy: what -1 and empty cells mean.

    Raises:
        ValueError: cells that are no labels, of all columns in one message.
    """
    if not layout.column:
        return _of_columns(rows, columns(rows, values, layout), policy)
    named = [_names(row[layout.column], layout) for row in rows]
    ignored = set(layout.ignore)
    values = tuple(values) or _sorted({name for cell in named for name in cell} - ignored)
    if not layout.ignore_others:
        _check_names(named, ignored.union(values), layout.column, values)
    index = {value: i for i, value in enumerate(values)}
    labels = np.zeros((len(rows), len(values)), np.float32)
    for i, cell in enumerate(named):
        labels[i, [index[name] for name in cell if name in index]] = 1
    labels[[not cell for cell in named]] = np.nan
    return labels, values


def _check_names(
    named: Sequence[Sequence[str]], known: set[str], column: str, values: Sequence[str]
) -> None:
    unknown = Counter(name for cell in named for name in cell if name not in known)
    if unknown:
        shown = ", ".join(f"{name!r} ({count})" for name, count in unknown.most_common(5))
        raise ValueError(
            f"column {column!r}: not among the classes {', '.join(values[:30])}: {shown}"
        )


def _of_columns(rows: Sequence[TableRow], names: Sequence[str], policy: Policy):
    labels, problems = np.empty((len(rows), len(names)), np.float32), []
    for j, name in enumerate(names):
        cells = [_value(row[name], policy) for row in rows]
        if wrong := [row[name] for row, cell in zip(rows, cells, strict=True) if cell is None]:
            problems.append(f"column {name!r}: {wrong[0]!r} ({len(wrong)} such cells)")
        labels[:, j] = [np.nan if cell is None else cell for cell in cells]
    if problems:
        raise ValueError(f"expected 0, 1, yes, no, -1 or nothing; {'; '.join(problems)}")
    return labels, tuple(names)


def _value(cell: str, policy: Policy) -> float | None:
    if cell in _UNCERTAIN or not cell:
        return _VALUES[policy.uncertain if cell else policy.blank]
    cell = cell.lower()
    return 1.0 if cell in _YES else 0.0 if cell in _NO else None


def _names(cell: str, layout: LabelColumns) -> list[str]:
    """The names in a cell; none if it is empty."""
    if layout.literal:
        return _literal(cell, layout.column)
    if layout.separator:
        return [name.strip() for name in cell.split(layout.separator) if name.strip()]
    return [cell] if cell else []


def _literal(cell: str, column: str) -> list[str]:
    try:
        names = ast.literal_eval(cell or "[]")
        if isinstance(names, (list, tuple, dict)):
            return [str(name) for name in names]
    except (ValueError, SyntaxError):
        pass
    raise ValueError(f"column {column!r}: {cell[:60]!r} is no Python list")


def _sorted(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=int) if all(map(str.isdecimal, names)) else sorted(names))
