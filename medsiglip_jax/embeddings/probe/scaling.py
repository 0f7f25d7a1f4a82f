"""Vectors -> the features that a probe is fitted to."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

SCALES = ("standard", "unit", "raw")


@dataclass(frozen=True, eq=False)
class Scaling:
    """Turns vectors into features.

    Attributes:
        mean: subtracted first.
        deviation: the divisor of what remains.
        unit: whether vectors are divided by their lengths before that.
    """

    mean: Float64[np.ndarray, " d"]
    deviation: Float64[np.ndarray, " d"]
    unit: bool

    def __call__(self, vectors: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
        """Features of vectors.

        Raises:
            ValueError: vectors are not finite, or of length 0 where they are divided by it.
        """
        x = unit(vectors) if self.unit else finite(vectors)
        return (x - self.mean) / self.deviation


def fit_scaling(vectors: Float[np.ndarray, "n d"], scale: str) -> Scaling:
    """Fits a scaling to training vectors.

    Args:
        vectors: at least one.
        scale: "standard": each number gets mean 0 and variance 1 over these vectors (0 where it is
            constant); "unit": vectors of length 1; "raw": as they are.

    Raises:
        ValueError: an unknown scale, no vectors, or vectors that are not finite.
    """
    if scale not in SCALES or not len(vectors):
        raise ValueError(
            f"scale {scale!r} of {len(vectors)} vectors; expected {', '.join(SCALES)} of 1 or more"
        )
    x = unit(vectors) if scale == "unit" else finite(vectors)
    mean, deviation = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if scale == "standard":
        mean, deviation = x.mean(axis=0), x.std(axis=0)
    constant = deviation <= 1e-12 * np.abs(mean)  # but for rounding
    return Scaling(mean, np.where(constant, 1, deviation), scale == "unit")


def unit(vectors: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    """Vectors divided by their lengths; raises ValueError if one is 0 or not finite."""
    x = finite(vectors)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if bad := np.flatnonzero(length == 0).tolist():
        raise ValueError(f"vectors {bad[:8]} ({len(bad)} in all) are zero")
    return x / length


def finite(vectors: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    """Vectors in float64; raises ValueError if one is not finite."""
    if bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
        raise ValueError(f"vectors {bad[:8]} ({len(bad)} in all) are not finite")
    return vectors.astype(np.float64)
