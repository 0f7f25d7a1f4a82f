"""What to embed: files, folders, globs, tables, tar and TFRecord shards -> rows."""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsiglip_jax.data import expansion, tar
from medsiglip_jax.data.columns import decode
from medsiglip_jax.data.listing import TABLE_SUFFIXES, File, expand
from medsiglip_jax.data.rows import SCHEMA, Rows, from_tuples, seen_before
from medsiglip_jax.data.tables import INDEX, Table, read_index, read_table
from medsiglip_jax.files.places import read_bytes
from medsiglip_jax.preprocess.formats import FORMATS
from medsiglip_jax.preprocess.names import Tile
from medsiglip_jax.preprocess.parts import Parts

# `prefix + id` is the full id, which is used where two inputs give the same id.
_SCHEMA = SCHEMA.append(pa.field("prefix", pa.dictionary(pa.int32(), pa.string())))
# "image", "text" and "id" -> what a table calls these columns; None ignores one.
_Columns = Mapping[str, str | None]
_DEFAULT: _Columns = {"image": "image", "text": "text", "id": "id"}
# str.splitlines also cuts at form feeds and at what Unicode calls line and paragraph separators.
_LINE_END = re.compile(r"\r\n|\r|\n")


def rows(
    inputs: Sequence[str | os.PathLike],
    *,
    image: str | None = "image",
    text: str | None = "text",
    id: str | None = "id",
    root: str | os.PathLike | None = None,
    parts: Parts = Parts(),
    on_file: Callable[[int], Any] = int,
) -> Rows:
    """Lists images and texts, local or remote; see `listing.expand` for folders and globs.

    | input | rows | id |
    |---|---|---|
    | image, or what has no other format's suffix | an image | its path below the folder given |
    | slide, with `parts.mpp` | its tiles | the same, with #tile=… |
    | .txt | a text per non-blank line | FILE:LINE |
    | .csv .tsv .jsonl .parquet | all images, then all texts | the column `id`, or see below |
    | .tar (WebDataset) | images, and a text of each .txt | the member's name, no extension |
    | .tfrecord | the images and texts of the index beside it | SHARD#OFFSET:LENGTH |

    An image and a text with the same id are a pair. In a table without ids, the id is the image's
    path as the table has it. A row without an image, or whose image an earlier row has, gets the id
    FILE:LINE (in Parquet FILE:ROW), so that ids are unique.

    Where two inputs give the same id, all ids become full paths (of the file, or of the shard and
    the member in it), except those of an id column. A file name that is not UTF-8 is written with
    escapes such as \\udcff, and its image is reported as unreadable.

    Where `parts` asks for it, images become parts of them, however they were named: their sources
    and ids end in #frame=… or #tile=… (see `expansion`).

    Args:
        inputs: paths and URIs. A folder may hold images, .txt, .tar and .tfrecord; `skipped` of
            the result counts its other files by suffix.
        image: a table's column of paths or URIs; an empty cell is no image. This column, `text`
            and `id` may be absent under their default names; None ignores them.
        text: a table's column of texts; an empty cell is no text.
        id: a table's column of ids, each once.
        root: the folder that relative paths in tables start at; default the table's own folder.
        parts: which parts of files that hold more than one image.
        on_file: called with 1 for each file that was opened to list its parts.

    Raises:
        FileNotFoundError: all inputs that do not exist.
        ModuleNotFoundError: the package that reads a file is not installed.
        ValueError: there is nothing to embed, an input is given twice, or a file is wrong.
    """
    columns = {"image": image, "text": text, "id": id}
    skipped: Counter[str] = Counter()
    listed = itertools.chain.from_iterable(expand(inputs))
    tables = _tables(_counted(listed, skipped, parts), columns, str(root or ""))
    table = pa.concat_tables([_SCHEMA.empty_table(), *tables])
    table = expansion.table(table, parts, on_file)
    if not len(table):
        raise ValueError(_nothing(inputs, skipped))
    return Rows(_with_unique_ids(table), skipped, parts)


def _nothing(inputs: Sequence[Any], skipped: Counter[str]) -> str:
    names = ", ".join(map(str, inputs)) or "no input"
    others = ", ".join(f"{suffix} {count}" for suffix, count in skipped.most_common(9))
    images = (suffix for f in FORMATS if f.part is not Tile for suffix in f.suffixes)
    return (
        f"nothing to embed in {names}{others and f' (files skipped: {others})'}; expected images "
        f"({' '.join(sorted(images))}), slides with --mpp, .txt files with one text per line, "
        f"tables ({' '.join(sorted(TABLE_SUFFIXES))}), .tar or .tfrecord shards"
    )


def _counted(files: Iterable[File], skipped: Counter[str], parts: Parts) -> Iterator[File]:
    """The files that are read; counts the others, except for the index beside TFRecord shards."""
    shards, indexes = set(), []
    for file in files:
        folder, _, name = file.path.rpartition("/")
        if expansion.is_image(file, parts):
            yield file._replace(format="image")
        elif file.format not in ("other", "slide"):
            shards |= {folder} if file.format == "tfrecord" else set()
            yield file
        elif name == INDEX:
            indexes.append(folder)
        else:
            skipped[file.suffix] += 1
    if lonely := sum(folder not in shards for folder in indexes):
        skipped[".parquet"] += lonely


def _with_unique_ids(table: pa.Table) -> pa.Table:
    if not seen_before(table["kind"], table["id"]).any():
        return table
    prefix = table["prefix"].cast(pa.large_string())
    table = table.set_column(0, "id", _joined(prefix, table["id"]))
    repeated = np.flatnonzero(seen_before(table["kind"], table["id"]))
    if len(repeated):
        row = Rows(table)[int(repeated[0])]
        raise ValueError(
            f"{row.id} is given twice, the second time as {row.source} ({len(repeated)} such rows);"
            " name each input once, and use each id in one table"
        )
    return table


def _tables(files: Iterable[File], columns: _Columns, root: str) -> Iterator[pa.Table]:
    for (format, folder), group in itertools.groupby(files, _group):
        if format == "table":
            yield from (_of_table(read_table(file.path), columns, root) for file in group)
        elif format == "tfrecord":
            names = {os.path.basename(file.name) for file in group}
            yield _of_table(read_index(folder, names), _DEFAULT)
        else:
            cells = _of_shard if format == "tar" else _of_file
            yield from_tuples(itertools.chain.from_iterable(map(cells, group)), _SCHEMA)


def _group(file: File) -> tuple[str, str]:
    """Consecutive files with the same key are read together: TFRecord shards by their folder."""
    if file.format == "tfrecord":
        return file.format, os.path.dirname(file.path) or "."
    return ("file" if file.format in ("image", "text") else file.format), ""


def _of_file(file: File) -> Iterator[tuple[str | None, ...]]:
    path = file.path
    if file.format == "image":
        yield file.name, path, "image", None, file.root
        return
    for number, line in enumerate(_LINE_END.split(decode(path, read_bytes(path))), start=1):
        if line.strip():
            yield f"{file.name}:{number}", path, "text", line.strip(), file.root


def _of_shard(file: File) -> Iterator[tuple[str | None, ...]]:
    for cells in tar.members(file.path):
        yield *cells, f"{file.path}/"


def _of_table(table: Table, columns: _Columns, root: str = "") -> pa.Table:
    """The images of a table, then its texts."""
    image, text, id = _cells(table, columns)
    elsewhere = pc.or_(pc.match_substring(image, "://"), pc.starts_with(image, "/"))
    relative = _filled(image) & ~elsewhere.to_numpy()
    base, own = _slashed(root or table.root), _slashed(table.root)
    if id is None:
        id, prefix = _default_ids(table, image, relative)
    else:
        _check_ids(table, columns["id"], id, _filled(image) | _filled(text))
        prefix = np.zeros(len(id), np.int32)
    prefix = pa.DictionaryArray.from_arrays(prefix, ["", base, own])
    source = pc.if_else(pa.array(relative), _joined(base, image), image)
    images = _of_kind("image", _filled(image), id, source, None, prefix)
    texts = _of_kind("text", _filled(text), id, None, text, prefix, table.path)
    return pa.concat_tables([images, texts])


def _cells(table: Table, columns: _Columns) -> Iterator[pa.ChunkedArray | None]:
    """Images and texts, "" where a cell is empty, and ids or None."""
    cells = {
        default: table.strings(name)
        for default, name in columns.items()
        if name is not None and table.has(name, (default,))
    }
    if not cells.keys() & {"image", "text"} and not table.problems:
        wanted = f"{columns['image']!r} or {columns['text']!r}"
        table.problems.append(f"no column {wanted}; there are {', '.join(table.columns)}")
    table.raise_problems()
    blank = pa.chunked_array([pa.repeat(pa.scalar("", pa.large_string()), len(table.lines))])
    yield from (cells.get("image", blank), cells.get("text", blank), cells.get("id"))


def _default_ids(table: Table, image: Any, relative: np.ndarray) -> tuple[Any, np.ndarray]:
    """The image's path, or FILE:LINE where it has none or an earlier row has it; their prefixes."""
    named = np.flatnonzero(_filled(image))
    by_image = np.zeros(len(image), bool)
    by_image[named] = ~seen_before(_kept(image, _filled(image)))
    lines = pa.array(np.asarray(table.lines)).cast(pa.large_string())
    lines = _joined(f"{os.path.basename(table.path)}:", lines)
    prefix = np.where(by_image, relative, 2).astype(np.int32)
    return pc.if_else(pa.array(by_image), image, lines), prefix


def _check_ids(table: Table, name: str | None, id: pa.ChunkedArray, used: np.ndarray) -> None:
    filled = _filled(id)
    table.report(name, id, np.flatnonzero(used & ~filled).tolist(), "no value")
    ids, places = _kept(id, used & filled), np.flatnonzero(used & filled)
    if len(repeated := np.flatnonzero(seen_before(ids))):
        value = ids[int(repeated[0])]
        first, second = places[pc.index(ids, value).as_py()], places[repeated[0]]
        table.problems.append(
            f"column {name!r}: {value.as_py()!r} in {table.where(int(first))} and "
            f"{table.where(int(second))} ({len(repeated)} such rows); expected each id once"
        )
    table.raise_problems()


def _of_kind(
    kind: str, mask: np.ndarray, id: Any, source: Any, text: Any, prefix: Any, path: str = ""
) -> pa.Table:
    count = int(mask.sum())
    repeat = lambda value: pa.repeat(pa.scalar(value, pa.large_string()), count)  # noqa: E731
    columns = [
        _kept(id, mask),
        repeat(path) if source is None else _kept(source, mask),
        pa.DictionaryArray.from_arrays(np.zeros(count, np.int8), [kind]),
        repeat(None) if text is None else _kept(text, mask),
        _kept(prefix, mask),
    ]
    return pa.table(columns, schema=_SCHEMA)


def _kept(column: Any, mask: np.ndarray) -> Any:
    return column if mask.all() else column.filter(pa.array(mask))


def _filled(strings: pa.ChunkedArray) -> np.ndarray:
    return pc.not_equal(strings, "").to_numpy()


def _joined(*strings: Any) -> Any:
    scalars = (pa.scalar(s, pa.large_string()) if isinstance(s, str) else s for s in (*strings, ""))
    return pc.binary_join_element_wise(*scalars)


def _slashed(folder: str) -> str:
    return "" if folder in ("", ".") else f"{folder.rstrip('/')}/"
