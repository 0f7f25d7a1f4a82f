"""bfloat16 parameters as their bits, for loops over blocks on CPUs.

XLA has no slice of bfloat16 on CPUs: before the loop it turns the whole stack of blocks into
float32, in every call and with memory for it, and then each block back. Of integers it slices what
it needs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from medsiglip_jax.model import tree

Params = dict[str, Any]
_BLOCKS = {"encoderblock", "frozen_blocks"}


def of_blocks(params: Params) -> Params:
    """The parameters on one CPU, with uint16 in place of the bfloat16 of stacked blocks.

    Both share their memory, so the result must not outlive a call: a train step may take the memory
    of what it is given for what it returns.
    """

    def shared(path: str, x: Any) -> Any:
        in_blocks = _BLOCKS & set(path.split("/"))
        if not in_blocks or not isinstance(x, jax.Array) or x.dtype != jnp.bfloat16:
            return x
        bits = jax.device_put(np.asarray(x).view(np.uint16), x.sharding)
        same = bits.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
        return bits if same else x  # which is slower, but takes no memory here

    return tree.map_with_path(shared, params)


def are_in(params: Params) -> bool:
    """Whether bits are among the parameters of blocks."""
    return any(x.dtype == jnp.uint16 for x in jax.tree.leaves(params))


def back(params: Params) -> Params:
    """The inverse of `of_blocks`, in the loop, of the parameters of one block."""

    def of(x: Array) -> Array:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

    return jax.tree.map(of, params)
