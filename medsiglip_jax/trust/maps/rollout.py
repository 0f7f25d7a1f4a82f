"""Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): where the model looks.

It follows the weights of attention through all blocks and the pooling head. No text takes part in
it, so it is no explanation of one.
"""

import numpy as np
from jaxtyping import Float

from medsiglip_jax.trust.maps.tower import Pixels, Tower

LABEL = "where the model looks, whatever the text"


def roll_out(tower: Tower, image: Pixels) -> Float[np.ndarray, "s s"]:
    """The share of each pixel in what the pooling head reads; the sum is 1.

    Half of the mixture in each block is the residual connection; the pooling head has none.
    """
    weights, pooling = (np.asarray(x, np.float64) for x in tower.attention(image))
    shares = pooling
    for block in weights[::-1]:
        shares = 0.5 * shares + 0.5 * shares @ block
    return _on_pixels(shares, tower)


def _on_pixels(shares: np.ndarray, tower: Tower) -> np.ndarray:
    """Shares of tokens, spread evenly over their patches; pixels beyond the last have none."""
    vision = tower.config.vision
    assert vision is not None
    grid = shares.reshape(vision.grid, vision.grid) / vision.patch_size**2
    patches = np.kron(grid, np.ones((vision.patch_size, vision.patch_size)))
    return np.pad(patches, (0, vision.image_size - len(patches)))
