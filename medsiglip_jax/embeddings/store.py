"""Reads an embedding run in blocks: many vectors in little memory."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Float32, Int64

from medsiglip_jax.data.read_ahead import ahead
from medsiglip_jax.files import places, threads
from medsiglip_jax.inference.manifest import ERRORS, MANIFEST, Manifest, parse_manifest
from medsiglip_jax.preprocess.facts import describe

KINDS = ("image", "text", "any")
# 9 MB of float32 at 1152 numbers a row. Decoded from Parquet in blocks of 2,048 rows at 0.87 GB/s
# with a peak of 270 MB, in blocks of 8,192 at 0.69 GB/s and 860 MB (2 cores).
BLOCK_ROWS = 2048
_NAMES = 65536  # ids that are Python objects at a time
_STRINGS = {"id", "source", "kind"}  # columns that every row has
_LISTED = 10  # rows that are named of those left out
# What is said of vectors that have no cosine with any other.
NO_DIRECTION = "null, zero or not finite"


@dataclass(frozen=True)
class Block:
    """Some vectors, and their row numbers in the whole run, ascending."""

    rows: Int64[np.ndarray, " n"]
    vectors: Float[np.ndarray, "n d"]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class ArrayVectors:
    """Vectors in memory, which can be searched as `Embeddings` can.

    Attributes:
        array: one vector per row.
        normalized: whether all are known to have length 1, up to rounding.
        block_rows: rows per block.
    """

    array: Float[np.ndarray, "n d"]
    normalized: bool = False
    block_rows: int = 32_768  # they cost no memory: blocks are views

    @property
    def dim(self) -> int:
        """Numbers per vector."""
        return self.array.shape[1]

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Blocks in order, from row `start` on."""
        for first in range(start, len(self.array), self.block_rows):
            vectors = self.array[first : first + self.block_rows]
            yield Block(np.arange(first, first + len(vectors)), vectors)


@dataclass(frozen=True)
class NamedRow:
    """The id of a row, and the file that holds it."""

    id: str
    file: str


@dataclass(frozen=True)
class LeftOut:
    """What a search has left out: rows whose vector is null, zero or not finite.

    Attributes:
        rows: how many.
        first: the first of them.
    """

    rows: int
    first: tuple[NamedRow, ...]

    def __post_init__(self):
        if self.rows < 0 or bool(self.rows) != bool(self.first):
            raise ValueError(f"{self.rows} rows are left out, and {len(self.first)} are named")


class Embeddings:
    """A finished embedding run.

    Rows are numbered through all parts in order, whatever their kind.

    Attributes:
        folder: where it is, local or remote.
        manifest: the content of manifest.json.
        digest: SHA-256 of that file, which identifies the run.
        kind: which rows `blocks` gives: "image", "text" or "any".
        dim, normalized: of the vectors, as the manifest has them.
        without_direction: the rows read so far whose vector is null, zero or not finite, so that it
            has no cosine with any other.
    """

    def __init__(
        self, folder: places.Given, kind: str = "image", on_rows: Callable[[int], Any] = int
    ):
        """Opens a run.

        Args:
            folder: the `--output` of `embed`.
            kind: "image", "text" or "any".
            on_rows: called with the number of rows just read, for progress.

        Raises:
            FileNotFoundError: no such folder, or it has no manifest: the run is not complete.
            ValueError: an unknown kind, or the manifest is not one of `embed`.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
        self.folder, self.kind, self._on_rows = places.at(folder), kind, on_rows
        self.manifest, self.digest = _read_manifest(self.folder)
        self.dim, self.normalized = self.manifest.dim, self.manifest.normalized
        parts = self.manifest.parts
        self._files = [self.folder / part.file for part in parts]
        self._starts = np.cumsum([0, *(part.rows for part in parts)])
        self.without_direction: set[int] = set()

    @property
    def unreadable(self) -> list[str]:
        """The sources that `embed` could not read."""
        path = self.folder / ERRORS
        if not self.manifest.errors or not path.is_file():
            return []
        with _opened(path) as file:
            return file.read(columns=["source"])["source"].to_pylist()

    def __len__(self) -> int:
        """Number of rows of all kinds."""
        return int(self._starts[-1])

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Blocks of rows of `kind` in order, from row `start` on; the next ones are read ahead."""
        parts = [n for n in range(len(self._files)) if self._starts[n + 1] > start]
        return _blocks_of([self._part(number, start) for number in parts])

    def gather(self, rows: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n d"]:
        """The vectors of rows of `kind`, in that order; takes one pass over the run.

        Raises:
            ValueError: some of the rows are of another kind, not there, or without a direction.
        """
        numbers, position = np.unique(rows, return_inverse=True)
        vectors, count = np.empty((len(numbers), self.dim), np.float32), 0
        for block in self.blocks():
            _, here, there = np.intersect1d(block.rows, numbers, True, return_indices=True)
            vectors[there] = block.vectors[here]
            count += len(there)
        if count < len(numbers):
            raise ValueError(
                f"{self.folder}: {len(numbers) - count} of {len(numbers)} rows asked for are not "
                f"of kind {self.kind}, or not there"
            )
        self.check_directions(numbers.tolist())
        return vectors[position]

    def check_directions(self, rows: Sequence[int] | None = None) -> None:
        """Raises a ValueError that counts the rows read so far, or those of `rows`, that are
        `without_direction`, and names the first."""
        known = self.without_direction
        if bad := sorted(known if rows is None else known.intersection(rows)):
            (first,) = self._named(bad[:1])
            raise ValueError(
                f"{self.folder}: {len(bad)} embeddings are {NO_DIRECTION}, the first is of "
                f"{describe(first.id)} in {first.file}; embed these inputs again, in float32"
            )

    def left_out(self) -> LeftOut:
        """The rows read so far that are `without_direction`."""
        rows = sorted(self.without_direction)
        return LeftOut(len(rows), self._named(rows[:_LISTED]))

    def _named(self, rows: Sequence[int]) -> tuple[NamedRow, ...]:
        files = [self._files[part].name for part in self._parts_of(np.asarray(rows, np.int64))]
        named = zip(self.ids(rows), files, strict=True)
        return tuple(NamedRow(row["id"], file) for row, file in named)

    def _parts_of(self, rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The number of the part that holds each row."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def ids(
        self, rows: Sequence[int], columns: Sequence[str] = ("id", "source", "kind")
    ) -> list[dict[str, Any]]:
        """`{id, source, kind}` of each row, or other columns; only the parts that hold them are
        read."""
        numbers, position = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        parts = self._parts_of(numbers)
        named: list[dict[str, Any]] = []
        for part in np.unique(parts).tolist():
            with self._open(part, columns) as file:
                table = file.read(columns=list(columns))
            for name in _STRINGS.intersection(columns):
                _check_no_nulls(self._files[part], name, table[name])
            named += table.take(numbers[parts == part] - self._starts[part]).to_pylist()
        return [named[i] for i in position.tolist()]

    def names(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """`ids`, with few of them as Python objects at a time."""
        for start in range(0, len(rows), _NAMES):
            yield from self.ids(rows[start : start + _NAMES])

    def _part(self, number: int, start: int) -> Iterator[Block]:
        first = int(self._starts[number])
        columns = ["embedding"] if self.kind == "any" else ["embedding", "kind"]
        with self._open(number, columns) as file:
            for batch in file.iter_batches(BLOCK_ROWS, columns=columns):
                end = first + batch.num_rows
                if end > start:
                    yield self._block(batch, self._files[number], first, start)
                self._on_rows(batch.num_rows)
                first = end

    @contextmanager
    def _open(self, number: int, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
        """Opens a part, which must have as many rows as the manifest says, and these columns as
        `embed` writes them."""
        path, want = self._files[number], int(self._starts[number + 1] - self._starts[number])
        with _opened(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            problems = [f"{rows} rows, the manifest says {want}"] if rows != want else []
            for name in columns:
                problems += _column_problems(schema, name, self.dim)
            if problems:
                raise ValueError(f"{path}: {'; '.join(problems)}; was it changed? embed again")
            yield file

    def _block(self, batch: Any, path: places.Place, first: int, start: int) -> Block:
        rows = np.arange(first, first + batch.num_rows)
        vectors = _vectors(batch.column("embedding"), self.dim)
        keep = rows >= start
        if self.kind != "any":
            _check_no_nulls(path, "kind", batch.column("kind"))
            same = pc.call_function("equal", [batch.column("kind"), self.kind])
            keep &= same.to_numpy(zero_copy_only=False)
        block = Block(rows, vectors) if keep.all() else Block(rows[keep], vectors[keep])
        self.without_direction.update(block.rows[undirected(block.vectors)].tolist())
        return block


def _column_problems(schema: pyarrow.Schema, name: str, dim: int) -> list[str]:
    """What is wrong with a column, if it is not as `embed` writes it."""
    if schema.names.count(name) != 1:
        return [f"expected one column {name!r}, the columns are {', '.join(schema.names)}"]
    kind, types = schema.field(name).type, pyarrow.types
    if name != "embedding":
        text = types.is_string(kind) or types.is_large_string(kind)
        return [] if text else [f"column {name!r} holds {kind}, expected strings"]
    if not types.is_fixed_size_list(kind) or not types.is_floating(kind.value_type):
        return [f"column {name!r} holds {kind}, expected vectors of {dim} float numbers"]
    if kind.list_size != dim:
        return [f"vectors of {kind.list_size} numbers, the manifest says {dim}"]
    return []


def _check_no_nulls(path: places.Place, name: str, column: Any) -> None:
    if column.null_count:
        rows = f"{column.null_count} of {len(column)} rows have no {name}"
        raise ValueError(f"{path}: {rows}; was it changed? embed again")


def _vectors(column: Any, dim: int) -> Float[np.ndarray, "n d"]:
    """The vectors of a column, not copied; NaN for nulls, which are."""
    flat = column.flatten()  # without those that are null as a whole
    vectors = flat.to_numpy(zero_copy_only=not flat.null_count).reshape(-1, dim)
    if not column.null_count:
        return vectors
    whole = np.full((len(column), dim), np.nan, vectors.dtype)
    whole[column.is_valid().to_numpy(zero_copy_only=False)] = vectors
    return whole


def undirected(vectors: Float[np.ndarray, "n d"]) -> Int64[np.ndarray, " k"]:
    """Which vectors are zero or not finite. Those with squares in range are no further looked at,
    which takes a tenth of the time that reading takes."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("nd,nd->n", vectors, vectors)
    odd = np.flatnonzero(~((squares > 0) & (squares < np.inf)))
    has = np.isfinite(vectors[odd]).all(axis=1) & vectors[odd].any(axis=1)
    return odd[~has]


# What can be searched: vectors in files or in memory.
Vectors = Embeddings | ArrayVectors


def _read_manifest(folder: places.Place) -> tuple[Manifest, str]:
    """The manifest, and the SHA-256 of its file."""
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.exists():
            raise FileNotFoundError(f"no such folder: {folder}")
        raise FileNotFoundError(
            f"{path}: no such file; not a folder that embed wrote, or its run is not finished "
            "(the same embed command again finishes it)"
        )
    content = path.read_bytes()
    return parse_manifest(content, path), hashlib.sha256(content).hexdigest()


@contextmanager
def _opened(path: places.Place) -> Iterator[pq.ParquetFile]:
    """Opens a part; where Arrow cannot read it while it is open, the error names the file."""
    try:
        local = isinstance(path, Path)
        source: Any = str(path) if local else path.open("rb")
        with pq.ParquetFile(source, memory_map=local, pre_buffer=not local) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        # Errors with a number come from the system or the network, not from what the file holds.
        if isinstance(error, FileNotFoundError) or getattr(error, "errno", None):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: damaged ({reason}); remove it and {MANIFEST}, and repeat the embed command"
        ) from None


def _blocks_of(streams: Sequence[Iterator[Block]]) -> Iterator[Block]:
    """All blocks of all streams in order.

    While a block is in use, the next of its stream and the first of the following streams are read:
    decoding Parquet takes longer than scoring.
    """
    width = min(4, threads.processors())
    with ThreadPoolExecutor(width) as pool:
        started = ((blocks, pool.submit(next, blocks, None)) for blocks in streams)
        try:
            for blocks, future in ahead(started, width - 1):
                while (block := future.result()) is not None:
                    future = pool.submit(next, blocks, None)
                    if len(block):
                        yield block
        finally:
            pool.shutdown(cancel_futures=True)
