"""The nearest vectors of queries by cosine, exactly as in float64; see `cosines`."""

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64

from medsiglip_jax.embeddings import cosines, store

# Rows of a first block whose best rule out most of the others.
_FIRST_ROWS = 8192
_NO_ROW = np.iinfo(np.int64).max


# Cosines, the highest first, and row numbers.
Hits = tuple[Float64[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]


def top_k(queries: Float[np.ndarray, "q d"], vectors: store.Vectors, k: int) -> Hits:
    """Finds the k vectors of the highest cosine with each query.

    Args:
        queries: of any length but 0.
        vectors: what to search, in one pass over its blocks.
        k: how many; if there are fewer rows, all are returned.

    Returns:
        Cosines, the highest first, and row numbers; of equal cosines the lower row comes first.
        Vectors that are zero or not finite come last, with -inf.

    Raises:
        ValueError: `k` below 1, or queries of another size, zero, or not finite.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    check_queries(queries, vectors.dim)
    best = _Best(queries, k)
    screen = cosines.screen(cosines.unit(queries), vectors.normalized)
    for block in vectors.blocks():
        scores = _without_directions_last(screen(block.vectors), block.vectors)
        best.offer(block, scores, cosines.margin(block.vectors))
    count = int((best.rows[:1] != _NO_ROW).sum())
    return best.cosines[:, :count], best.rows[:, :count]


def check_queries(queries: np.ndarray, dim: int) -> None:
    """Raises a ValueError for queries of another size, zero or not finite."""
    if queries.shape[1] != dim:
        raise ValueError(f"queries has shape {queries.shape}; expected [q, {dim}], as embedded")
    length = np.linalg.norm(queries.astype(np.float64), axis=1)
    if bad := np.flatnonzero(~((length > 0) & (length < np.inf))).tolist():
        raise ValueError(f"queries {bad}: zero or not finite; expected vectors with a direction")


def _without_directions_last(
    scores: Float32[np.ndarray, "n q"], vectors: Float[np.ndarray, "n d"]
) -> Float32[np.ndarray, "n q"]:
    """Gives -inf, as `cosines.exact` does, to vectors that are zero or not finite.

    A screen of unit vectors gives them 0, infinity or NaN, with every query. So only the vectors
    that one query has given such a score are looked at.
    """
    one = scores[:, :1]
    odd = np.flatnonzero(~np.isfinite(one) | (one == 0))
    none = odd[store.undirected(vectors[odd])]
    if len(none):
        scores = scores.copy()  # those of JAX are read-only
        scores[none] = -np.inf
    return scores


class _Best:
    """The best rows of each query so far, the best first."""

    def __init__(self, queries: Float[np.ndarray, "q d"], k: int):
        self._queries = queries.astype(np.float64)
        self.cosines = np.full((len(queries), k), -np.inf)
        self.rows = np.full((len(queries), k), _NO_ROW)

    def offer(self, block: store.Block, scores: Float32[np.ndarray, "n q"], margin: float) -> None:
        """Adds the rows of a block that may be among the best, given its cosines up to `margin`."""
        k, bounds = self.rows.shape[1], self.cosines[:, -1] - margin
        if np.isneginf(bounds).any():
            bounds = np.fmax(bounds, _kth_best(scores[:_FIRST_ROWS], k) - 2 * margin)
        # Keeps NaN, which may be a number in float64.
        rows, queries = _nonzero(~(scores < bounds.astype(np.float32)))
        if len(rows):
            keep = _contenders(scores[rows, queries], queries, k, margin)
            self._insert(block, rows[keep], queries[keep])

    def _insert(self, block: store.Block, rows: cosines.Numbers, queries: cosines.Numbers) -> None:
        exact = cosines.exact(block.vectors, rows, self._queries, queries)
        count, k = self.rows.shape
        merged = np.concatenate([self.cosines.reshape(-1), exact])
        rows = np.concatenate([self.rows.reshape(-1), block.rows[rows]])
        queries = np.concatenate([np.repeat(np.arange(count), k), queries])
        order = np.lexsort((rows, -merged, queries))
        starts = np.searchsorted(queries[order], np.arange(count))
        best = order[starts[:, None] + np.arange(k)]
        self.cosines, self.rows = merged[best], rows[best]


def _kth_best(scores: Float32[np.ndarray, "n q"], k: int) -> Float32[np.ndarray, " q"]:
    """Of each query; -inf or NaN where there are fewer numbers."""
    if len(scores) < k:
        return np.full(scores.shape[1], -np.inf, np.float32)
    return -np.partition(np.negative(scores.T, order="C"), k - 1)[:, k - 1]  # NaN comes last


def _contenders(
    scores: Float32[np.ndarray, " c"], queries: cosines.Numbers, k: int, margin: float
) -> Bool[np.ndarray, " c"]:
    """Which candidates may be among the k best of their query, given their cosines up to `margin`:
    the others have k above them whatever the errors are."""
    order = np.lexsort((-scores, queries))  # NaN comes last
    starts = np.searchsorted(queries[order], queries)
    ends = np.searchsorted(queries[order], queries, side="right")
    kth = scores[order[np.minimum(starts + k, ends) - 1]]
    return ~((ends - starts > k) & (scores < kth - 2 * margin))


def _nonzero(mask: Bool[np.ndarray, "n q"]) -> tuple[np.ndarray, np.ndarray]:
    """As np.nonzero, in 0.1 ms instead of 3 ms for 8,192 x 64."""
    rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return rows, columns
