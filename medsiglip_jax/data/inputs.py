"""What to embed: files, folders, globs, tables, tar and TFRecord shards -> rows."""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

import codecs
import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsiglip_jax.data import expansion, roles, tar
from medsiglip_jax.data.columns import filled, read_text_bytes
from medsiglip_jax.data.ids import kept, with_public_ids, with_unique_ids
from medsiglip_jax.data.listing import TABLE_SUFFIXES, File, expand, waiting
from medsiglip_jax.data.rows import REASON, SCHEMA, Rows, from_tuples, seen_before
from medsiglip_jax.data.table import Table
from medsiglip_jax.data.tables import INDEX, read_index, read_table
from medsiglip_jax.files.threads import Step, watched
from medsiglip_jax.preprocess.formats import FORMATS
from medsiglip_jax.preprocess.names import Tile
from medsiglip_jax.preprocess.parts import Parts

# `prefix + id` is the full id, which is used where two inputs give the same id.
_SCHEMA = SCHEMA.append(pa.field("prefix", pa.dictionary(pa.int32(), pa.string())))
_WITH_REASON = _SCHEMA.append(REASON)
_Cells = tuple[str | None, ...]  # of `_WITH_REASON`
_Line = tuple[int, str, str | None]  # number, text, and why it cannot be read
# "image", "text" and "id" -> what a table calls these columns; None ignores one.
_Columns = Mapping[str, str | None]
_DEFAULT: _Columns = {"image": "image", "text": "text", "id": "id"}
# str.splitlines also cuts at form feeds and at what Unicode calls line and paragraph separators.
_LINE_END = re.compile(rb"\r\n|\r|\n")
_BLANK = "table rows without an image or a text"


def rows(
    inputs: Sequence[str | os.PathLike],
    *,
    image: str | None = "image",
    text: str | None = "text",
    id: str | None = "id",
    root: str | os.PathLike | None = None,
    parts: Parts = Parts(),
    all_files: bool = False,
    on_file: Callable[[int], Any] = int,
) -> Rows:
    """Lists images and texts, local or remote; see `listing.expand` for folders and globs.

    | input | rows | id |
    |---|---|---|
    | image, or what has no other format's suffix | an image | its path below the folder given |
    | slide, with `parts.mpp` | its tiles | the same, with #tile=… |
    | .txt | a text per non-blank line; images, if all lines are names of some | FILE:LINE |
    | .csv .tsv .jsonl .parquet | all images, then all texts | the column `id`, or see below |
    | .tar (WebDataset) | images, and texts of .txt and .json | see `tar.entries` |
    | .tfrecord | the images and texts of the index beside it | SHARD#OFFSET:LENGTH |

    An image and a text with the same id are a pair. In a table without ids, the id is the image's
    path as the table has it. A row without an image, or whose image an earlier row has, gets the id
    FILE:LINE (in Parquet FILE:ROW), so that ids are unique.

    Where two inputs give the same id, all ids become full paths (of the file, or of the shard and
    the member in it), except those of an id column. A file name that is not UTF-8 is written with
    escapes such as \\udcff, and its image is reported as unreadable.

    What is known to be unreadable, such as a text that is not UTF-8, or the second image of a key
    of a shard, is a row with a reason.

    Where `parts` asks for it, images become parts of them, however they were named: their sources
    and ids end in #frame=… or #tile=… (see `expansion`).

    Args:
        inputs: paths and URIs. A folder may hold images, .txt, .tar and .tfrecord; `skipped` of
            the result counts its other files, and other members of shards, by suffix.
        image: a table's column of paths or URIs, or in Parquet of pictures; an empty cell is no
            image. This column, `text` and `id` may be absent under their default names, and those
            of images and texts are then also known by other names (`roles`); None ignores them.
        text: a table's column of texts; an empty cell is no text.
        id: a table's column of ids, each once.
        root: the folder that relative paths in tables start at; default the table's own folder.
        parts: which parts of files that hold more than one image.
        all_files: know images in folders and shards by their content, whatever their suffix.
        on_file: called with 1 for each file that was opened to list its parts.

    Raises:
        FileNotFoundError: all inputs that do not exist.
        ModuleNotFoundError: the package that reads a file is not installed.
        Stalled: a disk does not answer, see `threads.watched`.
        ValueError: there is nothing to embed, an input is given twice, a file is wrong, or it is
            not clear which column of a table is meant.

    Warns:
        UserWarning: what of a table is read, where nobody has named the columns.
    """
    columns = {"image": image, "text": text, "id": id}
    skipped: Counter[str] = Counter()

    def read(on_step: Step) -> list[pa.Table]:
        listed = itertools.chain.from_iterable(expand(inputs, all_files, on_step))
        listing = _Listing(columns, str(root or ""), all_files, skipped, on_step)
        return list(listing.tables(_counted(listed, skipped, parts)))

    tables = [_SCHEMA.empty_table(), *watched(read, expansion.LIST)]
    table = pa.concat_tables(tables, promote_options="default")
    table = expansion.table(with_public_ids(table), parts, on_file, skipped)
    if not len(table):
        raise ValueError(_nothing(inputs, skipped))
    return Rows(with_unique_ids(table), skipped, parts)


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


class _Listing:
    """Files -> rows, with what is asked for of tables and shards, and the count of the rest."""

    def __init__(
        self, columns: _Columns, root: str, all_files: bool, skipped: Counter[str], on_step: Step
    ):
        self._columns, self._root = columns, root
        self._all_files, self._skipped, self._on_step = all_files, skipped, on_step

    def tables(self, files: Iterable[File]) -> Iterator[pa.Table]:
        for (format, folder), group in itertools.groupby(files, _group):
            if format == "table":
                yield from map(self._of_table, group)
            elif format == "tfrecord":
                names = {os.path.basename(file.name) for file in group}
                with waiting(folder, self._on_step):
                    table = _of_table(read_index(folder, names), _DEFAULT, "", self._skipped)
                yield table
            else:
                yield from self._of_files(group)

    def _of_table(self, file: File) -> pa.Table:
        with waiting(file.path, self._on_step):
            table = read_table(file.path)
            return _of_table(table, self._columns, self._root, self._skipped)

    def _of_files(self, files: Iterable[File]) -> Iterator[pa.Table]:
        """Rows without a reason lack that column, as most tables do."""
        cells = itertools.chain.from_iterable(map(self._of_file, files))
        for bad, group in itertools.groupby(cells, lambda row: row[-1] is not None):
            schema = _WITH_REASON if bad else _SCHEMA
            yield from_tuples((row[: len(schema)] for row in group), schema)

    def _of_file(self, file: File) -> Iterator[_Cells]:
        if file.format == "image":
            yield file.name, file.path, "image", None, file.root, None
        elif file.format == "tar":
            members = tar.entries(file.path, self._skipped, self._all_files, self._on_step)
            for entry in members:
                yield *entry[:4], f"{file.path}/", entry.reason
        else:
            yield from self._of_text(file)

    def _of_text(self, file: File) -> Iterator[_Cells]:
        with waiting(file.path, self._on_step):
            lines = list(_lines(file.path))
        named = [roles.names_image(text) for _, text, _ in lines]
        if lines and all(named):
            yield from self._of_list(file, lines)
            return
        if any(named):
            warnings.warn(
                f"{file.path}: {sum(named)} of its {len(lines)} lines are names of images, and are "
                "embedded as texts like the others",
                stacklevel=2,
            )
        for number, text, reason in lines:
            yield f"{file.name}:{number}", file.path, "text", text, file.root, reason

    def _of_list(self, file: File, lines: Sequence[_Line]) -> Iterator[_Cells]:
        """Images whose names are the lines of a file; in a folder, tables of images are not read,
        either."""
        if file.searched:
            self._skipped["lists of images (.txt)"] += 1
            return
        warnings.warn(f"{file.path}: its lines are read as names of images", stacklevel=2)
        root, seen = _slashed(self._root or file.root), set()
        for number, name, _ in lines:
            folder = "" if name.startswith("/") or "://" in name else root
            repeated = name in seen
            id, prefix = (f"{file.name}:{number}", root) if repeated else (name, folder)
            yield id, folder + name, "image", None, prefix, None
            seen.add(name)


def _lines(path: str) -> Iterator[_Line]:
    """The lines of a text file that are not blank."""
    data = read_text_bytes(path).removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        yield 1, "", "no text, or not UTF-8 (UTF-16 has to be converted)"
        return
    for number, line in enumerate(_LINE_END.split(data), start=1):
        try:
            if text := line.decode().strip():
                yield number, text, None
        except UnicodeDecodeError as error:
            yield number, "", f"line {number}: not UTF-8 text ({error.reason})"


def _group(file: File) -> tuple[str, str]:
    """Consecutive files with the same key are read together: TFRecord shards by their folder."""
    if file.format == "tfrecord":
        return file.format, os.path.dirname(file.path) or "."
    return ("file" if file.format in ("image", "text") else file.format), ""


def _of_table(table: Table, columns: _Columns, root: str, skipped: Counter[str]) -> pa.Table:
    """The images of a table, then its texts."""
    named = _named(table, columns)
    images = table.images(named.get("image"))
    text = table.strings(named["text"]) if "text" in named else _blank(table)
    id = table.strings(named["id"]) if "id" in named else None
    table.raise_problems()
    has_image, has_text = images.given, filled(text)
    if blank := int((~has_image & ~has_text).sum()):
        skipped[_BLANK] += blank
    base, own = _slashed(root or table.root), _slashed(table.root)
    prefixes = ["", base, own, f"{table.path}/"]
    if id is None:
        id, by_image = table.default_ids(images)
        of_name = np.where(images.inside, 3, images.relative)
        prefix = np.where(by_image, of_name, 2).astype(np.int32)
    else:
        _check_ids(table, columns["id"], id, has_image | has_text)
        prefix = np.zeros(len(id), np.int32)
    prefix = pa.DictionaryArray.from_arrays(prefix, prefixes)
    source = images.sources(base)
    of_images = _of_kind("image", has_image, id, source, None, prefix)
    of_texts = _of_kind("text", has_text, id, None, text, prefix, table.path)
    return pa.concat_tables([of_images, of_texts])


def _named(table: Table, columns: _Columns) -> dict[str, str]:
    """The roles "image", "text" and "id" -> the columns that these are, as far as they exist.

    Raises:
        ValueError: there are neither images nor texts, or it is not clear which column is meant.
    """
    named = {
        role: column
        for role, name in columns.items()
        if name is not None and (column := table.find(role, name)) is not None
    }
    if named.keys() & {"image", "text"} == {"text"} and columns["image"] and not table.problems:
        table.check_texts_only(named.values())
    if not named.keys() & {"image", "text"} and not table.problems:
        wanted = " or ".join(repr(columns[role]) for role in ("image", "text") if columns[role])
        there = ", ".join(table.columns)
        table.problems.append(
            f"no column {wanted}; there are {there}; name it (--image-column, --text-column)"
        )
    table.raise_problems()
    return named


def _blank(table: Table) -> pa.ChunkedArray:
    return pa.chunked_array([pa.repeat(pa.scalar("", pa.large_string()), len(table.lines))])


def _check_ids(table: Table, name: str | None, id: pa.ChunkedArray, used: np.ndarray) -> None:
    given = filled(id)
    table.report(name, id, np.flatnonzero(used & ~given).tolist(), "no value")
    ids, places = kept(id, used & given), np.flatnonzero(used & given)
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
        kept(id, mask),
        repeat(path) if source is None else kept(source, mask),
        pa.DictionaryArray.from_arrays(np.zeros(count, np.int8), [kind]),
        repeat(None) if text is None else kept(text, mask),
        kept(prefix, mask),
    ]
    return pa.table(columns, schema=_SCHEMA)


def _slashed(folder: str) -> str:
    return "" if folder in ("", ".") else f"{folder.rstrip('/')}/"
