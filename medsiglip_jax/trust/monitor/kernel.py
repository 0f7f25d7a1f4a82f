"""Maximum mean discrepancy: how far two samples of vectors lie apart, in small memory."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

# Rows of the kernel that are in memory at a time: 10 MB against 5,000 others.
_BLOCK = 512
_SAMPLED = 1000  # vectors whose pairs the bandwidth is the median of


def squared_distances(
    x: Float32[np.ndarray, "n d"], y: Float32[np.ndarray, "m d"]
) -> Float32[np.ndarray, "n m"]:
    """Squared Euclidean distances of all pairs.

    From one matrix product in float32, with an error of about 1e-6 of the squared lengths: vectors
    should be centred.
    """
    products = x @ y.T
    products *= -2
    products += np.einsum("nd,nd->n", x, x)[:, None]
    products += np.einsum("md,md->m", y, y)
    return np.maximum(products, 0, out=products)


def median_bandwidth(x: Float32[np.ndarray, "n d"], seed: int = 0) -> float:
    """The median squared distance between vectors, of pairs of at most 1,000 of them.

    Source: Gretton et al., JMLR 13 (2012), 723, section 8.

    Raises:
        ValueError: there are fewer than two different vectors.
    """
    drawn = np.random.default_rng(seed).permutation(len(x))[:_SAMPLED]
    distances = squared_distances(x[drawn], x[drawn])[np.triu_indices(len(drawn), 1)]
    median = float(np.median(distances)) if len(distances) else 0.0
    if not median > 0:
        raise ValueError("the reference has fewer than two different vectors; give it more images")
    return median


def mmd(x: Float32[np.ndarray, "n d"], y: Float32[np.ndarray, "m d"], bandwidth: float) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of two samples.

    With the kernel exp(-|a - b|^2 / bandwidth). Negative values are as usual as positive ones where
    both samples come from the same distribution.

    Source: Gretton et al., JMLR 13 (2012), 723, equation 3.

    Args:
        x, y: at least two vectors each.
        bandwidth: see `median_bandwidth`.
    """
    return mmd_of_sums(
        len(x), len(y), kernel_sum(x, x, bandwidth), kernel_sum(y, y, bandwidth),
        kernel_sum(x, y, bandwidth),
    )  # fmt: skip


def mmd_of_sums(n, m, within_x, within_y, between):
    """`mmd` of numbers of vectors and the sums of their kernels, those of each vector with itself
    included; arrays of equal shape give one for each entry."""
    pairs_x, pairs_y = n * (n - 1), m * (m - 1)
    return (within_x - n) / pairs_x + (within_y - m) / pairs_y - 2 * between / (n * m)


def mmd_of_windows(
    x: Float32[np.ndarray, "n d"], windows: Bool[np.ndarray, "b n"], bandwidth: float
) -> tuple[Float64[np.ndarray, " b"], float]:
    """`mmd` of each window with the rest of the vectors, and the sum of the kernel of all.

    The kernel of all pairs is computed once for all windows, a block of rows at a time.
    """
    inside = windows.T.astype(np.float32)
    own, all_of = np.zeros(len(windows)), np.empty(len(x))
    for rows, kernel in _blocks(x, x, bandwidth):
        all_of[rows] = kernel.sum(axis=1, dtype=np.float64)
        own += np.einsum("nb,nb->b", kernel @ inside, inside[rows], dtype=np.float64)
    total, n = float(all_of.sum()), windows.sum(axis=1)
    touching = np.array([all_of[window].sum() for window in windows])
    rest = total - 2 * touching + own
    return mmd_of_sums(n, len(x) - n, own, rest, touching - own), total


def kernel_sum(
    x: Float32[np.ndarray, "n d"], y: Float32[np.ndarray, "m d"], bandwidth: float
) -> float:
    """The sum of the kernel of all pairs."""
    return sum(float(k.sum(dtype=np.float64)) for _, k in _blocks(x, y, bandwidth))


def _blocks(x: np.ndarray, y: np.ndarray, bandwidth: float) -> Iterator[tuple[slice, np.ndarray]]:
    """The kernel of all pairs, some rows at a time."""
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        kernel = squared_distances(x[rows], y)
        kernel *= np.float32(-1 / bandwidth)
        yield rows, np.exp(kernel, out=kernel)


def neighbour_distances(
    x: Float32[np.ndarray, "n d"],
    reference: Float32[np.ndarray, "m d"],
    k: int = 5,
    groups: np.ndarray | None = None,
) -> Float64[np.ndarray, " n"]:
    """The distance of each vector to its k-th nearest neighbour in the reference.

    Args:
        x: vectors.
        reference: more than k vectors, of which no patient has all but k.
        k: which neighbour. The first may be a copy of the same image; the fifth is far from new
            images and near to known ones all the same.
        groups: patient of each vector, where `x` is the reference itself: those of the same patient
            are no neighbours, as new images are of other patients.
    """
    nearest = np.empty(len(x))
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        squares = squared_distances(x[rows], reference)
        if groups is not None:
            squares[groups[rows, None] == groups[None]] = np.inf
        nearest[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return np.sqrt(nearest)


def centred(x: Float[np.ndarray, "n d"], mean: np.ndarray) -> Float32[np.ndarray, "n d"]:
    """Vectors minus a mean, in float32."""
    return (x - mean).astype(np.float32)
