"""The adapter "csv": tables of labels, joined, and the images that their rows name, or that lie in
the tables, as Parquet may have them."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from medsiglip_jax.data.columns import is_textual, read_lines
from medsiglip_jax.data.labels import Policy
from medsiglip_jax.data.tables import read_table
from medsiglip_jax.evaluate.data import images, labels
from medsiglip_jax.evaluate.data.dataset import Dataset, where_to_get
from medsiglip_jax.evaluate.data.layout import CsvData, Melt, Table
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.places import Place

TableRow = dict[str, str]


@dataclass
class _Joined:
    """The rows so far, the files that they come from, and what was missing on the way.

    Attributes:
        notes: which optional tables are not used, and why.
    """

    rows: list[TableRow]
    files: list[Place] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(task: Task, layout: CsvData, root: Place, policy: Policy, prefer: str = "") -> Dataset:
    """Reads labels and finds the images.

    Raises:
        FileNotFoundError: a table or all images are missing.
        ValueError: columns are missing, a join matches nothing, labels are no labels, or an image
            has several files and `prefer` does not choose one.
    """
    joined = _join_all(_tables(task, layout, root), root)
    values = [c.value for c in task.classes]
    _check_columns(task, layout, joined, values)
    joined.rows = _kept(joined, layout, root)
    if not joined.rows:
        raise ValueError(
            f"{root}: {task.title}: no row is of the part that is evaluated: "
            f"{dict(layout.where) or layout.listed}"
        )
    of_rows, classes = np.zeros((len(joined.rows), 0), np.float32), ()
    if task.kind != "pairs":
        try:
            of_rows, classes = labels.of_rows(
                joined.rows, values, layout.labels, policy, task.exclusive
            )
        except ValueError as error:
            raise ValueError(f"{joined.files[0]}: {error}") from None
    matched = images.find(task, layout.images, root, joined.rows, prefer)
    numbers, names = map(list, zip(*matched.pairs, strict=True))
    rows = [joined.rows[i] for i in numbers]
    dataset = Dataset(
        names,
        [str(root / name) for name in names],
        of_rows[numbers],
        classes,
        _groups(rows, names, layout.groups),
        _attributes(rows, layout),
        joined.files,
        {**joined.counts, **matched.counts},
        [*joined.missing, *matched.missing],
        joined.notes,
        [row[layout.text] for row in rows] if layout.text else None,
    )
    return dataset.by_majority(task.exclusive) if layout.readers else dataset


def fits(task: Task, layout: CsvData, root: Place) -> bool:
    """Whether a folder has every table that is not optional."""
    return all(files_of(table.file, root) for table in layout.tables if not table.optional)


def _groups(
    rows: Sequence[TableRow], names: Sequence[str], columns: Sequence[str]
) -> list[str] | None:
    """A row without a patient is a patient of its own."""
    columns = [column for column in columns if column in rows[0]]
    if not columns:
        return None
    cells = (next(filter(None, (row[column] for column in columns)), "") for row in rows)
    return [group or f"image {name}" for group, name in zip(cells, names, strict=True)]


def _attributes(rows: Sequence[TableRow], layout: CsvData) -> dict[str, list[str]]:
    """Those that are there: the files of a data set differ from version to version."""
    attributes = {}
    for name, columns in layout.attributes.items():
        columns = [columns] if isinstance(columns, str) else columns
        bands = layout.bands.get(name, {})
        if column := next((column for column in columns if column in rows[0]), None):
            attributes[name] = [bands.get(row[column], row[column]) for row in rows]
    return attributes


# ---------------------------------------------------------------------------------------- tables


def _tables(task: Task, layout: CsvData, root: Place) -> list[tuple[Table, Place]]:
    """The tables and their files, without optional ones that do not exist."""
    tables, problems = [], []
    for table in layout.tables:
        first = files_of(table.file, root)
        if len(first) > 1:
            problems.append(f"{len(first)} files match {table.file}, expected one: {first[:3]}")
        elif first:
            tables.append((table, first[0]))
        elif not table.optional:
            problems.append(f"no {' or '.join(table.file)}")
    if problems:
        raise FileNotFoundError(f"{root}: {'; '.join(problems)}{where_to_get(task)}")
    return tables


def files_of(names: Sequence[str], root: Place) -> list[Place]:
    """The files that the first of its names which any matches stands for, compressed or not."""
    matches = (sorted(root.glob(name + gz)) for name in names for gz in ("", ".gz"))
    return next((paths for paths in matches if paths), [])


def _join_all(tables: Sequence[tuple[Table, Place]], root: Place) -> _Joined:
    """Joins all tables; one that is optional and does not fit is said, and left out."""
    (table, file), *others = tables
    joined = _Joined(_rows(file, table, root), [file])
    for table, file in others:
        try:
            _join(joined, _rows(file, table, root), table, file)
        except (ValueError, OSError) as error:
            if not table.optional:
                raise
            joined.notes.append(f"The optional table {file.name} does not fit and was not used.")
            warnings.warn(f"the optional table {file.name} is not used: {error}", stacklevel=2)
        else:
            joined.files.append(file)
    return joined


def _rows(path: Place, table: Table, root: Place) -> list[TableRow]:
    """The rows of a file that are not empty, at least one."""
    columns = _columns(path, root)
    cells = zip(*([(v or "").strip() for v in column] for column in columns.values()), strict=True)
    new = {old: name for old, name in table.rename.items() if name not in columns}
    names = [new.get(name, name) for name in columns]
    rows = [dict(zip(names, row, strict=True)) for row in cells if any(row)]
    if not rows:
        raise ValueError(f"{path}: no rows")
    melted = table.melt.columns if table.melt else ()
    _need(path, names, [*table.parse, *table.stem, *melted])
    for column, pattern in table.parse.items():
        _parse(path, rows, column, re.compile(pattern))
    for column in table.stem:
        for row in rows:
            row[column] = images.stem(row[column])
    return list(_melted(rows, table.melt)) if table.melt else rows


def _columns(path: Place, root: Place) -> dict[str, list[str | None]]:
    """The columns of a file; pictures in it are named as files below the folder are."""
    if path.suffix.lower() != ".parquet":
        return {name: c.to_pylist() for name, c in read_lines(str(path))[0].items() if name}
    table, columns = read_table(str(path)), {}
    for name in table.columns:
        if table.holds_pictures(name):
            sources = table.images(name).sources(f"{table.root}/").to_pylist()
            columns[name] = [source.removeprefix(f"{root}/") for source in sources]
        elif is_textual(table.columns[name].type):  # others hold no labels
            columns[name] = table.strings(name).to_pylist()
    return columns


def _parse(path: Place, rows: Iterable[TableRow], column: str, pattern: re.Pattern) -> None:
    """Adds the named groups of a pattern to each row."""
    unlike = []
    for row in rows:
        match = pattern.search(row[column])
        row |= match.groupdict("") if match else {}
        unlike += [] if match else [row[column]]
    if unlike:
        raise ValueError(
            f"{path}: column {column!r}: {len(unlike)} cells do not look like {pattern.pattern}, "
            f"the first: {unlike[0]!r}"
        )


def _melted(rows: Iterable[TableRow], melt: Melt) -> Iterator[TableRow]:
    for i, row in enumerate(rows):
        for column in melt.columns:
            yield {melt.to: images.stem(row[column]), melt.number: str(i)}


def _join(joined: _Joined, others: list[TableRow], table: Table, path: Place) -> None:
    """Joins one more table to the rows; rows without a match are counted and missing."""
    for where, rows in ((joined.files[0], joined.rows), (path, others)):
        _need(where, rows[0], table.on)
    index = defaultdict(list)
    for other in others:
        index[_key(other, table)].append(other)
    unmatched = ["/".join(key) for row in joined.rows if (key := _key(row, table)) not in index]
    if len(unmatched) == len(joined.rows):
        raise ValueError(
            f"{joined.files[0]} and {path} have no {' and '.join(table.on)} in common: "
            f"{', '.join(unmatched[:3])} in one, {', '.join(map('/'.join, list(index)[:3]))} in "
            "the other"
        )
    nothing = [dict.fromkeys(others[0], "")] if table.optional else []
    joined.rows = [
        {**match, **row} for row in joined.rows for match in index.get(_key(row, table), nothing)
    ]
    joined.missing += [] if nothing else [f"{key} in {path.name}" for key in unmatched]
    joined.counts[f"rows without a match in {path.name}"] = len(unmatched)


def _key(row: TableRow, table: Table) -> tuple[str, ...]:
    return tuple(row[name] for name in table.on)


def _need(path: Place, columns: Iterable[str], names: Iterable[str]) -> None:
    columns = list(columns)
    if lacking := [name for name in names if name not in columns]:
        raise ValueError(
            f"{path}: no column {', '.join(map(repr, lacking))}; there are {', '.join(columns)}"
        )


def _check_columns(task: Task, layout: CsvData, joined: _Joined, values: Sequence[str]) -> None:
    """Raises ValueError with all columns that are needed and missing."""
    names = [layout.text]
    if task.kind != "pairs":
        names += labels.columns(joined.rows, values, layout.labels)
    names += [*layout.where, *layout.images.columns, layout.listed.column if layout.listed else ""]
    if not (layout.group_optional or set(layout.groups) & joined.rows[0].keys()):
        names += layout.groups[:1]
    tables = " and ".join(path.name for path in joined.files)
    needed = dict.fromkeys(filter(None, names))
    _need(joined.files[0].parent / tables, joined.rows[0], needed)


def _kept(joined: _Joined, layout: CsvData, root: Place) -> list[TableRow]:
    """The rows of the part that is evaluated; what a list names without a row is counted."""
    rows = joined.rows
    for name, allowed in layout.where.items():
        rows = [row for row in rows if row[name] in allowed]
    if not layout.listed:
        return rows
    path = root / layout.listed.file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it lists the images of the split")
    with explained(path, "not a list of images, which is text in UTF-8"):
        names = set(path.read_text(encoding="utf-8").split())
    kept = [row for row in rows if row[layout.listed.column] in names]
    absent = names.difference(row[layout.listed.column] for row in kept)
    if absent:
        joined.counts[f"listed in {path.name} without a row"] = len(absent)
    return kept
