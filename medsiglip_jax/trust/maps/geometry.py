"""Maps of the square that the model takes -> maps of the original pixels, and of larger cells."""

import numpy as np
from jaxtyping import Float, Float32

from medsiglip_jax.preprocess.image import PRESETS, before, big_vision_pad, serving

_CELLS = 5  # cells to a side at least, see `cell_side`
# Presets that put the image into the centre of a black square; the others squash it.
PADDED = {function.__name__ for function in (big_vision_pad, serving)}


def to_original(
    values: Float[np.ndarray, "s s"], shape: tuple[int, int], preprocess: str
) -> Float32[np.ndarray, "h w"]:
    """A map on the original pixels, by area: the squash or the padding of a preset is undone.

    The value of a pixel of the square is spread evenly over the part of the original that it
    shows, so that sums stay what they are. What lies on padding is left out.

    Args:
        values: the map on the pixels that the model takes.
        shape: height and width of the original.
        preprocess: a preset, by name.

    Raises:
        ValueError: there is no such preset.
    """
    if preprocess not in PRESETS:
        raise ValueError(f"unknown preprocess {preprocess!r}; expected {', '.join(PRESETS)}")
    sides = (max(shape),) * 2 if preprocess in PADDED else shape
    rows, columns = (
        overlaps(len(values), side)[before(length, side) :][:length]
        for length, side in zip(shape, sides, strict=True)
    )
    return (rows @ values.astype(np.float32) @ columns.T).astype(np.float32)


def overlaps(cells: int, pixels: int) -> Float32[np.ndarray, "pixels cells"]:
    """Of `cells` equal parts of a line, the share of each that lies in each of `pixels` parts."""
    cell, pixel = np.linspace(0, 1, cells + 1), np.linspace(0, 1, pixels + 1)
    low = np.maximum(pixel[:-1, None], cell[:-1])
    high = np.minimum(pixel[1:, None], cell[1:])
    return (np.clip(high - low, 0, None) * cells).astype(np.float32)


def on_padding(values: Float[np.ndarray, "s s"], shape: tuple[int, int], preprocess: str) -> float:
    """The sum of what `to_original` leaves out."""
    if preprocess not in PADDED or shape[0] == shape[1]:
        return 0.0
    return float(values.sum() - to_original(values, shape, preprocess).sum(dtype=np.float64))


def cell_side(image_size: int, patch_size: int) -> int:
    """Side of the squares in which maps are measured, in pixels: that of the patches, or a whole
    fraction of it if there are fewer than 5 patches to a side, since maps of 4 patches hardly
    differ."""
    sides = [side for side in range(1, patch_size + 1) if patch_size % side == 0]
    return max((side for side in sides if image_size // side >= _CELLS), default=1)


def by_cells(values: Float[np.ndarray, "s s"], side: int) -> Float[np.ndarray, "g g"]:
    """The sum over squares of this side; pixels beyond the last whole one are left out."""
    grid = len(values) // side
    whole = values[: grid * side, : grid * side]
    return whole.reshape(grid, side, grid, side).sum(axis=(1, 3))
