"""Reads an embedding run in blocks: many vectors in little memory."""

import hashlib
import os
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
from medsiglip_jax.files import places
from medsiglip_jax.inference.manifest import MANIFEST, Manifest, parse_manifest

KINDS = ("image", "text", "any")
# 9 MB of float32 at 1152 numbers a row. Decoded from Parquet in blocks of 2,048 rows at 0.87 GB/s
# with a peak of 270 MB, in blocks of 8,192 at 0.69 GB/s and 860 MB (2 cores).
BLOCK_ROWS = 2048
_NAMES = 65536  # ids that are Python objects at a time


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
        return self.array.shape[1]

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Blocks in order, from row `start` on."""
        for first in range(start, len(self.array), self.block_rows):
            vectors = self.array[first : first + self.block_rows]
            yield Block(np.arange(first, first + len(vectors)), vectors)


class Embeddings:
    """A finished embedding run.

    Rows are numbered through all parts in order, whatever their kind.

    Attributes:
        folder: where it is, local or remote.
        manifest: the content of manifest.json.
        digest: SHA-256 of that file, which identifies the run.
        kind: which rows `blocks` gives: "image", "text" or "any".
        dim, normalized: of the vectors, as the manifest has them.
        without_direction: the rows read so far whose vector is zero or not finite, so that it has
            no cosine with any other.
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
            ValueError: some of the rows are of another kind, not there, or not finite.
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
        self.check_finite(numbers, vectors)
        return vectors[position]

    def check_finite(self, rows: Int64[np.ndarray, " n"], vectors: Float[np.ndarray, "n d"]):
        """Raises a ValueError that names the first of these rows whose vector is not finite."""
        if len(bad := rows[~np.isfinite(vectors).all(axis=1)]):
            first = self.ids([int(bad[0])])[0]["id"]
            raise ValueError(
                f"{self.folder}: {len(bad)} embeddings are not finite, the first is of {first!r}; "
                "embed these inputs again, in float32"
            )

    def ids(
        self, rows: Sequence[int], columns: Sequence[str] = ("id", "source", "kind")
    ) -> list[dict[str, Any]]:
        """`{id, source, kind}` of each row, or other columns; only the parts that hold them are
        read."""
        numbers, position = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        parts = np.searchsorted(self._starts, numbers, side="right") - 1
        named: list[dict[str, Any]] = []
        for part in np.unique(parts):
            with _open(self._files[part]) as file:
                table = file.read(columns=list(columns))
            named += table.take(numbers[parts == part] - self._starts[part]).to_pylist()
        return [named[i] for i in position.tolist()]

    def names(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """`ids`, with few of them as Python objects at a time."""
        for start in range(0, len(rows), _NAMES):
            yield from self.ids(rows[start : start + _NAMES])

    def _part(self, number: int, start: int) -> Iterator[Block]:
        path, first = self._files[number], int(self._starts[number])
        with _open(path) as file:
            want = int(self._starts[number + 1]) - first
            size = file.schema_arrow.field("embedding").type.list_size
            if (file.metadata.num_rows, size) != (want, self.dim):
                raise ValueError(
                    f"{path}: {file.metadata.num_rows} rows of {size} numbers, the manifest says "
                    f"{want} of {self.dim}; was it changed since? embed again"
                )
            columns = ["embedding"] if self.kind == "any" else ["embedding", "kind"]
            for batch in file.iter_batches(BLOCK_ROWS, columns=columns):
                end = first + batch.num_rows
                if end > start:
                    yield self._block(batch, first, start)
                self._on_rows(batch.num_rows)
                first = end

    def _block(self, batch: Any, first: int, start: int) -> Block:
        rows = np.arange(first, first + batch.num_rows)
        flat = batch.column("embedding").flatten().to_numpy(zero_copy_only=True)  # not a copy
        vectors = flat.reshape(-1, self.dim)
        keep = rows >= start
        if self.kind != "any":
            same = pc.call_function("equal", [batch.column("kind"), self.kind])
            keep &= same.to_numpy(zero_copy_only=False)
        block = Block(rows, vectors) if keep.all() else Block(rows[keep], vectors[keep])
        self.without_direction.update(block.rows[_without_direction(block.vectors)].tolist())
        return block


def _without_direction(vectors: Float[np.ndarray, "n d"]) -> Int64[np.ndarray, " k"]:
    """Which vectors are zero or not finite; those with squares in range are no further looked at,
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
def _open(path: places.Place) -> Iterator[pq.ParquetFile]:
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
    width = min(4, os.cpu_count() or 1)
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
