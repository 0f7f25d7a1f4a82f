"""Pairs of near duplicates: every pair is compared, exactly as in float64; see `cosines`."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medsiglip_jax.embeddings import cosines
from medsiglip_jax.embeddings.store import Block, Vectors

# Rows of the first side of a tile of pairs; the second side is read once for each tile.
_TILE_ROWS = 32_768
# Pairs of a tile that are multiplied at a time: 33 MB of cosines.
_STRIP_PAIRS = 1 << 23


class Pairs(NamedTuple):
    """Pairs of near duplicates, the nearest first, then by row.

    Attributes:
        rows: row numbers of the first and the second vector.
        cosines: of each pair.
        cut: whether there were more pairs than the limit.
    """

    rows: Int64[np.ndarray, "n 2"]
    cosines: Float64[np.ndarray, " n"]
    cut: bool


def near_duplicates(
    vectors: Vectors,
    threshold: float,
    other: Vectors | None = None,
    limit: int = 100_000,
    on_pairs: Callable[[int], Any] = int,
) -> Pairs:
    """Lists the pairs of rows whose cosine is at least `threshold`.

    Every pair is compared once, a tile at a time; memory does not grow with the number of rows.

    Args:
        vectors: both rows of a pair are of these, the second with the higher number.
        threshold: above 0, at most 1.
        other: take the second row of each pair from these instead.
        limit: at most so many pairs, those of the highest cosine.
        on_pairs: called with the number of pairs just compared, for progress.

    Raises:
        ValueError: `threshold` or `limit` out of range, or vectors of different sizes.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a cosine above 0, at most 1")
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    if other is not None and other.dim != vectors.dim:
        raise ValueError(f"vectors of {vectors.dim} and of {other.dim} numbers cannot be compared")
    kept = _NearestPairs(threshold, limit)
    for tile in _tiles(vectors):
        first = cosines.put(cosines.unit(tile.vectors))
        blocks = vectors.blocks(int(tile.rows[0])) if other is None else other.blocks()
        for block in blocks:
            _compare(kept, tile, first, block, other is None)
            on_pairs(len(tile) * len(block))
    return kept.pairs()


def _tiles(vectors: Vectors) -> Iterator[Block]:
    """Blocks joined until they have `_TILE_ROWS` rows or a few more."""
    blocks = vectors.blocks()
    for block in blocks:
        rows, parts = [block.rows], [block.vectors]
        while sum(map(len, rows)) < _TILE_ROWS and (more := next(blocks, None)) is not None:
            rows.append(more.rows)
            parts.append(more.vectors)
        yield Block(np.concatenate(rows), np.concatenate(parts))


def _compare(kept: "_NearestPairs", tile: Block, first: Any, block: Block, same: bool) -> None:
    """Adds the pairs of a tile, whose unit vectors are `first`, and a block."""
    second, margin = cosines.put(cosines.unit(block.vectors)), cosines.margin(block.vectors)
    rows = max(1, _STRIP_PAIRS // len(block))
    for start in range(0, len(tile), rows):
        if same and tile.rows[start] >= block.rows[-1]:
            break
        strip = first[start : start + rows]
        i, j = cosines.above(strip, second, kept.bound - margin)
        i += start
        if same:
            i, j = (side[tile.rows[i] < block.rows[j]] for side in (i, j))
        exact = cosines.exact(tile.vectors, i, block.vectors, j)
        kept.add(np.stack([tile.rows[i], block.rows[j]], axis=1), exact)


class _NearestPairs:
    """The nearest pairs so far; when there are too many, the worst go, and `bound` rises."""

    def __init__(self, threshold: float, limit: int):
        self.bound, self._limit, self._cut = threshold, limit, False
        self._rows, self._cosines = np.empty((0, 2), np.int64), np.empty(0)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0  # of the pairs that wait

    def add(self, rows: Int64[np.ndarray, "n 2"], cosines: Float64[np.ndarray, " n"]) -> None:
        keep = cosines >= self.bound
        if not keep.any():  # as of nearly all of the 60,000 strips of a million rows
            return
        self._waiting.append((rows[keep], cosines[keep]))
        self._count += int(keep.sum())
        if self._count > self._limit:
            self._sort()

    def pairs(self) -> Pairs:
        self._sort()
        return Pairs(self._rows, self._cosines, self._cut)

    def _sort(self) -> None:
        rows = np.concatenate([self._rows, *(rows for rows, _ in self._waiting)])
        cosines = np.concatenate([self._cosines, *(cosines for _, cosines in self._waiting)])
        order = np.lexsort((rows[:, 1], rows[:, 0], -cosines))
        self._cut |= len(order) > self._limit
        order = order[: self._limit]
        self._rows, self._cosines = rows[order], cosines[order]
        self._waiting, self._count = [], 0
        if self._cut:
            self.bound = float(self._cosines[-1])


def count_groups(pairs: Int64[np.ndarray, "n 2"]) -> int:
    """The number of groups of rows that pairs connect, directly or through other rows."""
    rows, ends = np.unique(pairs, return_inverse=True)
    i, j = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (i, j)), shape=(len(rows), len(rows)))
    return connected_components(graph, directed=False)[0]
