"""CSV, Parquet, JSONL, class folders and TFRecord folders -> columns of strings."""

import csv
import glob
import io
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec.core
import pyarrow
from pyarrow import ArrowException, parquet

from medsiglip_jax import storage
from medsiglip_jax.manifest import IMAGE_SUFFIXES

# Names of top folders that are splits and not classes.
SPLITS = frozenset("train val valid validation dev test".split())
# The index beside TFRecord shards, and the key of its metadata that holds label and classes.
INDEX, METADATA = "manifest.parquet", b"medsiglip_jax"

_EXPECTED = "expected .csv, .tsv, .parquet, .jsonl, a folder of class folders, or .tfrecord shards"


@dataclass
class Table:
    """Columns of strings, "" where a value is missing, and what is wrong with them so far.

    Attributes:
        path: as given, for messages.
        root: what relative image paths are relative to.
        columns: name -> one string per row.
        where: row -> "line 7".
        label: the label column, or columns, that the format itself has.
        classes: their order, where the format itself has one.
        problems: collected by `column` and `report`, raised by `raise_problems`.
    """

    path: str
    root: str
    columns: dict[str, list[str]]
    where: Callable[[int], str]
    label: str | tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    problems: list[str] = field(default_factory=list)

    def column(
        self, name: str | None, optional: Collection[str] = (), blank: bool = False
    ) -> list[str] | None:
        """A column, or None if it is not asked for or missing; reports empty cells."""
        if name is None or (name not in self.columns and name in optional):
            return None
        if name not in self.columns:
            self.problems.append(f"no column {name!r}; there are {', '.join(self.columns)}")
            return None
        if not blank:
            self.report(name, lambda value: not value, "no value")
        return self.columns[name]

    def report(self, name: str, bad: Callable[[str], bool], what: str) -> None:
        """Adds one problem if any value is bad: the first, its line, and how many there are."""
        rows = [i for i, value in enumerate(self.columns.get(name, ())) if bad(value)]
        if rows:
            value = self.columns[name][rows[0]]
            count = f" ({len(rows)} rows in all)" if len(rows) > 1 else ""
            self.problems.append(
                f"column {name!r}, {self.where(rows[0])}: {what}{value and f' {value!r}'}{count}"
            )

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
    if shards or (os.path.isdir(path) and _has_shards(path)):
        table = _shards(path, shards)
    elif os.path.isdir(path):
        table = _class_folders(path)
    else:
        table = _manifest(path)
    if not next(iter(table.columns.values()), None):
        raise ValueError(f"{path}: no rows")
    return table


def _manifest(path: str) -> Table:
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    suffix = Path(path).suffix.lower()
    if not suffix and "://" in path:  # a folder of shards
        return _manifest(f"{path.rstrip('/')}/{INDEX}")
    if suffix not in readers:
        if "://" not in path and not os.path.exists(path):
            raise FileNotFoundError(f"no such file or folder: {path}")
        raise ValueError(f"{path}: not a manifest; {_EXPECTED}")
    try:
        system, name = fsspec.core.url_to_fs(path)
        data = system.cat_file(name)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    return readers[suffix](path, data)


def _csv(path: str, data: bytes) -> Table:
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    reader = csv.reader(
        io.StringIO(_text(path, data), newline=""), delimiter=delimiter, strict=True
    )
    rows, lines = [], []
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    header = [name.strip() for name in rows[0]] if rows else []
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path}: columns given twice: {', '.join(map(repr, twice))}")
    ragged = [i for i, row in enumerate(rows) if len(row) != len(header)]
    if ragged:
        raise ValueError(
            f"{path}, line {lines[ragged[0]]}: {len(rows[ragged[0]])} fields, expected "
            f"{len(header)} as in the header ({len(ragged)} such rows; quote fields with commas)"
        )
    columns = {name: [row[i].strip() for row in rows[1:]] for i, name in enumerate(header)}
    return Table(path, _parent(path), columns, lambda row: f"line {lines[row + 1]}")


def _jsonl(path: str, data: bytes) -> Table:
    rows, lines = [], []
    for number, line in enumerate(_text(path, data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {line.strip()[:40]}")
        rows.append(row)
        lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [_cell(row.get(name)) for row in rows] for name in names}
    return Table(path, _parent(path), columns, lambda row: f"line {lines[row]}")


def _parquet(path: str, data: bytes) -> Table:
    try:
        table = parquet.read_table(io.BytesIO(data))
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    columns = {
        name: [_cell(value) for value in table.column(name).to_pylist()]
        for name in table.column_names
    }
    known = json.loads((table.schema.metadata or {}).get(METADATA, b"{}"))
    label, classes = known.get("label"), known.get("classes")
    return Table(
        path, _parent(path), columns, lambda row: f"row {row + 1}",
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
    with storage.new_file(Path(path)) as partial:
        parquet.write_table(table, partial)


def _shards(path: str, shards: Sequence[str]) -> Table:
    """The index that `data.write_tfrecords` left beside the shards, cut down to those of a glob."""
    folder = _parent(path) if shards else path
    index = os.path.join(folder, INDEX)
    if not os.path.exists(index):
        raise FileNotFoundError(
            f"no {INDEX} beside the shards in {folder}; data.index_tfrecords reads shards that "
            "data.write_tfrecords did not write"
        )
    table = _manifest(index)
    table.path = path
    if shards:
        names = set(map(os.path.basename, shards))
        inside = [i for i, p in enumerate(table.columns["image"]) if p.rpartition("#")[0] in names]
        table.columns = {n: [c[i] for i in inside] for n, c in table.columns.items()}
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
    columns = {
        "image": ["/".join(file) for file in files],
        "label": [file[1] if splits else file[0] for file in files],
    }
    if splits:
        columns["split"] = [file[0] for file in files]
    return Table(path, path, columns, lambda row: f"{columns['image'][row]}", label="label")


def _image_files(path: str) -> list[tuple[str, ...]]:
    found = []
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parts = () if folder == path else Path(folder).relative_to(path).parts
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                found.append((*parts, name))
    return found


def _text(path: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # Excel writes a byte-order mark
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():  # integers with gaps, as pandas keeps them
        return str(int(value))
    return str(value).strip()


def _parent(path: str) -> str:
    return path.rpartition("/")[0] if "://" in path else os.path.dirname(path) or "."
