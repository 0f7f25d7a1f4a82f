"""Where on a slide there is tissue, by the colour that stains give it."""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

# Glass and dust have less colour than 5 %, pale stroma has 10 to 15 %. Otsu's threshold is taken
# between these bounds: without them it would split an empty slide into two kinds of noise, and a
# slide full of tissue into two kinds of tissue.
_LEAST, _MOST = 13, 38
_SMALL = 64  # pixels: specks up to this size are removed, holes are filled


def mask(thumbnail: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """Which pixels are tissue: those with more colour than Otsu's threshold, specks removed.

    Colour is chroma, max - min of red, green and blue: HSV's saturation without its division, which
    would turn the noise of black margins into colour.
    """
    chroma = thumbnail.max(axis=2) - thumbnail.min(axis=2)
    coloured = chroma > np.clip(threshold_otsu(chroma), _LEAST, _MOST)
    return remove_small_holes(remove_small_objects(coloured, max_size=_SMALL), max_size=_SMALL)


def fractions(
    mask: Bool[np.ndarray, "h w"],
    left: Float[np.ndarray, " columns"],
    top: Float[np.ndarray, " rows"],
    side: float,
) -> Float[np.ndarray, "rows columns"]:
    """The tissue fraction of each square of a grid; beyond the mask there is none.

    Args:
        mask: from `mask`.
        left, top: edges of the squares, in pixels of the mask, which may be fractions.
        side: length of the squares, in the same unit.
    """
    across, down = (_covered(*ends, side) for ends in ((left, mask.shape[1]), (top, mask.shape[0])))
    return down @ mask.astype(np.float32) @ across.T / side**2


def _covered(start: np.ndarray, length: int, side: float) -> np.ndarray:
    """How much of each pixel of an axis each interval covers, float32 [intervals, length]."""
    pixel, start = np.arange(length), start[:, None]
    covered = np.minimum(start + side, pixel + 1) - np.maximum(start, pixel)
    return np.maximum(covered, 0).astype(np.float32)
