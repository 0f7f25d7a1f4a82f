"""Resamples position embeddings for another image resolution."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from medsiglip_jax.model.config import ModelConfig


def resize_positions(
    params: dict[str, Any], config: ModelConfig, resolution: int
) -> tuple[dict[str, Any], ModelConfig]:
    """Changes a model's resolution: its parameters and architecture for `resolution` px squares.

    The grid is resampled as big_vision does (models/vit.py:306-321: `scipy.ndimage.zoom` of order
    1, which is bilinear with aligned corners and no antialias), in float32.
    """
    import jax.numpy as jnp

    if config.vision is None:
        raise ValueError("this model has no image tower whose resolution could be changed")
    vision = dataclasses.replace(config.vision, image_size=resolution)
    if vision.grid != config.vision.grid:
        old = params["img"]["pos_embedding"]
        new = jnp.asarray(resample(np.asarray(old, np.float32), vision.grid), old.dtype)
        params = {**params, "img": {**params["img"], "pos_embedding": new}}
    return params, dataclasses.replace(config, vision=vision)


def resample(grid: Float[np.ndarray, "1 n d"], side: int) -> Float[np.ndarray, "1 m d"]:
    """[1, n, d] of a square grid -> [1, side * side, d]."""
    old = round(grid.shape[1] ** 0.5)
    at = np.linspace(0.0, old - 1, side)  # the first and last samples are the grid's corners
    weights = np.stack([np.interp(at, np.arange(old), unit) for unit in np.eye(old)], axis=1)
    square = grid.reshape(old, old, -1).astype(np.float64)
    out = np.einsum("ai,bj,ijd->abd", weights, weights, square, optimize=True)
    return out.reshape(1, side * side, -1).astype(np.float32)
