"""What to embed, as Arrow columns, so that a million rows are not a million Python objects."""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsiglip_jax.files import credentials
from medsiglip_jax.preprocess.names import Tile, escaped
from medsiglip_jax.preprocess.parts import Parts

_BLOCK = 65536  # rows that are Python objects at any time
_STRING, _KIND = pa.large_string(), pa.dictionary(pa.int8(), pa.string())
SCHEMA = pa.schema({"id": _STRING, "source": _STRING, "kind": _KIND, "text": _STRING})
# A column more, where some row was found to be unreadable when the rows were listed: why it is.
REASON = pa.field("reason", _STRING)
# Further columns, of tiles of slides: where the tile lies (`preprocess.names.Tile`), and its
# micrometres per pixel. They are null in other rows.
EXTRA = pa.schema({**dict.fromkeys(Tile._fields, pa.int32()), "mpp": pa.float32()})


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to embed.

    Attributes:
        id: unique among the rows of its kind.
        source: a file or a part of one, see `preprocess.names`.
        kind: "image" or "text".
        text: the text itself if kind is "text".
        reason: why it cannot be read, if that is known already.
    """

    id: str
    source: str
    kind: str
    text: str | None = None
    reason: str | None = None


class Rows(Sequence[Row]):
    """A list of `Row`, held as Arrow columns; a slice of it shares them.

    Attributes:
        table: columns `id`, `source`, `kind`, `text`, and `REASON` and those of `EXTRA` that some
            row has.
        parts: which parts of files that hold more than one image were asked for.
        skipped: what is not among the rows -> how often: suffixes of files in the given folders and
            shards, or words.
    """

    def __init__(
        self, table: pa.Table, skipped: Mapping[str, int] | None = None, parts: Parts = Parts()
    ):
        more = [name for name in (REASON.name, *EXTRA.names) if name in table.column_names]
        self.table = table.select([*SCHEMA.names, *more])
        counts = sorted((skipped or {}).items())
        self.skipped, self.parts = {name: count for name, count in counts if count}, parts

    @property
    def extra(self) -> list[str]:
        """Names of the columns of `EXTRA` that the table has."""
        return [name for name in EXTRA.names if name in self.table.column_names]

    @property
    def images(self) -> Iterator[str]:
        """The sources of the images."""
        return (row.source for row in self if row.kind == "image")

    @property
    def shown(self) -> pa.ChunkedArray:
        """The sources as they are printed and written: without credentials, and so without the
        queries of addresses."""
        return without_credentials(self.table.column("source"))

    @property
    def reasons(self) -> list[str | None]:
        """Why each row cannot be read, as far as that is known already."""
        if REASON.name not in self.table.column_names:
            return [None] * len(self)
        return self.table.column(REASON.name).to_pylist()

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index):
        span = range(len(self))[index]
        if isinstance(span, int):
            return Row(*(column[span].as_py() for column in self._row_columns()))
        if span.step == 1:
            return Rows(self.table.slice(span.start, len(span)), parts=self.parts)
        return Rows(self.table.take(pa.array(span, pa.int64())), parts=self.parts)

    def __iter__(self) -> Iterator[Row]:
        return itertools.starmap(Row, _tuples(self._row_columns()))

    def _row_columns(self) -> list[pa.ChunkedArray]:
        names = (*SCHEMA.names, REASON.name)
        return [self.table.column(name) for name in names if name in self.table.column_names]

    def batches(self, size: int) -> Iterator["Rows"]:
        """Cuts the rows into batches of one kind, of `size` rows or fewer."""
        kinds = self.table.column("kind").to_pylist()
        start = 0
        for end in range(1, len(kinds) + 1):
            if end == len(kinds) or kinds[end] != kinds[start] or end - start == size:
                yield self[start:end]
                start = end

    def sha256(self) -> str:
        """A digest of all columns, whatever chunks they are stored in."""
        names = self.table.column_names[len(SCHEMA) :]
        digest = hashlib.sha256(" ".join([str(len(self)), *names]).encode())
        for column in self.table.columns:
            for chunk in column.chunks:
                digest.update(_lengths(chunk).astype("<i8").tobytes())
            for chunk in column.chunks:
                digest.update(_content(chunk))
        return digest.hexdigest()


def without_credentials(strings: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of large_string whose addresses are `credentials.without` them."""
    if not any(pc.any(pc.match_substring(strings, mark)).as_py() for mark in "?@"):
        return strings
    for pattern, kept in credentials.PATTERNS:
        strings = pc.replace_substring_regex(strings, pattern, kept)
    return strings


def describe_skipped(
    skipped: Mapping[str, int], all_files: bool, option: str = "--all-files"
) -> list[str]:
    """Lines about what is not among rows.

    Args:
        skipped: as `Rows` has it.
        all_files: whether other files were looked into.
        option: what would have them looked into.
    """
    skipped = {name: count for name, count in sorted(skipped.items()) if count}
    files = {name: n for name, n in skipped.items() if name.startswith((".", "no suffix"))}
    others = ", ".join(f"{n:,} {name}" for name, n in skipped.items() if name not in files)
    shown = ", ".join(f"{suffix} {count:,}" for suffix, count in files.items())
    advice = "" if all_files else f"; {option} looks for images among them by content"
    lines = [f"skipped other files in folders and shards: {shown}{advice}"] if files else []
    return lines + ([f"left out: {others}"] if others else [])


def from_tuples(rows: Iterable[tuple[str | None, ...]], schema: pa.Schema = SCHEMA) -> pa.Table:
    """A table of rows that come one by one; file names that are not UTF-8 are escaped."""
    rows, blocks = iter(rows), []
    while block := list(itertools.islice(rows, _BLOCK)):
        columns = zip(*block, strict=True)
        arrays = [_array(cells, field.type) for cells, field in zip(columns, schema, strict=True)]
        blocks.append(pa.table(arrays, schema=schema))
    return pa.concat_tables([schema.empty_table(), *blocks])


def _array(cells: Sequence[str | None], type: pa.DataType) -> pa.Array:
    try:
        return pa.array(cells, type)
    except UnicodeEncodeError:
        return pa.array([cell and escaped(cell) for cell in cells], type)


def seen_before(*columns: pa.ChunkedArray) -> np.ndarray:
    """Whether each row equals an earlier one. Hashes, 8 bytes a row, find candidates to compare.

    Args:
        columns: of equal length; a row is what they hold at one position.

    Returns:
        bool [n].
    """
    hashes = np.fromiter(map(hash, _tuples(columns)), np.int64, len(columns[0]))
    order = np.argsort(hashes)
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    suspects = np.union1d(order[same], order[same + 1])
    candidates = [column.take(pa.array(suspects, pa.int64())) for column in columns]
    repeated, seen = np.zeros(len(hashes), bool), set()
    for position, row in zip(suspects, _tuples(candidates), strict=True):
        repeated[position] = row in seen
        seen.add(row)
    return repeated


def _tuples(columns: Sequence[pa.ChunkedArray]) -> Iterator[tuple[Any, ...]]:
    """The rows of columns, few of them as Python objects at a time."""
    for start in range(0, len(columns[0]), 8192):
        cells = (_plain(column.slice(start, 8192)).to_pylist() for column in columns)
        yield from zip(*cells, strict=True)


def _lengths(strings: pa.Array) -> np.ndarray:
    """The length of each string in bytes, -1 for null."""
    return pc.fill_null(pc.binary_length(_plain(strings)), -1).to_numpy(zero_copy_only=False)


def _content(strings: pa.Array) -> memoryview:
    """The bytes of all strings, concatenated; without a copy unless some are null."""
    filled = pc.fill_null(_plain(strings), "")
    offsets = np.frombuffer(filled.buffers()[1], np.int64)[filled.offset :][: len(filled) + 1]
    data = filled.buffers()[2]
    return memoryview(data or b"")[offsets[0] : offsets[-1]] if len(filled) else memoryview(b"")


def _plain(strings: Any) -> Any:
    """An array or chunked array as plain strings: no dictionary, numbers written out."""
    return strings.cast(_STRING)
