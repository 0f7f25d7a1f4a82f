"""Cosines of many vectors: screened in float32, decided in float64.

Every cosine is first computed in float32, with an error bounded by `margin`. Pairs within that
margin of being a result are recomputed in float64 from the stored vectors, one pair at a time. So
results are those of float64: they depend neither on how the vectors are cut into blocks or files,
nor on the number of queries, nor on the device.

On a CPU `screen` multiplies one query by NumPy's BLAS and several by XLA: see `_cpu_product`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from medsiglip_jax.embeddings import store

# Numbers of rows.
Numbers = Int64[np.ndarray, " c"]

# Pairs computed in float64 at a time: 1.2 MB a side at 1152 numbers a vector.
_EXACT_PAIRS = 128
# Rows of float16 converted at a time, into a buffer of 38 MB at 1152 numbers a row. float32 is
# multiplied in one piece: each product waits for all cores, and where other processes keep one of
# them busy, a million rows take 3 s in pieces of 2,048 and 0.4 s in pieces of 32,768.
_STRIP_ROWS = 8192
# Rows that XLA multiplies at a time: blocks from files have so many, and 8,192 take as long.
_XLA_ROWS = store.BLOCK_ROWS
# Rows of which BLAS multiplies the few numbers that XLA leaves out: 8,192 rows and 64 queries take
# 0.4 ms, and 4 to 6 ms in one piece, with all threads.
_BLAS_ROWS = 64
# Bytes: what does not begin at a multiple of these is copied before XLA multiplies it.
_XLA_ALIGNMENT = 64
# The squares of a shorter vector are not normal float32 numbers.
_SMALL = 1e-15


def screen(
    queries: Float32[np.ndarray, "q d"], normalized: bool
) -> Callable[[Float[np.ndarray, "n d"]], Float32[np.ndarray, "n q"]]:
    """Returns a function from vectors to their float32 cosines with the queries.

    Args:
        queries: unit vectors.
        normalized: whether the vectors will be unit vectors, too; otherwise they are divided by
            their norms.
    """
    return (_cpu_screen if _on_cpu() else jax_screen)(queries, normalized)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def norms(x: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, " n"]:
    """Lengths; NaN where the squares are too large or too small for float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("nd,nd->n", x, x))
    lengths[~((lengths > _SMALL) & (lengths < np.inf))] = np.nan
    return lengths


def _cpu_screen(queries, normalized):
    buffer = np.empty((0, queries.shape[1]), np.float32)
    product = _cpu_product(queries)

    def cosines(vectors, scores):
        product(vectors, scores)
        if not normalized:
            scores /= norms(vectors)[:, None]

    def call(vectors):
        nonlocal buffer
        scores = np.empty((len(vectors), len(queries)), np.float32)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if vectors.dtype == np.float32:
                cosines(vectors, scores)
                return scores
            if not len(buffer):
                buffer = np.empty((_STRIP_ROWS, queries.shape[1]), np.float32)
            for start in range(0, len(vectors), _STRIP_ROWS):
                rows = vectors[start : start + _STRIP_ROWS]
                buffer[: len(rows)] = rows
                cosines(buffer[: len(rows)], scores[start : start + _STRIP_ROWS])
        return scores

    return call


# Writes the products of vectors with the queries.
Product = Callable[[Float32[np.ndarray, "n d"], Float32[np.ndarray, "n q"]], object]


def _cpu_product(queries: Float32[np.ndarray, "q d"]) -> Product:
    """Returns the fastest product with these queries on a CPU.

    One query is a product of a matrix and a vector, which no library does faster than memory is
    read. In blocks of 2,048 rows and with 64 queries of 1152 numbers XLA computes 71 to 93 GFLOP in
    a second of a core, and NumPy's OpenBLAS 38 to 43; a search of 65,536 rows in files takes 0.60
    and 0.97 s of a core, most of it for reading them. With two queries the rows in memory take 0.04
    and 0.09 s (two cores of a Sapphire Rapids Xeon, jax 0.10.2, numpy 2.4.6, 2026-11-30).
    """
    if len(queries) > 1:
        return _XlaProduct(queries)
    return lambda vectors, scores: np.matmul(vectors, queries.T, out=scores)


class _XlaProduct:
    """XLA's product, in pieces of `_XLA_ROWS` rows, without a copy of the vectors; NumPy's for the
    rest, and for arrays that XLA cannot read as they are.

    NumPy's large arrays begin 16 bytes after a multiple of 64. XLA reads them from the next
    multiple on, as rows that lack their first numbers and end with the first ones of the next row.
    Those are multiplied by zero, and the product of the numbers that are missing is added.
    """

    def __init__(self, queries: Float32[np.ndarray, "q d"]):
        self._queries, self._columns = queries, functools.cache(self._shifted)

    def __call__(self, vectors, scores):
        flags, end = vectors.flags, len(vectors) - len(vectors) % _XLA_ROWS
        if not (flags.c_contiguous and flags.aligned and vectors.shape[1] * 4 >= _XLA_ALIGNMENT):
            end = 0
        for start in range(0, end, _XLA_ROWS):
            rows = slice(start, start + _XLA_ROWS)
            self._piece(vectors[rows], scores[rows])
        np.matmul(vectors[end:], self._queries.T, out=scores[end:])

    def _piece(self, vectors, scores):
        missing = -vectors.ctypes.data % _XLA_ALIGNMENT // vectors.itemsize
        queries, missing_queries = self._columns(missing)
        count, dim = len(vectors) - 1, vectors.shape[1]  # nothing follows the last row
        shifted = vectors.reshape(-1)[missing : missing + count * dim].reshape(count, dim)
        few = vectors.reshape(-1, _BLAS_ROWS, dim)[..., :missing]
        np.matmul(few, missing_queries, out=scores.reshape(-1, _BLAS_ROWS, scores.shape[1]))
        scores[:-1] += np.asarray(_matmul(shifted, queries))
        # Not by BLAS, whose threads would go on turning in a loop while XLA's are at work.
        scores[-1] = np.einsum("qd,d->q", self._queries, vectors[-1])

    def _shifted(self, missing: int) -> tuple[jax.Array, np.ndarray]:
        """The queries as columns: the numbers for the shifted rows, and the missing ones."""
        shifted = np.pad(self._queries[:, missing:], ((0, 0), (0, missing)))
        return jax.device_put(shifted.T.copy()), self._queries[:, :missing].T.copy()


@jax.jit
def _matmul(x, y):
    return jnp.matmul(x, y, precision="highest")


def jax_screen(queries, normalized):
    """`screen` on the default device: each block is sent there once, and its cosines come back."""
    on_device = jax.device_put(queries)

    @jax.jit
    def cosines(vectors, queries):
        x = vectors.astype(jnp.float32)
        scores = jnp.matmul(x, queries.T, precision="highest")
        if normalized:
            return scores
        length = jnp.linalg.norm(x, axis=1, keepdims=True)
        return scores / jnp.where((length > _SMALL) & (length < jnp.inf), length, jnp.nan)

    return lambda vectors: np.asarray(cosines(_padded(vectors), on_device))[: len(vectors)]


def _padded(vectors: np.ndarray) -> np.ndarray:
    """Pads with zeros to a power of two rows, so that few programs serve blocks of every size."""
    missing = (1 << max(len(vectors) - 1, 0).bit_length()) - len(vectors)
    return np.pad(vectors, ((0, missing), (0, 0))) if missing else vectors


def put(vectors: Float32[np.ndarray, "n d"]) -> Any:
    """Puts vectors where `above` wants them: on the accelerator, if there is one."""
    return vectors if _on_cpu() else jax.device_put(vectors)


def above(x: Float32[Any, "n d"], y: Float32[Any, "m d"], bound: float) -> tuple[Numbers, Numbers]:
    """Returns all i and j where x[i] @ y[j] >= bound; x and y come from `put`."""
    if isinstance(x, np.ndarray):
        i, j = np.nonzero(x @ y.T >= bound)
        return i, j
    some, bits = _above_bits(x, y, bound)
    if not some:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    i, j = np.nonzero(np.unpackbits(np.asarray(bits), axis=1, count=len(y)))
    return i, j


@jax.jit
def _above_bits(x, y, bound):
    mask = jnp.matmul(x, y.T, precision="highest") >= bound
    return mask.any(), jnp.packbits(mask, axis=1)


def unit(vectors: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Unit vectors; 0 for those that are zero or not finite."""
    x = vectors.astype(np.float32, copy=False)
    lengths = norms(x)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit_vectors = x / lengths[:, None]
        rare = np.flatnonzero(np.isnan(lengths))
        doubles = vectors[rare].astype(np.float64)
        unit_vectors[rare] = np.nan_to_num(doubles / np.sqrt(_dots(doubles, doubles))[:, None])
    return unit_vectors


def margin(vectors: Float[np.ndarray, "n d"]) -> float:
    """The largest error of a float32 cosine of two such vectors.

    A sum of d products is off by at most d * 2**-24 of the product of the lengths, each norm by
    half of that, and stored unit vectors were rounded to their dtype after dividing by a norm with
    the same error. This gives 2e-4 for 1152 numbers in float32, and 7e-4 in float16.
    """
    return 3 * (vectors.shape[1] + 8) * 2.0**-24 + float(np.finfo(vectors.dtype).eps) / 2


def exact(
    x: Float[np.ndarray, "n d"], i: Numbers, y: Float[np.ndarray, "m d"], j: Numbers
) -> Float64[np.ndarray, " c"]:
    """Cosines of x[i] with y[j] in float64, -inf where one is zero or not finite."""
    result = np.empty(len(i))
    for start in range(0, len(i), _EXACT_PAIRS):
        part = slice(start, start + _EXACT_PAIRS)
        a, b = (z.astype(np.float64, copy=False) for z in (x[i[part]], y[j[part]]))
        with np.errstate(invalid="ignore", divide="ignore"):
            # The root of the product, not the product of roots: equal vectors give exactly 1.
            cosine = _dots(a, b) / np.sqrt(_dots(a, a) * _dots(b, b))
        result[part] = np.where(np.isfinite(cosine), np.clip(cosine, -1, 1), -np.inf)
    return result


def _dots(a: Float64[np.ndarray, "c d"], b: Float64[np.ndarray, "c d"]) -> np.ndarray:
    """Each pair by itself: the last digits of a matrix product depend on its other rows."""
    return np.einsum("cd,cd->c", a, b)
