"""Pictures inside Parquet tables, as Hugging Face's `datasets` writes them: the bytes of one cell.

Parquet is read a row group at a time. Rows are mostly asked for in order, so the latest groups are
kept; `datasets` writes groups of 100 images.
"""

import threading
from collections import OrderedDict
from typing import Any

import pyarrow
from pyarrow import ArrowException, parquet

from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess import handles
from medsiglip_jax.preprocess.facts import UnreadableImage

_KEPT_BYTES = 256 << 20  # of row groups of one file; the latest may exceed it alone


def read_bytes(file: str, row: int, column: str) -> bytes:
    """The bytes of a picture.

    Args:
        file: local path or URI.
        row: from 0.
        column: of type binary, or struct with a field `bytes`.

    Raises:
        UnreadableImage: there is no such file, row or column, or nothing in that cell; the reason,
            without the path.
        Outage: the disk or the network fails, which says nothing about the file.
    """
    return handles.opened(file, _Table).read(row, column)


class _Table:
    """An open table; several threads may read cells of it."""

    def __init__(self, file: str):
        self._file, self._lock = file, threading.Lock()
        self._groups: OrderedDict[tuple[int, str], pyarrow.ChunkedArray] = OrderedDict()
        self._metadata = self._look(lambda table: table.metadata)
        self._schema = self._metadata.schema.to_arrow_schema()

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in list(self._groups.values()))

    def read(self, row: int, column: str) -> bytes:
        group, number = self._place(row)
        with self._lock:  # threads that want the same group wait for it
            cells = self._group(group, column)
        value = cells[number].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes) or not value:
            raise UnreadableImage(f"no picture in column {column!r}, row {row} (from 0)")
        return value

    def _place(self, row: int) -> tuple[int, int]:
        """The group of a row, and its number in it."""
        first = 0
        for group in range(self._metadata.num_row_groups):
            count = self._metadata.row_group(group).num_rows
            if row < first + count:
                return group, row - first
            first += count
        raise UnreadableImage(f"a table of {first} rows; row {row} (from 0) is asked for")

    def _group(self, group: int, column: str) -> pyarrow.ChunkedArray:
        key = group, column
        if key not in self._groups:
            # Of columns, names are used without blanks around them.
            names = [n for n in self._schema.names if n.strip() == column]
            if not names:
                raise UnreadableImage(f"a table without the column {column!r}")
            leaf = f"{names[0]}.bytes" * pyarrow.types.is_struct(self._schema.field(names[0]).type)
            table = self._look(lambda file: file.read_row_group(group, names), leaf or names[0])
            self._groups[key] = table[names[0]]
        self._groups.move_to_end(key)
        while len(self._groups) > 1 and self.nbytes > _KEPT_BYTES:
            self._groups.popitem(last=False)
        return self._groups[key]

    def _look(self, ask: Any, column: str = "") -> Any:
        """The result of `ask` for the file. Equal pictures of a column are kept once: 50 kB of a
        file may hold one of a megabyte a thousand times."""
        metadata = getattr(self, "_metadata", None)
        options: Any = {"read_dictionary": [column]} if column else {}

        def look(stream: Any) -> Any:
            try:
                return ask(parquet.ParquetFile(stream, metadata=metadata, **options))
            except MemoryError:
                raise
            except (ArrowException, OSError):  # their messages may quote the file
                raise UnreadableImage("not a Parquet file, or a damaged one") from None

        return content.looked_at(self._file, None, look)
