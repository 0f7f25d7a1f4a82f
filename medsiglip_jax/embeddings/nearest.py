"""Nearest vectors and pairs of near vectors: screened in float32, decided in float64.

Every cosine is first computed in float32 by the fastest product there is, whose error has a bound.
What is within that bound of being a result is computed again in float64, from the stored vectors,
one pair at a time. So the results are those of float64, and depend neither on how the vectors are
cut into blocks or files, nor on the number of queries, nor on the device.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64

from medsiglip_jax.embeddings import products
from medsiglip_jax.embeddings.store import Block, Source

# Pairs computed in float64 at a time: 1.2 MB a side at 1152 numbers a vector.
_EXACT_PAIRS = 128
# Rows of the first piece of a first block; its best spare most of the others.
_FIRST_ROWS = 8192
# Rows of the first side of a tile of pairs; the second side is read once for each tile.
_TILE_ROWS = 32_768
# Of which so many are multiplied at a time: 33 MB of cosines.
_STRIP_PAIRS = 1 << 23
_NO_ROW = np.iinfo(np.int64).max


class Pairs(NamedTuple):
    """Pairs of near vectors, the nearest first, then by row.

    Attributes:
        rows: of the first and the second vector.
        cosines: of each pair.
        cut: whether there were more pairs than the limit.
    """

    rows: Int64[np.ndarray, "n 2"]
    cosines: Float64[np.ndarray, " n"]
    cut: bool


# -------------------------------------------------------------------------------------- top k


def top_k(
    queries: Float[np.ndarray, "q d"], source: Source, k: int
) -> tuple[Float64[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """Finds the k vectors of the highest cosine with each query.

    Args:
        queries: of any length but 0.
        source: what to search, in one pass over its blocks.
        k: how many; where `source` has fewer rows, all are found.

    Returns:
        Cosines, the highest first, and row numbers; of equal cosines the lower row comes first.
        Vectors that are zero or not finite come last, with -inf.

    Raises:
        ValueError: `k` below 1, or queries that do not fit or have no direction.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    _check_queries(queries, source.dim)
    best = _Best(queries, k)
    screen = products.screen(unit(queries), source.normalized)
    for block in source.blocks():
        best.offer(block, screen(block.vectors), _margin(block.vectors))
    found = int((best.rows[:1] != _NO_ROW).sum())
    return best.cosines[:, :found], best.rows[:, :found]


def _check_queries(queries: np.ndarray, dim: int) -> None:
    if queries.shape[1] != dim:
        raise ValueError(f"queries has shape {queries.shape}; expected [q, {dim}], as embedded")
    length = np.linalg.norm(queries.astype(np.float64), axis=1)
    if bad := np.flatnonzero(~((length > 0) & (length < np.inf))).tolist():
        raise ValueError(f"queries {bad}: zero or not finite; expected vectors with a direction")


class _Best:
    """The best rows so far of each query, the best first."""

    def __init__(self, queries: Float[np.ndarray, "q d"], k: int):
        self._queries = queries
        self.cosines = np.full((len(queries), k), -np.inf)
        self.rows = np.full((len(queries), k), _NO_ROW)

    def offer(self, block: Block, scores: Float32[np.ndarray, "n q"], margin: float) -> None:
        """Takes in what may be among the best of a block, given its cosines up to `margin`."""
        if len(block) > _FIRST_ROWS and np.isneginf(self.cosines[:, -1]).any():
            for rows in (slice(None, _FIRST_ROWS), slice(_FIRST_ROWS, None)):
                part = Block(block.rows[rows], block.vectors[rows])
                self.offer(part, scores[rows], margin)
            return
        rows, queries = _nonzero(self._hopeful(scores, margin))
        if len(rows) > 8 * self.rows.size:  # at first: the best k spare most of the others
            k = self.rows.shape[1]
            first = np.argpartition(-scores, k, axis=0)[:k]  # NaN comes last
            self._insert(block, first.reshape(-1), np.tile(np.arange(len(self.rows)), k))
            hopeful = self._hopeful(scores, margin)
            np.put_along_axis(hopeful, first, False, axis=0)
            rows, queries = _nonzero(hopeful)
        if len(rows):
            self._insert(block, rows, queries)

    def _hopeful(self, scores: Float32[np.ndarray, "n q"], margin: float) -> np.ndarray:
        bounds = (self.cosines[:, -1] - margin).astype(np.float32)
        return ~(scores < bounds)  # and what is NaN, which float64 may know better

    def _insert(
        self, block: Block, rows: Int64[np.ndarray, " c"], queries: Int64[np.ndarray, " c"]
    ) -> None:
        exact = _cosines(block.vectors, rows, self._queries, queries)
        count, k = self.rows.shape
        cosines = np.concatenate([self.cosines.reshape(-1), exact])
        rows = np.concatenate([self.rows.reshape(-1), block.rows[rows]])
        queries = np.concatenate([np.repeat(np.arange(count), k), queries])
        order = np.lexsort((rows, -cosines, queries))
        starts = np.searchsorted(queries[order], np.arange(count))
        best = order[starts[:, None] + np.arange(k)]
        self.cosines, self.rows = cosines[best], rows[best]


def _nonzero(mask: Bool[np.ndarray, "n q"]) -> tuple[np.ndarray, np.ndarray]:
    """np.nonzero, which takes 3 ms for 8,192 x 64; this takes 0.1 ms."""
    rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return rows, columns


# ------------------------------------------------------------------------------ near duplicates


def near_duplicates(
    source: Source,
    threshold: float,
    other: Source | None = None,
    limit: int = 100_000,
    on_pairs: Callable[[int], Any] = int,
) -> Pairs:
    """Lists the pairs of rows whose cosine is at least `threshold`.

    Every pair is compared once, a tile at a time; memory does not grow with the number of rows.

    Args:
        source: the first row of each pair, and the second, with the higher number.
        threshold: above 0, at most 1.
        other: the second row of each pair is one of these instead.
        limit: at most so many pairs, those of the highest cosine.
        on_pairs: called with the number of pairs just compared, for progress.

    Raises:
        ValueError: `threshold` or `limit` out of range, or sides of different models.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a cosine above 0, at most 1")
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    if other is not None and other.dim != source.dim:
        raise ValueError(f"vectors of {source.dim} and of {other.dim} numbers cannot be compared")
    found = _Found(threshold, limit)
    for tile in _tiles(source):
        first = products.put(unit(tile.vectors))
        blocks = source.blocks(int(tile.rows[0])) if other is None else other.blocks()
        for block in blocks:
            _compare(found, tile, first, block, other is None)
            on_pairs(len(tile) * len(block))
    return found.pairs()


def _tiles(source: Source) -> Iterator[Block]:
    """Blocks put together to `_TILE_ROWS` rows or a little more."""
    waiting: list[Block] = []
    for block in source.blocks():
        waiting.append(block)
        if sum(map(len, waiting)) >= _TILE_ROWS:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(blocks: list[Block]) -> Block:
    vectors = np.concatenate([block.vectors for block in blocks])
    return Block(np.concatenate([block.rows for block in blocks]), vectors)


def _compare(found: "_Found", tile: Block, first: Any, block: Block, same: bool) -> None:
    """Adds the pairs of a tile, whose unit vectors are `first`, with a block."""
    second, margin = products.put(unit(block.vectors)), _margin(block.vectors)
    rows = max(1, _STRIP_PAIRS // len(block))
    for start in range(0, len(tile), rows):
        if same and tile.rows[start] >= block.rows[-1]:
            break
        strip = first[start : start + rows]
        i, j = products.above(strip, second, found.bound - margin)
        i += start
        if same:
            i, j = (side[tile.rows[i] < block.rows[j]] for side in (i, j))
        cosines = _cosines(tile.vectors, i, block.vectors, j)
        found.add(np.stack([tile.rows[i], block.rows[j]], axis=1), cosines)


class _Found:
    """The pairs so far; past twice the limit the lower half goes, and the bound rises."""

    def __init__(self, threshold: float, limit: int):
        self.bound, self._limit, self._cut = threshold, limit, False
        self._rows, self._cosines = np.empty((0, 2), np.int64), np.empty(0)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, rows: Int64[np.ndarray, "n 2"], cosines: Float64[np.ndarray, " n"]) -> None:
        keep = cosines >= self.bound
        self._waiting.append((rows[keep], cosines[keep]))
        if sum(len(cosines) for _, cosines in self._waiting) > self._limit:
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
        self._rows, self._cosines, self._waiting = rows[order], cosines[order], []
        if self._cut:
            self.bound = float(self._cosines[-1])


def groups(pairs: Int64[np.ndarray, "n 2"]) -> list[list[int]]:
    """Rows that pairs connect, directly or through others, as sorted lists."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = row = parent[parent[row]]
        return row

    for i, j in pairs.tolist():
        parent[root(i)] = root(j)
    members: dict[int, list[int]] = {}
    for row in sorted(parent):
        members.setdefault(root(row), []).append(row)
    return sorted(members.values())


# ------------------------------------------------------------------------------------- cosines


def unit(vectors: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Unit vectors; 0 where there is no direction."""
    x = vectors.astype(np.float32, copy=False)
    lengths = products.norms(x)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = x / lengths[:, None]
        rare = np.flatnonzero(np.isnan(lengths))
        exact = vectors[rare].astype(np.float64)
        found[rare] = np.nan_to_num(exact / np.sqrt(_dots(exact, exact))[:, None])
    return found


def _margin(vectors: Float[np.ndarray, "n d"]) -> float:
    """By how much the float32 cosine of two vectors can be wrong.

    A sum of d products is wrong by at most d * 2**-24 of the lengths, each norm by half of that,
    and stored unit vectors were rounded to their dtype after a norm that was as wrong. It is 2e-4
    for 1152 numbers in float32, and 7e-4 in float16.
    """
    return 3 * (vectors.shape[1] + 8) * 2.0**-24 + float(np.finfo(vectors.dtype).eps) / 2


def _cosines(
    x: Float[np.ndarray, "n d"],
    i: Int64[np.ndarray, " c"],
    y: Float[np.ndarray, "m d"],
    j: Int64[np.ndarray, " c"],
) -> Float64[np.ndarray, " c"]:
    """Cosines of x[i] with y[j] in float64, -inf where one is zero or not finite."""
    result = np.empty(len(i))
    for start in range(0, len(i), _EXACT_PAIRS):
        part = slice(start, start + _EXACT_PAIRS)
        a, b = x[i[part]].astype(np.float64), y[j[part]].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            # The root of the product, not the product of roots: equal vectors have exactly 1.
            cosine = _dots(a, b) / np.sqrt(_dots(a, a) * _dots(b, b))
        result[part] = np.where(np.isfinite(cosine), np.clip(cosine, -1, 1), -np.inf)
    return result


def _dots(a: Float64[np.ndarray, "c d"], b: Float64[np.ndarray, "c d"]) -> np.ndarray:
    """Each pair by itself; a matrix product's last digits depend on the other rows."""
    return np.einsum("cd,cd->c", a, b)
