"""Random weights of an architecture, drawn on the host.

By numpy rather than the modules' own initialisers: there is nothing to compile (jax.random took 9
CPU-seconds for the smallest model), and a seed gives the same bits on every device and jax version.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from medsiglip_jax.model import towers, tree
from medsiglip_jax.model.config import ModelConfig

Shape = tuple[int, ...]
Initializer = Callable[[np.random.Generator, Shape], np.ndarray]


def init_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Draws float32 numpy arrays from the distributions that big_vision and flax initialise with.

    Every parameter has its own random stream: a tower is the same with or without the other.
    """

    def draw(path: str, leaf: Any) -> np.ndarray:
        initializer = next(value for regex, value in _RULES if re.fullmatch(regex, path))
        rng = np.random.default_rng([seed, *path.encode()])
        return initializer(rng, leaf.shape).astype(np.float32)

    return tree.map_with_path(draw, towers.param_shapes(config))


def _constant(value: float) -> Initializer:
    return lambda rng, shape: np.full(shape, value)


def _normal(std: float) -> Initializer:
    return lambda rng, shape: std * rng.standard_normal(shape, np.float32)


def _normal_by_width(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Standard deviation 1 / sqrt(width) (big_vision models/vit.py posemb; flax nn.Embed)."""
    return shape[-1] ** -0.5 * rng.standard_normal(shape, np.float32)


def _xavier(inputs: int, stacked: bool = True) -> Initializer:
    """Xavier-uniform; the first `inputs` axes (after the layer axis) are inputs."""

    def draw(rng: np.random.Generator, shape: Shape) -> np.ndarray:
        axes = shape[1:] if stacked else shape
        limit = math.sqrt(6 / (math.prod(axes[:inputs]) + math.prod(axes[inputs:])))
        return limit * (2 * rng.random(shape, np.float32) - 1)

    return draw


def _lecun(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Normal of standard deviation 1 / sqrt(inputs), truncated at two of them (flax nn.Dense)."""
    draw = rng.standard_normal(shape, np.float32)
    while (outside := np.abs(draw) > 2).any():
        draw[outside] = rng.standard_normal(int(outside.sum()), np.float32)
    # 0.8796 is the standard deviation of a unit normal truncated at 2.
    return draw * (math.prod(shape[:-1]) ** -0.5 / 0.87962566103423978)


_STACK = ".*/encoderblock/.*"
_RULES: list[tuple[str, Initializer]] = [
    ("t", _constant(math.log(10))),
    ("b", _constant(-10.0)),
    ("classifier/.*", _constant(0.0)),
    (".*/scale", _constant(1.0)),
    (".*/MlpBlock_0/.*/bias", _normal(1e-6)),
    (".*/bias", _constant(0.0)),
    (".*/(pos_embedding|Embed_0/embedding)", _normal_by_width),
    (f"{_STACK}/out/kernel", _xavier(2)),
    (f"{_STACK}/kernel", _xavier(1)),
    (".*/MAPHead_0/(.*/out/kernel|probe)", _xavier(2, stacked=False)),
    (".*/MAPHead_0/.*/kernel", _xavier(1, stacked=False)),
    ("img/embedding/kernel|txt/head/kernel", _lecun),
]
