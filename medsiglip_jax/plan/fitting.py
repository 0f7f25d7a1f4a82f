"""How many images the devices that are here can embed at once."""

from typing import Any

import jax
import jax.numpy as jnp

from medsiglip_jax.model.api import Model
from medsiglip_jax.plan.program import memory_of, out_of_memory
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
    free = _free_memory(model)
    if model.config.vision is None or free is None:
        return otherwise * count
    while most > 1 and _needed(model, most, count) > free * (1 - HEADROOM):
        most //= 2
    return most * count


def _needed(model: Model, rows: int, count: int) -> float:
    """Bytes of a device beside the weights, for so many rows on each of so many devices."""
    side = model.config.image_size
    images = jax.ShapeDtypeStruct(
        (rows * count, side, side, 3), jnp.uint8, sharding=model.compute.rows
    )
    try:
        program = model._image.lower(model.params, images).compile()
    except jax.errors.JaxRuntimeError as error:
        if out_of_memory(error):  # as compilers for TPUs say
            return float("inf")
        raise
    memory = memory_of(program)
    return memory["peak"] - memory["arguments"] + images.size / count


def _free_memory(model: Model) -> int | None:
    """Bytes of a device that JAX may use and that nothing is in yet, if it says so."""
    device: Any = next(iter(jax.tree.leaves(model.params)[0].devices()))
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0)
