"""How many images the devices that are here can embed at once."""

from typing import Any

import jax
import jax.numpy as jnp

from medsiglip_jax.model.api import Model
from medsiglip_jax.plan.program import memory_of
from medsiglip_jax.plan.verdict import HEADROOM


def batch_size(model: Model, most: int = 128, otherwise: int = 64) -> int:
    """The largest batch of `most`, half of it and so on for each device that fits its memory.

    The image encoder is compiled for it, as `plan --embed` does; with JAX's compilation cache the
    run does not compile it again. More than 128 images at once are hardly faster.

    Args:
        model: the weights on their devices.
        most: images of a device.
        otherwise: images of a device whose memory is not known, or for a model without an image
            tower.

    Returns:
        The images of all devices.
    """
    count = model.mesh.size if model.mesh else 1
    limit = _memory(model)
    vision = model.config.vision
    if vision is None or limit is None:
        return otherwise * count
    while most > 1:
        shape = (most * count, vision.image_size, vision.image_size, 3)
        images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=model.compute.rows)
        program = model._image.lower(model.params, images).compile()
        if memory_of(program)["peak"] <= limit * (1 - HEADROOM):
            break
        most //= 2
    return most * count


def _memory(model: Model) -> int | None:
    """Bytes of a device that JAX may use, if it says so."""
    device: Any = next(iter(jax.tree.leaves(model.params)[0].devices()))
    return (device.memory_stats() or {}).get("bytes_limit")
