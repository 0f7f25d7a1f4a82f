"""The adapter "csv": tables of labels, joined, and the images that their rows name."""

import re
import string
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medsiglip_jax.data.columns import read_lines
from medsiglip_jax.data.labels import Policy
from medsiglip_jax.evaluate.data import images, labels
from medsiglip_jax.evaluate.data.dataset import Dataset, check_settings, where_to_get
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files.places import Place

Row = dict[str, str]

_DATA = "adapter tables images labels text group group_optional attributes bands where listed"
_TABLE = "file on rename parse stem melt optional"


@dataclass
class _Joined:
    """Rows so far, and what was met on the way."""

    rows: list[Row]
    files: list[Place] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read(task: Task, root: Place, policy: Policy) -> Dataset:
    """Reads labels and finds the images.

    `data` of the task holds:

    * `tables`: the first holds labels. `file`: alternatives, globs below the folder. The others
      are joined `on` columns, one row to many, and may be `optional`. `rename`: column -> its name
      in the task. `parse`: column -> regular expression whose named groups become columns. `stem`:
      columns of file names to cut to their stem. `melt`: {columns, to, number}, several columns to
      one, with the number of the row.
    * `images`: see `images.find`.
    * `labels`: see `labels.of_rows`.
    * `text`: column of captions or reports.
    * `where`: column -> values to keep; `listed`: {file, column}, keeps rows that a file lists.
    * `group`: column of patients; with `group_optional` it may be absent.
    * `attributes`: name -> column, or columns of which one is there.
    * `bands`: name of an attribute -> {value: band}.

    Raises:
        FileNotFoundError: a table or all images are missing.
        ValueError: columns are missing, a join meets nothing, or labels are no labels.
    """
    data = task.data
    check_settings(task, data, _DATA, needed="tables images")
    check_settings(task, data.get("labels", {}), labels.SETTINGS, "data.labels")
    for number, table in enumerate(data["tables"]):
        check_settings(task, table, _TABLE, "data.tables", "file on" if number else "file")
    joined = _join_all(task, root, _files(task, root))
    _check_columns(task, joined)
    joined.rows = _kept(joined.rows, data.get("where", {}))
    if "listed" in data:
        joined.rows = _listed(joined.rows, root, **data["listed"])
    if not joined.rows:
        raise ValueError(
            f"{root}: {task.title}: no row is of the part that is evaluated: "
            f"{data.get('where') or data.get('listed')}"
        )
    try:
        found, values = _labels(task, joined.rows, policy)
    except ValueError as error:
        raise ValueError(f"{joined.files[0]}: {error}") from None
    return _dataset(task, root, joined, found, values)


def _labels(task: Task, rows: Sequence[Row], policy: Policy) -> tuple[np.ndarray, tuple[str, ...]]:
    if task.kind == "pairs":
        return np.zeros((len(rows), 0), np.float32), ()
    values = [c.value for c in task.classes]
    return labels.of_rows(rows, values, task.data.get("labels", {}), policy)


def _dataset(task: Task, root: Place, joined: _Joined, found: np.ndarray, values) -> Dataset:
    placed = images.find(task, root, joined.rows)
    numbers, names = map(list, zip(*placed.found, strict=True))
    rows = [joined.rows[i] for i in numbers]
    return Dataset(
        names,
        [str(root / name) for name in names],
        found[numbers],
        values,
        _groups(rows, names, task.data.get("group")),
        _attributes(task, rows),
        joined.files,
        {**joined.counts, **placed.counts},
        [*joined.missing, *placed.missing],
        [row[task.data["text"]] for row in rows] if "text" in task.data else None,
    )


def _groups(rows: Sequence[Row], names: Sequence[str], column: str | None) -> list[str] | None:
    """A row without a patient is a patient of its own."""
    if column is None or column not in rows[0]:
        return None
    return [row[column] or f"image {name}" for row, name in zip(rows, names, strict=True)]


def _attributes(task: Task, rows: Sequence[Row]) -> dict[str, list[str]]:
    """Those that are there: files of different versions have different ones."""
    found = {}
    for name, columns in task.data.get("attributes", {}).items():
        columns = [columns] if isinstance(columns, str) else columns
        bands = task.data.get("bands", {}).get(name, {})
        if there := [column for column in columns if column in rows[0]]:
            found[name] = [bands.get(row[there[0]], row[there[0]]) for row in rows]
    return found


# ---------------------------------------------------------------------------------------- tables


def _files(task: Task, root: Place) -> list[Place | None]:
    """The file of every table; None of an optional one that is not there."""
    found: list[Place | None] = []
    problems = []
    for table in task.data["tables"]:
        matches = [sorted(root.glob(pattern)) for pattern in table["file"]]
        first = next((files for files in matches if files), [])
        if len(first) > 1:
            problems.append(f"{len(first)} files match {table['file']}, expected one: {first[:3]}")
        elif not first and not table.get("optional"):
            problems.append(f"no {' or '.join(table['file'])}")
        found.append(first[0] if first else None)
    if problems:
        raise FileNotFoundError(f"{root}: {'; '.join(problems)}{where_to_get(task)}")
    return found


def _join_all(task: Task, root: Place, files: Sequence[Place | None]) -> _Joined:
    tables = task.data["tables"]
    assert files[0] is not None
    joined = _Joined(_rows(files[0], tables[0]), [files[0]])
    if not joined.rows:
        raise ValueError(f"{files[0]}: no rows")
    for table, file in zip(tables[1:], files[1:], strict=True):
        if file is not None:
            _join(joined, _rows(file, table), table, file)
            joined.files.append(file)
    return joined


def _rows(path: Place, table: Mapping[str, Any]) -> list[Row]:
    """The rows of a file that are not empty."""
    columns = {name: c.to_pylist() for name, c in read_lines(str(path))[0].items() if name}
    cells = zip(*([(v or "").strip() for v in column] for column in columns.values()), strict=True)
    _need(path, columns, (renamed := table.get("rename", {})))
    names = [renamed.get(name, name) for name in columns]
    rows = [dict(zip(names, row, strict=True)) for row in cells if any(row)]
    _need(path, names, [*table.get("parse", ()), *table.get("stem", ())])
    for column, pattern in table.get("parse", {}).items():
        _parse(path, rows, column, re.compile(pattern))
    for column in table.get("stem", ()):
        for row in rows:
            row[column] = images.stem(row[column])
    return list(_melted(rows, **table["melt"])) if "melt" in table else rows


def _parse(path: Place, rows: Iterable[Row], column: str, pattern: re.Pattern) -> None:
    odd = []
    for row in rows:
        match = pattern.search(row[column])
        row |= match.groupdict("") if match else {}
        odd += [] if match else [row[column]]
    if odd:
        raise ValueError(
            f"{path}: column {column!r}: {len(odd)} cells do not look like {pattern.pattern}, the "
            f"first: {odd[0]!r}"
        )


def _melted(rows: Iterable[Row], columns: Sequence[str], to: str, number: str) -> Iterator[Row]:
    for i, row in enumerate(rows):
        for column in columns:
            yield {to: images.stem(row[column]), number: str(i)}


def _join(joined: _Joined, others: list[Row], table: Mapping[str, Any], path: Place) -> None:
    """Joins one more table to the rows; those that meet nothing are missing."""
    on = table["on"]
    for where, rows in ((joined.files[0], joined.rows), (path, others)):
        _need(where, rows[0] if rows else (), on)
    index = defaultdict(list)
    for other in others:
        index[_key(other, on)].append(other)
    lonely = ["/".join(key) for row in joined.rows if (key := _key(row, on)) not in index]
    if len(lonely) == len(joined.rows):
        raise ValueError(
            f"{joined.files[0]} and {path} have no {' and '.join(on)} in common: "
            f"{', '.join(lonely[:3])} in one, {', '.join(map('/'.join, list(index)[:3]))} in the "
            "other"
        )
    nothing = [dict.fromkeys(others[0], "")] if table.get("optional") else []
    joined.rows = [
        {**match, **row} for row in joined.rows for match in index.get(_key(row, on), nothing)
    ]
    joined.missing += [] if nothing else [f"{key} in {path.name}" for key in lonely]
    joined.counts[f"rows without a match in {path.name}"] = len(lonely)


def _key(row: Row, on: Sequence[str]) -> tuple[str, ...]:
    return tuple(row[name] for name in on)


def _need(path: Place, there: Iterable[str], names: Iterable[str]) -> None:
    there = list(there)
    if lacking := [name for name in names if name not in there]:
        raise ValueError(
            f"{path}: no column {', '.join(map(repr, lacking))}; there are {', '.join(there)}"
        )


def _check_columns(task: Task, joined: _Joined) -> None:
    """All columns that are needed and not there, at once."""
    data = task.data
    values = [c.value for c in task.classes]
    names = [] if "text" not in data else [data["text"]]
    if task.kind != "pairs":
        names += labels.columns(joined.rows, values, data.get("labels", {}))
    names += [*data.get("where", ()), *data.get("images", {}).get("on", ())]
    names += [] if "listed" not in data else [data["listed"]["column"]]
    names += [] if "group" not in data or data.get("group_optional") else [data["group"]]
    for template in images.templates(data["images"]):
        names += [name for _, name, _, _ in string.Formatter().parse(template) if name]
    tables = " and ".join(path.name for path in joined.files)
    _need(joined.files[0].parent / tables, joined.rows[0], dict.fromkeys(names))


def _kept(rows: list[Row], where: Mapping[str, Sequence[str]]) -> list[Row]:
    return [row for row in rows if all(row[name] in allowed for name, allowed in where.items())]


def _listed(rows: list[Row], root: Place, file: str, column: str) -> list[Row]:
    path = root / file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it lists the images of the split")
    names = set(path.read_text(encoding="utf-8").split())
    return [row for row in rows if row[column] in names]
