"""The image tower in float32, as the methods use it: many images, and gradients along a line."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from medsiglip_jax.model import sharding, towers
from medsiglip_jax.model.api import Model
from medsiglip_jax.model.config import ModelConfig, VisionConfig
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.trust.maps.targets import Form, Target

_STORED_BYTES = 2 << 30
Pixels = Float32[np.ndarray, "s s 3"]


@dataclass(frozen=True, eq=False)
class Tower:
    """An image tower that computes in float32, whatever type its weights are stored in.

    Attributes:
        params: the image tower's; the text tower's are not moved.
        config: the architecture, without the text tower.
        compute: float32 in full; the backward pass recomputes what would take too much memory.
        rows: images in each call; fewer are padded, so that one program serves all.
        mesh: as in `Model`.
    """

    params: Any
    config: ModelConfig
    compute: Compute
    rows: int
    mesh: jax.sharding.Mesh | None

    @classmethod
    def of(cls, model: Model, batch_size: int) -> "Tower":
        """The tower of a model; `batch_size` images at a time, or fewer on a CPU."""
        vision = model.config.vision
        if vision is None:
            raise ValueError("this model has no image tower")
        rows = model.piece_size(batch_size, batch_size, vision)
        compute = replace(
            model.compute, dtype="float32", precision="highest", remat=_remat(vision, rows)
        )
        return cls({"img": model.params["img"]}, ModelConfig(vision), compute, rows, model.mesh)

    @property
    def size(self) -> int:
        """Height and width of the images."""
        assert self.config.vision is not None
        return self.config.vision.image_size

    @property
    def grey(self) -> Pixels:
        """Mid-grey, which is 0 where pixels lie in [-1, 1]."""
        assert self.config.vision is not None
        pixels = self.config.vision.pixels
        value = (0.5 - np.array(pixels.mean)) / np.array(pixels.std)
        return np.broadcast_to(value.astype(np.float32), (self.size, self.size, 3))

    def pixels(self, square: UInt8[np.ndarray, "s s 3"]) -> Pixels:
        """The numbers that the tower takes for levels 0 to 255."""
        assert self.config.vision is not None
        return np.asarray(towers.normalize_pixels(jnp.asarray(square), self.config.vision.pixels))

    def embed(self, images: Iterable[Pixels]) -> Float32[np.ndarray, "n d"]:
        """Embeddings of images, not normalised."""
        images, parts = iter(images), []
        while batch := list(itertools.islice(images, self.rows)):
            z = _embed(self.params, self._put(batch), self.config, self.compute)
            parts.append(np.asarray(z)[: len(batch)])
        return np.concatenate(parts)

    def gradient(
        self,
        target: Target,
        start: Pixels,
        end: Pixels,
        points: Float[np.ndarray, " n"],
        weights: Float[np.ndarray, " n"],
    ) -> Float[np.ndarray, "s s 3"]:
        """The weighted sum of the gradients of a logit at points between two images, in float64.

        Args:
            target: the logit.
            start, end: the images.
            points: 0 is `start`, 1 is `end`.
            weights: those of the gradients.
        """
        total, pair = np.zeros(start.shape), jax.device_put((start, end))
        for first in range(0, len(points), self.rows):
            part = slice(first, first + self.rows)
            batch = (self._put(list(x[part].astype(np.float32))) for x in (points, weights))
            gradient = _gradient(
                self.params, target.numbers, *pair, *batch, target.form, self.config, self.compute
            )
            total += np.asarray(gradient)
        return total

    def attention(self, image: Pixels) -> tuple[Array, Array]:
        """`towers.attention_weights` of one image."""
        weights, pooling = _attention(
            self.params, image[None], self.config, replace(self.compute, rows=None, attention="xla")
        )
        return weights[:, 0], pooling[0]

    def _put(self, batch: list[Any]) -> Array:
        """A batch on the device, padded with zeros."""
        padding = [np.zeros_like(batch[0])] * (self.rows - len(batch))
        array = np.stack([*batch, *padding])
        return jax.device_put(array, sharding.batch_sharding(self.mesh) if self.mesh else None)


def _remat(vision: VisionConfig, rows: int) -> str:
    """Recompute only what is no product with weights, unless storing these takes over 2 GiB: one
    image of 448 px in the full tower takes 1.2 GiB. Recomputing all is a third slower."""
    products = 6 * vision.width + vision.mlp_dim  # numbers of a token in a block
    stored = 4 * rows * vision.num_tokens * vision.depth * products
    return "dots" if stored <= _STORED_BYTES else "block"


@partial(jax.jit, static_argnames=("config", "compute"))
def _embed(params: Any, images: Array, config: ModelConfig, compute: Compute) -> Array:
    return towers.encode_image(params, images, config, compute)[0]


@partial(jax.jit, static_argnames=("form", "config", "compute"))
def _gradient(
    params: Any, numbers: Any, start: Array, end: Array, points: Array, weights: Array,
    form: Form, config: ModelConfig, compute: Compute,
) -> Array:  # fmt: skip
    def total(shift: Array) -> Array:
        path = start + points[:, None, None, None] * (end - start) + shift
        return weights @ form(numbers, towers.encode_image(params, path, config, compute)[0])

    return jax.grad(total)(jnp.zeros_like(end))


@partial(jax.jit, static_argnames=("config", "compute"))
def _attention(
    params: Any, images: Array, config: ModelConfig, compute: Compute
) -> tuple[Array, Array]:
    return towers.attention_weights(params, images, config, compute)
