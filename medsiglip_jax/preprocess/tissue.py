"""Where on a slide there is tissue, by the colour that stains give it."""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

# Glass and dust have less colour than 5 %, pale stroma has 10 to 15 %. Between them Otsu decides:
# alone it would cut an empty slide into two kinds of noise, and one full of tissue into two kinds
# of tissue.
_LEAST, _MOST = 13, 38
_SMALL = 64  # pixels of a speck that is no tissue, and of a hole that is


def mask(thumbnail: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """Which pixels are tissue: those with more colour than Otsu's threshold, without specks.

    Colour is the chroma max - min of red, green and blue: HSV's saturation without its division,
    which makes colour of the noise in black margins.
    """
    chroma = thumbnail.max(axis=2) - thumbnail.min(axis=2)
    found = chroma > np.clip(threshold_otsu(chroma), _LEAST, _MOST)
    found = remove_small_objects(found, max_size=_SMALL)
    return remove_small_holes(found, max_size=_SMALL)


def shares(
    mask: Bool[np.ndarray, "h w"],
    left: Float[np.ndarray, " columns"],
    top: Float[np.ndarray, " rows"],
    side: float,
) -> Float[np.ndarray, "rows columns"]:
    """The share of tissue in each square of a grid; what lies beyond the mask is none.

    Args:
        mask: of `mask`.
        left, top: of the squares, in pixels of the mask and fractions of them.
        side: of the squares, likewise.
    """
    across, down = (_covered(*ends, side) for ends in ((left, mask.shape[1]), (top, mask.shape[0])))
    return down @ mask.astype(np.float32) @ across.T / side**2


def _covered(start: np.ndarray, length: int, side: float) -> np.ndarray:
    """How much of each pixel of an axis each interval covers, float32 [intervals, length]."""
    pixel, start = np.arange(length), start[:, None]
    covered = np.minimum(start + side, pixel + 1) - np.maximum(start, pixel)
    return np.maximum(covered, 0).astype(np.float32)
