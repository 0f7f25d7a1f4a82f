"""The label columns of a table -> one class per row, or the findings of each row, as arrays."""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32

from medsiglip_jax.data import label_lists, labels
from medsiglip_jax.data.labels import Policy
from medsiglip_jax.data.table import Table

Labels = Int32[np.ndarray, " n"] | Float32[np.ndarray, "n c"]


def read(
    table: Table,
    label: str | Sequence[str],
    classes: tuple[str, ...],
    policy: Policy = Policy(),
    separator: str | None = None,
    are_classes: bool = False,
) -> tuple[Labels, tuple[str, ...]]:
    """The labels of a table, and the names of the classes; what is wrong is a problem of the table.

    Args:
        table: with the columns.
        label: a column of class names, of lists of them, or of a finding; or several of findings.
        classes: their names in order; () takes those in the cells, sorted.
        policy: what -1 and an empty cell are in a finding.
        separator: what stands between the classes in a cell, see `label_lists.read`.
        are_classes: the cells of one column are names of classes, whatever they look like.

    Returns:
        int32 [n] indices of classes, -1 unknown; or float32 [n, C] of 0, 1 and NaN (unknown).

    Raises:
        ValueError: a column of findings is missing, or `policy` names one that there is not.
    """
    if not isinstance(label, str):
        return _findings(table, tuple(label), policy)
    if not are_classes:
        lists = label_lists.read(table, label, separator, classes)
        if lists is not None:
            return lists
        if not classes and _is_finding(table, label):
            warnings.warn(
                f"{table.path}: column {label!r} is read as a finding, since it holds -1 "
                "(uncertain); give classes= if its cells are names of classes",
                stacklevel=3,
            )
            return _findings(table, (label,), policy)
    indices, names = _class_indices(table, label, classes)
    if not classes:
        _warn_of_numbers_below_0(table, label, names)
    return indices, names


def _class_indices(
    table: Table, column: str, classes: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    cells = table.column(column, blank=True) or []
    classes = classes or labels.sorted_classes(cells)
    index = {name: i for i, name in enumerate(classes)} | {"": -1}
    unknown = [row for row, cell in enumerate(cells) if cell not in index]
    table.report(column, cells, unknown, f"not among the classes {', '.join(classes[:20])}:")
    return np.array([index.get(cell, -1) for cell in cells], np.int32), classes


def _warn_of_numbers_below_0(table: Table, name: str, classes: Sequence[str]) -> None:
    """A -1 mostly means that nobody knows, and not a class of that name."""
    if below_0 := [c for c in classes if labels.is_uncertain(c) and c.startswith("-")]:
        warnings.warn(
            f"{table.path}: column {name!r} is read as names of classes, of which {below_0[0]} is "
            "one; leave cells empty where the class is unknown",
            stacklevel=4,
        )


def _is_finding(table: Table, name: str) -> bool:
    """Whether a column holds labels of a finding and nothing else, some of them uncertain."""
    cells = set(table.strings(name).to_pylist()) if name in table.columns else set()
    return labels.is_finding(cells) and any(map(labels.is_uncertain, cells))


def _findings(
    table: Table, names: tuple[str, ...], policy: Policy
) -> tuple[Float32[np.ndarray, "n c"], tuple[str, ...]]:
    if len(set(names)) < len(names):
        table.problems.append(f"label names a finding twice: {', '.join(names)}")
    policy.check_names(names)
    columns = [table.column(name, blank=True) or [] for name in names]
    table.raise_problems()  # with a column missing there is no matrix
    findings = []
    for name, cells in zip(names, columns, strict=True):
        values, wrong = labels.finding(cells, policy.of(name))
        table.report(name, cells, wrong, labels.EXPECTED)
        findings.append(values)
    labels.warn_of_uncertain(table.path, dict(zip(names, columns, strict=True)), policy)
    return np.stack(findings, axis=1), names
