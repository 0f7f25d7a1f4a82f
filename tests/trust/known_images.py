"""Vectors of images that are in control, and of others."""

import numpy as np

DIM = 8
FACTS = {"model": {"source": "m", "sha256": "5a1"}, "normalized": True}


def vectors(n, seed, shift=0.0, scale=1.0):
    """Three classes on their own axes, and noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    x = 2 * np.eye(DIM)[labels] + scale * rng.normal(size=(n, DIM)) + shift
    return x.astype(np.float32), labels
