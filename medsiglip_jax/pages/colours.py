"""The colours of scores in pictures: equal steps look equal, also to the colour-blind."""

import numpy as np
from jaxtyping import Float

# Ten colours of matplotlib's viridis (CC0).
_VIRIDIS = "440154 482878 3e4a89 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
_COLOURS = np.array([list(bytes.fromhex(colour)) for colour in _VIRIDIS.split()])


def viridis(share: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    """Red, green and blue, 0 to 255, of shares from 0 to 1; NaN has the colour of 0."""
    share, stops = np.nan_to_num(share), np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(share, stops, channel) for channel in _COLOURS.T], -1)
