"""CSV, Parquet, JSONL, class folders and TFRecord folders -> columns of strings."""

import glob
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from medsiglip_jax.data.columns import ParquetColumns, is_textual, read_lines, strings
from medsiglip_jax.data.listing import IMAGE_SUFFIXES, TABLE_SUFFIXES, walk
from medsiglip_jax.files import places, storage

# Names of top folders that are splits and not classes.
SPLITS = frozenset("train val valid validation dev test".split())
# The index beside TFRecord shards, and the key of its metadata that holds label and classes.
INDEX, METADATA = "manifest.parquet", b"medsiglip_jax"

_EXPECTED = "expected .csv, .tsv, .parquet, .jsonl, a folder of class folders, or .tfrecord shards"
_NO_STRINGS = pyarrow.chunked_array([], pyarrow.large_string())


@dataclass
class Table:
    """Columns, and what is wrong with them so far.

    Attributes:
        path: as given, for messages.
        root: what relative image paths are relative to.
        columns: name -> one value per row, of any type; `strings` and `column` give them as text.
        lines: what a row is called: its line, its number or its file.
        unit: "line", "row" or "file".
        label: the label column, or columns, that the format itself has.
        classes: their order, where the format itself has one.
        refused: columns that cannot be used, and why.
        problems: collected by `column` and `report`, raised by `raise_problems`.
    """

    path: str
    root: str
    columns: Mapping[str, pyarrow.ChunkedArray]
    lines: Sequence[int] | Sequence[str]
    unit: str = "line"
    label: str | tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def strings(self, name: str) -> pyarrow.ChunkedArray:
        """A column as large_string, "" where a value is missing; no rows if there is no column."""
        column = self.columns.get(name, _NO_STRINGS)
        nested = None if is_textual(column.type) else f"holds {column.type}"
        if what := self.refused.get(name, nested):
            problem = f"column {name!r} {what}, expected strings"
            self.problems += [] if problem in self.problems else [problem]
            return _NO_STRINGS
        chunks = [strings(chunk) for chunk in column.chunks]
        return pyarrow.chunked_array(chunks, pyarrow.large_string())

    def has(self, name: str, optional: Collection[str] = ()) -> bool:
        """Whether there is such a column; reports it if not, and if it is not optional."""
        if name not in self.columns and name not in optional:
            self.problems.append(f"no column {name!r}; there are {', '.join(self.columns)}")
        return name in self.columns

    def column(
        self, name: str | None, optional: Collection[str] = (), blank: bool = False
    ) -> list[str] | None:
        """A column, or None if it is not asked for or missing; reports empty cells."""
        if name is None or not self.has(name, optional):
            return None
        if not blank:
            self.report(name, lambda value: not value, "no value")
        return self.strings(name).to_pylist()

    def report(self, name: str, bad: Callable[[str], bool], what: str) -> None:
        """Adds one problem if any value is bad: the first, its line, and how many there are."""
        values = self.strings(name).to_pylist()
        rows = [i for i, value in enumerate(values) if bad(value)]
        if rows:
            value = values[rows[0]]
            count = f" ({len(rows)} rows in all)" if len(rows) > 1 else ""
            self.problems.append(
                f"column {name!r}, {self.where(rows[0])}: {what}{value and f' {value!r}'}{count}"
            )

    def where(self, row: int) -> str:
        """The name of a row in messages, such as "line 7"."""
        return f"{self.unit} {self.lines[row]}"

    def raise_problems(self) -> None:
        if self.problems:
            raise ValueError(f"{self.path}: {'; '.join(self.problems)}")


def read_table(path: str) -> Table:
    """Reads whatever `path` names, local or a URI.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be read as what it seems to be, or has no rows.
    """
    shards = glob.glob(path) if glob.has_magic(path) and not os.path.exists(path) else []
    if shards:
        table = read_shards(_parent(path), set(map(os.path.basename, shards)))
    elif os.path.isdir(path) and _has_shards(path):
        table = read_shards(path)
    elif os.path.isdir(path):
        table = _class_folders(path)
    else:
        table = _manifest(path)
    if not table.lines:
        raise ValueError(f"{path}: no rows")
    return table


def _manifest(path: str) -> Table:
    suffix = Path(path).suffix.lower()
    if not suffix and "://" in path:  # a folder of shards
        return _manifest(f"{path.rstrip('/')}/{INDEX}")
    if suffix not in TABLE_SUFFIXES:
        if "://" not in path and not os.path.exists(path):
            raise FileNotFoundError(f"no such file or folder: {path}")
        raise ValueError(f"{path}: not a manifest; {_EXPECTED}")
    try:
        if suffix == ".parquet":
            return _parquet(path)
        columns, lines, refused = read_lines(path)
        return Table(path, _parent(path), columns, lines, refused=refused)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None


def _parquet(path: str) -> Table:
    columns = ParquetColumns(path)
    known = json.loads((columns.schema.metadata or {}).get(METADATA, b"{}"))
    label, classes = known.get("label"), known.get("classes")
    return Table(
        path, _parent(path), columns, range(1, columns.rows + 1), "row",
        tuple(label) if isinstance(label, list) else label, classes and tuple(classes),
    )  # fmt: skip


def write_parquet(
    path: str | os.PathLike,
    columns: Mapping[str, Any],
    label: str | Sequence[str] | None,
    classes: Sequence[str] | None,
) -> None:
    """Writes columns so that `read_table` finds the label and the order of its classes again."""
    metadata = {METADATA: json.dumps({"label": label, "classes": classes})}
    table = pyarrow.table(dict(columns)).replace_schema_metadata(metadata)
    with storage.new_file(places.at(path)) as partial:
        parquet.write_table(table, partial)


def read_shards(folder: str, names: Collection[str] = ()) -> Table:
    """Reads the index that `data.write_tfrecords` left beside TFRecord shards.

    Args:
        folder: local or a URI.
        names: the shards whose rows are wanted; default all.

    Raises:
        FileNotFoundError: there is no index.
    """
    try:
        table = _manifest(f"{folder.rstrip('/')}/{INDEX}")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no {INDEX} beside the shards in {folder}; data.index_tfrecords reads shards that "
            "data.write_tfrecords did not write"
        ) from None
    if names:
        sources = [os.path.basename(p) for p in table.strings("image").to_pylist()]
        shards = [source.rpartition("#")[0] for source in sources]
        if unknown := sorted(set(names) - set(shards)):
            raise ValueError(f"{table.path}: has no rows of {', '.join(unknown)}; index them again")
        inside = [i for i, shard in enumerate(shards) if shard in names]
        table.columns = {n: c.take(pyarrow.array(inside)) for n, c in table.columns.items()}
        table.lines = [int(table.lines[i]) for i in inside]
    return table


def _has_shards(folder: str) -> bool:
    return any(".tfrecord" in name for name in os.listdir(folder))


def _class_folders(path: str) -> Table:
    """[split/]class/**/image -> image, label and split."""
    files = _image_files(path)
    tops = {file[0] for file in files}
    splits = bool(tops) and tops <= SPLITS and all(len(file) > 2 for file in files)
    if not files or any(len(file) < 2 for file in files):
        what = "images outside of class folders" if files else "no images"
        raise ValueError(f"{path}: {what}; {_EXPECTED}")
    names = ["/".join(file) for file in files]
    columns = {"image": names, "label": [file[1] if splits else file[0] for file in files]}
    if splits:
        columns["split"] = [file[0] for file in files]
    arrays = {name: pyarrow.chunked_array([column]) for name, column in columns.items()}
    return Table(path, path, arrays, names, "file", label="label")


def _image_files(path: str) -> list[tuple[str, ...]]:
    names = (name for name in walk(path) if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    return [tuple(name.split("/")) for name in names]


def _parent(path: str) -> str:
    return path.rpartition("/")[0] if "://" in path else os.path.dirname(path) or "."
