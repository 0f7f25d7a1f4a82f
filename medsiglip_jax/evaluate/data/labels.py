"""Cells of tables -> 0, 1 and unknown, one column per class."""

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from medsiglip_jax.data.labels import EXPECTED, Policy, finding, sorted_classes

Row = Mapping[str, str]

SETTINGS = "column separator literal ignore ignore_others except"


def columns(rows: Sequence[Row], values: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Names of the columns that hold labels."""
    if "column" in settings:
        return [settings["column"]]
    return list(values or (name for name in rows[0] if name not in settings.get("except", ())))


def of_rows(
    rows: Sequence[Row],
    values: Sequence[str],
    settings: Mapping[str, Any],
    policy: Policy,
) -> tuple[Float32[np.ndarray, "n c"], tuple[str, ...]]:
    """Labels, and what the data calls their classes.

    Args:
        rows: all with the same columns, at least one.
        values: classes; without any, what the data holds.
        settings: `column`, whose cells name classes, one or (`separator`, or `literal`: a Python
            list) several; names to `ignore`, or `ignore_others`. Without it every class is a
            column of labels as `data.labels` has them; `except` are no classes.
        policy: what -1 and nothing are.

    Raises:
        ValueError: cells that are none of this, all columns in one message.
    """
    if "column" not in settings:
        return _of_columns(rows, columns(rows, values, settings), policy)
    named = [_named(row[settings["column"]], settings) for row in rows]
    ignored = set(settings.get("ignore", ()))
    values = tuple(values) or sorted_classes({name for cell in named for name in cell} - ignored)
    if not settings.get("ignore_others"):
        _check_names(named, ignored.union(values), settings["column"], values)
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


def _of_columns(rows: Sequence[Row], names: Sequence[str], policy: Policy):
    labels, problems = np.empty((len(rows), len(names)), np.float32), []
    for j, name in enumerate(names):
        cells = [row[name] for row in rows]
        labels[:, j], wrong = finding(cells, policy)
        if wrong:
            count = f" ({len(wrong)} rows in all)" if len(wrong) > 1 else ""
            problems.append(f"column {name!r}: {EXPECTED} {cells[wrong[0]]!r}{count}")
    if problems:
        raise ValueError("; ".join(problems))
    return labels, tuple(names)


def _named(cell: str, settings: Mapping[str, Any]) -> list[str]:
    """The names in a cell; none if it is empty."""
    if settings.get("literal"):
        return _literal(cell, settings["column"])
    if separator := settings.get("separator"):
        return [name.strip() for name in cell.split(separator) if name.strip()]
    return [cell] if cell else []


def _literal(cell: str, column: str) -> list[str]:
    try:
        found = ast.literal_eval(cell or "[]")
        if isinstance(found, (list, tuple, dict)):
            return [str(name) for name in found]
    except (ValueError, SyntaxError):
        pass
    raise ValueError(f"column {column!r}: {cell[:60]!r} is no Python list")
