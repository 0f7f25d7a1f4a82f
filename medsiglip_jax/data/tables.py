"""Reads tables: CSV, Parquet, JSONL, class folders, tar and TFRecord shards."""

import glob
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from medsiglip_jax.data import tar
from medsiglip_jax.data.columns import read_lines
from medsiglip_jax.data.listing import TABLE_SUFFIXES, expand
from medsiglip_jax.data.parquet_columns import ParquetColumns
from medsiglip_jax.data.rows import describe_skipped, from_tuples
from medsiglip_jax.data.table import Table
from medsiglip_jax.files import places, settings, storage
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.json_text import dumps

# Top folders of these names are splits, not classes.
SPLITS = frozenset("train val valid validation dev test".split())
# The index beside TFRecord shards (the name is a format, and older than "index"), and the key of
# the metadata of Parquet files that holds their label and classes.
INDEX, METADATA = "manifest.parquet", b"medsiglip_jax"

_EXPECTED = (
    "expected .csv, .tsv, .parquet, .jsonl, a folder of class folders, .tar or .tfrecord shards"
)
# What `describe_skipped` names to have other files looked into.
_OPTION = "--all-files, or data.all_files of a recipe,"
# The columns of WebDataset shards, of which the last two may be missing.
_SAMPLES = pyarrow.schema(dict.fromkeys(("image", "text", "label"), pyarrow.large_string()))


def read_table(path: str, all_files: bool = False) -> Table:
    """Reads a table file, a folder of class folders, tar shards, or the index of TFRecord shards.

    Args:
        path: local or a URI; a glob names some of the shards of a folder.
        all_files: know images in class folders by their content, whatever their suffix.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be read as what its name says, or has no rows.
    """
    shards = glob.glob(path) if glob.has_magic(path) and not os.path.exists(path) else []
    if tars := _tars(path, shards):
        return _webdataset(path, tars, all_files)
    if others := [name for name in shards if ".tfrecord" not in os.path.basename(name)]:
        raise ValueError(
            f"{path}: matches {len(shards)} files that are not all TFRecord shards, such as "
            f"{others[0]}; give each table as a source of its own"
        )
    if shards:
        table = read_index(_parent(path), set(map(os.path.basename, shards)))
    elif os.path.isdir(path):
        has_shards = any(".tfrecord" in name for name in os.listdir(path))
        table = read_index(path) if has_shards else _class_folders(path, all_files)
    else:
        table = _table_file(path)
    if not table.lines:
        raise ValueError(f"{path}: no rows")
    return table


def _tars(path: str, matches: Sequence[str]) -> list[str]:
    """The WebDataset shards that a path names; none if it names something else."""
    if path.endswith(".tar"):
        matches = matches or [path]
    elif os.path.isdir(path):
        with os.scandir(path) as listed:
            entries = [entry for entry in listed if not entry.name.startswith(".")]
        # Beside class folders a .tar is mostly what they were unpacked from.
        folders = any(os.path.isdir(entry.path) for entry in entries)
        matches = [] if folders else [e.path for e in entries if e.name.endswith(".tar")]
    return sorted(matches) if all(match.endswith(".tar") for match in matches) else []


def _webdataset(path: str, shards: Sequence[str], all_files: bool) -> Table:
    """A row per image of tar shards, with its caption and class label; see `tar.entries`. What is
    wrong with a label is a problem only for whom wants labels."""
    skipped: Counter[str] = Counter()
    common = os.path.commonprefix(list(shards))
    below = len(common) - len(os.path.basename(common))  # where names start below their folder
    keys: list[str] = []
    others: list[str] = []
    labels: list[str] = []
    problems = {"image": others, "text": others, "label": labels}
    blocks = [_SAMPLES.empty_table()]
    for shard in shards:  # as Python objects one shard at a time
        blocks.append(_samples(tar.pairs(shard, skipped, all_files), below, keys, problems))
    for line in describe_skipped(skipped, all_files, _OPTION):
        warnings.warn(f"{path}: {line}", stacklevel=4)
    if not keys and not others:
        raise ValueError(f"{path}: no images")
    table = pyarrow.concat_tables(blocks)
    present = {"image", *(["label"] if labels else [])}
    present |= {name for name in _SAMPLES.names if table[name].null_count < len(table)}
    columns = {name: table[name] for name in _SAMPLES.names if name in present}
    bad = f"cannot be used: of the .cls members {'; '.join(_first(labels))}"
    refused = {"label": bad} if labels else {}
    return Table(
        path, _parent(common), columns, keys, "sample", refused=refused, problems=_first(others)
    )


def _samples(
    pairs: Iterable[tar.Entry], below: int, keys: list[str], problems: Mapping[str, list[str]]
) -> pyarrow.Table:
    """Rows of `_SAMPLES`; adds their keys, and what is wrong with others by their kind, to the
    lists. Names start at character `below` of their path."""
    rows = []
    for pair in pairs:
        name = pair.source[below:]
        if pair.reason is None:
            keys.append(pair.key)
            rows.append((name, pair.text, pair.label))
        else:
            problems[pair.kind].append(f"{name}: {pair.reason}")
    return from_tuples(rows, _SAMPLES)


def _first(problems: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = [f"and {len(problems) - 5} more"] * (len(problems) > 5)
    return [*problems[:5], *more]


def _table_file(path: str) -> Table:
    suffix = Path(path).suffix.lower()
    if not suffix and "://" in path:  # a folder of shards
        return _table_file(f"{path.rstrip('/')}/{INDEX}")
    if suffix not in TABLE_SUFFIXES:
        if "://" not in path and not os.path.exists(path):
            raise FileNotFoundError(f"no such file or folder: {path}")
        raise ValueError(f"{path}: not a table; {_EXPECTED}")
    try:
        if suffix == ".parquet":
            return _parquet(path)
        columns, lines, refused = read_lines(path)
        return Table(path, _parent(path), columns, lines, refused=refused)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None


def _parquet(path: str) -> Table:
    columns = ParquetColumns(path)
    with explained(path, "its metadata are not those of a table of examples"):
        known = parse((columns.schema.metadata or {}).get(METADATA, b"{}"))
        known = {name: known[name] for name in ("label", "classes") if name in known}
        labels = settings.build(_Labels, known, "metadata")
    return Table(
        path, _parent(path), columns, range(1, columns.rows + 1), "row",
        labels.label, labels.classes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Labels:
    """The metadata about labels that `write_parquet` writes."""

    label: str | tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.label == ():
            raise ValueError("label names no column")


def write_parquet(
    path: str | os.PathLike,
    columns: Mapping[str, Any],
    label: str | Sequence[str] | None,
    classes: Sequence[str] | None,
) -> None:
    """Writes a table of which `read_table` knows the label and the order of its classes.

    Args:
        path: local or a URI.
        columns: name -> one value per row.
        label: the column or columns that hold the labels.
        classes: the names of the classes, in order.
    """
    metadata = {METADATA: dumps({"label": label, "classes": classes})}
    table = pyarrow.table(dict(columns)).replace_schema_metadata(metadata)
    with storage.new_file(places.at(path)) as partial:
        parquet.write_table(table, partial)


def read_index(folder: str, names: Collection[str] = ()) -> Table:
    """Reads the index beside TFRecord shards, which `tfrecord.write_shards` wrote with them.

    Args:
        folder: of the shards, local or a URI.
        names: the shards whose rows are wanted; default all.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it has no rows of one of these shards.
    """
    try:
        table = _table_file(f"{folder.rstrip('/')}/{INDEX}")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no index {INDEX} beside the shards in {folder}; make one with "
            "medsiglip_jax.data.tfrecord.index_shards and data.examples.write"
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


def _class_folders(path: str, all_files: bool) -> Table:
    """[split/]class/**/image -> image, label and split."""
    listed = list(itertools.chain.from_iterable(expand([path], all_files)))
    names = [file.name for file in listed if file.format == "image"]
    skipped = Counter(file.suffix for file in listed if file.format != "image")
    for line in describe_skipped(skipped, all_files, _OPTION):
        warnings.warn(f"{path}: {line}", stacklevel=4)
    files = [name.split("/") for name in names]
    tops = {file[0] for file in files}
    splits = bool(tops) and tops <= SPLITS and all(len(file) > 2 for file in files)
    if not files or any(len(file) < 2 for file in files):
        problem = "images outside of class folders" if files else "no images"
        raise ValueError(f"{path}: {problem}; {_EXPECTED}")
    columns = {"image": names, "label": [file[1] if splits else file[0] for file in files]}
    if splits:
        columns["split"] = [file[0] for file in files]
    arrays = {name: pyarrow.chunked_array([column]) for name, column in columns.items()}
    return Table(path, path, arrays, names, "file", label="label")


def _parent(path: str) -> str:
    return path.rpartition("/")[0] if "://" in path else os.path.dirname(path) or "."
