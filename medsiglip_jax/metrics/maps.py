"""Whether a map of an image points at a region of it, and how much of the region it marks.

As Saporta et al., Nature Machine Intelligence 4 (2022), 867, measure maps by the segmentations of
CheXlocalize; lines are those of github.com/rajpurkarlab/cheXlocalize.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

_LEVELS = 256
_TIE = 1e-5  # of the range of a map: float32 arithmetic does not keep equal values equal


def peak(values: Float[np.ndarray, "h w"]) -> tuple[int, int]:
    """Row and column of the maximum of a map.

    A map of patches or squares has its maximum on all pixels of one of them. Of pixels that tie,
    the one nearest to their centre is taken: the first, as `argmax` takes it, is always in the
    upper left corner.
    """
    low, high = float(values.min()), float(values.max())
    tied = np.argwhere(values >= high - _TIE * (high - low))
    nearest = np.abs(tied - tied.mean(axis=0)).sum(axis=1).argmin()
    row, column = tied[nearest].tolist()
    return row, column


def segment(values: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The pixels that a map marks, by Otsu's threshold; none where it has one value only.

    The map is scaled to 0 ... 255 from its minimum to its maximum, rounded down, and cut by Otsu's
    threshold (heatmap_to_segmentation.py, `cam_to_segmentation`). What is above is drawn as filled
    contours there, contours of one point left out: lone pixels are dropped, and holes filled.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.zeros(values.shape, bool)
    levels = ((_LEVELS - 1) * ((values - low) / (high - low))).astype(np.uint8)
    marked = levels > otsu(levels)
    neighbours = ndimage.convolve(
        marked.astype(np.uint8), np.ones((3, 3), np.uint8), mode="constant"
    )
    return np.asarray(ndimage.binary_fill_holes(marked & (neighbours > 1)), bool)


def otsu(levels: UInt8[np.ndarray, "h w"]) -> int:
    """The level above which the second of two classes lies, chosen so that their variance between
    each other is the largest.

    Source: Otsu, IEEE Trans. Syst. Man Cybern. 9 (1979), 62. Of levels that do as well the lowest
    is taken, as OpenCV does.
    """
    counts = np.bincount(levels.ravel(), minlength=_LEVELS).astype(np.float64)  # exact
    below, sums = np.cumsum(counts), np.cumsum(counts * np.arange(_LEVELS))
    both = below * (levels.size - below)
    apart = (sums * levels.size - sums[-1] * below) ** 2
    return int(np.divide(apart, both, out=np.zeros(_LEVELS), where=both > 0).argmax())


def iou(first: Bool[np.ndarray, "h w"], second: Bool[np.ndarray, "h w"]) -> float:
    """Intersection over union of two sets of pixels; NaN if one is empty (eval.py,
    `calculate_iou` with `true_pos_only`)."""
    if not (first.any() and second.any()):
        return float("nan")
    return int((first & second).sum()) / int((first | second).sum())
