"""Pixels for the image tower: four named presets, uint8 [H, W, 3] -> uint8 [size, size, 3].

The official sources disagree, so the name of the preset is recorded beside every embedding:

* `big_vision`: squash to a square, TF2 bilinear without antialias, truncated to uint8. The model
  card's recipe for its evaluations (big_vision pp/ops_image.py:57-87 at 0127fb6); the default.
* `big_vision_pad`: zero-pad to a square as `serving` does, then as `big_vision`. No source names
  it; the published figures leave open whether images were padded, so evaluations compare all four.
* `huggingface`: squash, PIL bicubic: transformers' `SiglipImageProcessorPil`, bit for bit where
  there is no transparency, which transformers 5 puts on white and `pil` drops.
* `serving`: zero-pad to a square, PIL bicubic: the official container (python/serving/predictor.py
  at 56b1447), which says that training did the same.

Numpy and PIL only: neither jax nor tensorflow is imported. The range [-1, 1] comes later, on the
accelerator; `value_range` is the same arithmetic in numpy.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image

from medsiglip_jax.preprocess import facts
from medsiglip_jax.preprocess.facts import UnreadableImage

# Output rows computed at a time, so that float32 intermediates stay in cache: 6000x5000 -> 448x448
# takes 7 ms with 16 rows and 17 ms in one piece (one core).
_CHUNK_ROWS = 16
_BAND = 1 << 22  # pixels that are padded, or compared, at a time
_NARROW = 3  # how many times as long as wide strips are whose padding is not resized by PIL
_FIXED = 22  # bits behind the point of PIL's weights


def resize_bilinear(
    image: Shaped[np.ndarray, "..."], size: tuple[int, int]
) -> UInt8[np.ndarray, "h w c"]:
    """Resizes like `tf.cast(tf.image.resize(image, size, "bilinear", antialias=False), tf.uint8)`.

    Bit-equal to TF 2.21's CPU kernel (tensorflow/core/kernels/image/resize_bilinear_op.cc) without
    TensorFlow: half-pixel centres, everything in float32, and in the kernel's order. big_vision
    truncates rather than rounds (pp/ops_image.py:57-87); so does this.

    Args:
        image: uint8 [H, W, C], H, W, C >= 1.
        size: (h, w) of the result, each >= 1.

    Returns:
        uint8 [h, w, C].

    Raises:
        ValueError: wrong dtype, rank or size.
    """
    height, width = _check_resize(image, size)
    if (height, width) == image.shape[:2]:
        return image.copy()
    return _bilinear(lambda rows: image[rows], image.shape, height, width)


def _bilinear(
    rows_of: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], height: int, width: int
) -> np.ndarray:
    """Resizes an image [H, W, C] of that shape; `rows_of` returns the rows with given numbers."""
    channels = shape[2]
    top_row, bottom_row, dy = taps(shape[0], height)
    left, right, dx = taps(shape[1], width)
    channel = np.arange(channels)
    left = (left[:, None] * channels + channel).ravel()
    right = (right[:, None] * channels + channel).ravel()
    dx = np.repeat(dx, channels)

    out = np.empty((height, width * channels), np.uint8)
    for start in range(0, height, _CHUNK_ROWS):
        chunk = slice(start, min(start + _CHUNK_ROWS, height))
        rows, used = np.unique(
            np.concatenate([top_row[chunk], bottom_row[chunk]]), return_inverse=True
        )
        source = rows_of(rows).reshape(len(rows), -1)
        lines = _lerp(source.take(left, axis=1), source.take(right, axis=1), dx)
        top, bottom = lines[used].reshape(2, -1, width * channels)
        out[chunk] = _lerp(top, bottom, dy[chunk, None])  # assignment truncates, as tf.cast does
    return out.reshape(height, width, channels)


def taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper source index and float32 weight per output position (HalfPixelScaler).

    Args:
        n_in: pixels of the source along one axis.
        n_out: pixels of the result.
    """
    scale = np.float32(n_in) / np.float32(n_out)
    position = (np.arange(n_out, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(position)
    lower = np.maximum(floor.astype(np.int64), 0)
    upper = np.minimum(np.ceil(position).astype(np.int64), n_in - 1)
    return lower, upper, position - floor


def _lerp(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """first + (second - first) * weight in float32: the order that fixes the last bit."""
    first = first.astype(np.float32)
    return first + (second - first) * weight


def _check_resize(image: np.ndarray, size: Any) -> tuple[int, int]:
    if image.dtype != np.uint8 or image.ndim != 3 or 0 in image.shape:
        raise ValueError(
            f"image is {image.dtype} {image.shape}, expected uint8 [H, W, C] with at least one"
            " pixel; decode() gives that for anything PIL can read"
        )
    if np.shape(size) != (2,):
        raise ValueError(f"size is {size!r}, expected (height, width)")
    return checked_size(size[0]), checked_size(size[1])


def checked_size(size: Any) -> int:
    """The number, if it is a whole number of at least 1; ValueError otherwise."""
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size is {size!r}, expected whole numbers >= 1 (pixels)")
    return int(size)


def big_vision(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Squash to a square, TF2 bilinear, as the published evaluations.

    big_vision's `resize(size)` (pp/ops_image.py:57).
    """
    return resize_bilinear(image, (size, size))


def big_vision_pad(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Zero-pad to a square, TF2 bilinear.

    Rows are padded when they are read: the square, 1.2 GB for a 20000x500 strip, never exists.
    """
    size, (height, width) = checked_size(size), image.shape[:2]
    side = max(height, width)
    above = before(height, side)

    def rows_of(rows: np.ndarray) -> np.ndarray:
        band = image[np.clip(rows - above, 0, height - 1)]
        band[(rows < above) | (rows >= above + height)] = 0
        return _pad(band, 1, side)

    return _bilinear(rows_of, (side, side, 3), size, size)


def huggingface(
    image: UInt8[np.ndarray, "h w 3"], size: int, resample: str = "bicubic"
) -> UInt8[np.ndarray, "s s 3"]:
    """Squash to a square, PIL bicubic, as `SiglipImageProcessorPil`.

    Bilinear where the model's own processor files say so, as SigLIP 2's do.
    """
    return _resized(image, checked_size(size), size, Image.Resampling[resample.upper()])


def serving(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Zero-pad to a square, PIL bicubic, as the official container.

    An image of nothing but 0 and 255 (a mask, a blank page) stays so, without antialiasing: the
    container divides by 255 first, and its processor then takes an image that holds only 0.0 and
    1.0 for 8-bit integers (transformers image_transforms.py `_rescale_for_pil_conversion`).
    Embeddings of this preset are compared with the container's, so the quirk is kept.

    16-bit sources may differ from the container by one level: it truncates, `decode` rounds.

    Args:
        image: uint8 [H, W, 3].
        size: height and width of the result.

    Returns:
        uint8 [size, size, 3].

    Raises:
        UnreadableImage: so elongated that the padded image would not fit in memory.
    """
    size, side = checked_size(size), max(image.shape[:2])
    if side * size > facts.MAX_PIXELS:
        raise UnreadableImage(
            f"{image.shape[1]}x{image.shape[0]} image is too elongated to be padded to a square;"
            " crop it, or use another preset"
        )
    if _only_extremes(image[:1]) and _only_extremes(image):
        return _pad_and_resize(image, side, size, lambda band: band // 255) * np.uint8(255)
    return _pad_and_resize(image, side, size)


def _only_extremes(image: np.ndarray) -> bool:
    bands = (band + np.uint8(1) for band in _bands(image))  # 255 wraps to 0
    return all(band.max() <= 1 for band in bands)


def _bands(image: np.ndarray) -> Iterator[np.ndarray]:
    """The rows, some at a time, so that what is made of them takes little memory."""
    rows = max(1, _BAND // max(image.shape[:2]))
    return (image[y : y + rows] for y in range(0, len(image), rows))


def _pad_and_resize(
    image: np.ndarray, side: int, size: int, each: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> np.ndarray:
    """PIL's two passes (columns, 8-bit, rows) one after the other: side x side never exists.

    Bit-equal to resizing the padded square, which takes 1.2 GB for a 20000x500 strip.

    Args:
        image: uint8 [H, W, 3].
        side: of the square.
        size: of the result.
        each: what is done to each band of rows first.
    """
    bands = [_columns(each(band), side, size) for band in _bands(image)]
    return _bicubic(_pad(np.concatenate(bands), 0, side), size, size)


def _columns(band: np.ndarray, side: int, size: int) -> np.ndarray:
    """The first pass over rows that are padded to `side`: [h, W, 3] to [h, size, 3].

    The padding of a narrow strip is left out: for 2732x65500 pixels it would take PIL 70 s.
    """
    if side < _NARROW * band.shape[1]:
        return _bicubic(_pad(band, 1, side), len(band), size)
    reached, weights = _weights(side, size, band.shape[1])
    sums = np.moveaxis(band, 2, 1).astype(np.float64) @ weights  # of whole numbers: exact
    out = np.zeros((len(band), size, 3), np.uint8)
    levels = np.floor(sums / (1 << _FIXED) + 0.5).clip(0, 255).astype(np.uint8)
    out[:, reached] = np.moveaxis(levels, 1, 2)
    return out


@functools.lru_cache(4)
def _weights(side: int, size: int, width: int) -> tuple[slice, np.ndarray]:
    """Which columns of the result the `width` columns in the middle of `side` reach, and PIL's
    bicubic weights for them, [width, columns], as the whole numbers of 2 ** -`_FIXED` that it
    rounds them to (libImaging/Resample.c)."""
    left, scale = before(width, side), side / size
    reach = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - 2 * reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + 2 * reach + 0.5).astype(np.int64), side)
    reached = np.flatnonzero((first < left + width) & (last > left))
    reached = slice(int(reached[0]), int(reached[-1]) + 1)
    column, first, last = np.arange(side)[:, None], first[reached], last[reached]
    x = np.abs((column - centre[reached] + 0.5) * (1.0 / reach))
    near, far = ((1.5 * x - 2.5) * x * x + 1), (((x - 5) * x + 8) * x - 4) * -0.5
    weight = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weight[(column < first) | (column >= last)] = 0
    weight = weight / weight.sum(axis=0) * (1 << _FIXED)
    return reached, np.trunc(weight + np.copysign(0.5, weight))[left : left + width]


def _pad(image: np.ndarray, axis: int, side: int) -> np.ndarray:
    """Zeros around `axis`, the odd one after (predictor.py `_zero_pad_image_to_square`)."""
    missing, zeros = side - image.shape[axis], before(image.shape[axis], side)
    padding = [(0, 0)] * 3
    padding[axis] = (zeros, missing - zeros)
    return np.pad(image, padding) if missing else image


def before(length: int, side: int) -> int:
    """Zeros before a row or column that is padded to `side`."""
    return (side - length) // 2


def _bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return _resized(image, height, width, Image.Resampling.BICUBIC)


def _resized(image: np.ndarray, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    pixels = np.array(_picture(image).resize((width, height), resample))
    return np.ascontiguousarray(pixels[..., :3])


def _picture(image: np.ndarray) -> Image.Image:
    """An image of PIL; of pixels four bytes apart, as PIL keeps them, nothing is copied.

    PIL would copy them twice: 1.1 GiB for 179 megapixels.
    """
    whole, (height, width, _) = image.base, image.shape
    if not isinstance(whole, np.ndarray) or whole.shape != (height, width, 4):
        return Image.fromarray(image)
    if not whole.flags.c_contiguous or whole.ctypes.data != image.ctypes.data:
        return Image.fromarray(image)
    return Image.frombuffer("RGBX", (width, height), whole, "raw", "RGBX", 0, 1)


# By the names of the functions; `--help` shows the first sentence of each docstring.
PRESETS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    function.__name__: function for function in (big_vision, big_vision_pad, huggingface, serving)
}


def preset(name: str, resample: str = "bicubic") -> Callable[[np.ndarray, int], np.ndarray]:
    """The preset function of that name: (uint8 [H, W, 3], size) -> uint8 [size, size, 3].

    Args:
        name: of a preset.
        resample: how the model's own processor resizes, which "huggingface" does too.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preprocess {name!r}, expected one of: {', '.join(PRESETS)}")
    if name == "huggingface" and resample != "bicubic":
        return functools.partial(huggingface, resample=resample)
    return PRESETS[name]


def value_range(pixels: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """0..255 -> [-1, 1] in float32: x / 255 * 2 - 1 (big_vision pp/ops_general.py:32-64).

    Bit-equal, for all 256 values, to the rescaling and normalisation of `SiglipImageProcessorPil`.
    """
    return pixels.astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
