"""Pixels for the image tower: three named presets, uint8 [H, W, 3] -> uint8 [size, size, 3].

The official sources disagree, so the name of the preset is recorded beside every embedding:

* `big_vision`: squash to a square, TF2 bilinear without antialias, truncated to uint8. The model
  card's recipe for its evaluations (big_vision pp/ops_image.py:57-87 at 0127fb6); the default.
* `huggingface`: squash, PIL bicubic: transformers' `SiglipImageProcessorPil`, bit for bit.
* `serving`: zero-pad to a square, PIL bicubic: the official container (python/serving/predictor.py
  at 56b1447), which says that training did the same.

Numpy and PIL only: neither jax nor tensorflow is imported. The range [-1, 1] comes later, on the
accelerator; `value_range` is the same arithmetic in numpy.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image

from medsiglip_jax.preprocess import decode as decoding
from medsiglip_jax.preprocess.decode import UnreadableImage, decode

__all__ = [
    "PRESETS",
    "UnreadableImage",
    "big_vision",
    "decode",
    "huggingface",
    "load_images",
    "preset",
    "resize_bilinear",
    "serving",
    "value_range",
]

# Rows of output made at a time, so that the float32 work stays in cache: 6000x5000 -> 448x448 takes
# 7 ms at 16 and 17 ms in one piece (one core).
_CHUNK_ROWS = 16


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
    channels = image.shape[2]
    top_row, bottom_row, dy = taps(image.shape[0], height)
    left, right, dx = taps(image.shape[1], width)
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
        source = image[rows].reshape(len(rows), -1)
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
    return _check_size(size[0]), _check_size(size[1])


def _check_size(size: Any) -> int:
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size is {size!r}, expected whole numbers >= 1 (pixels)")
    return int(size)


def big_vision(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Squashes to [size, size, 3] as big_vision's `resize(size)` does (pp/ops_image.py:57)."""
    return resize_bilinear(image, (size, size))


def huggingface(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Squashes to [size, size, 3] by PIL bicubic, as `SiglipImageProcessorPil` does."""
    return _bicubic(image, _check_size(size), size)


def serving(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Pads to a black square, centred, then PIL bicubic, as the official container does.

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
    size, side = _check_size(size), max(image.shape[:2])
    if side * size > decoding.MAX_PIXELS:
        raise UnreadableImage(
            f"{image.shape[1]}x{image.shape[0]} image is too elongated to be padded to a square;"
            " crop it, or use another preset"
        )
    if _only_extremes(image[:1]) and _only_extremes(image):
        return _pad_and_resize(image // 255, side, size) * np.uint8(255)
    return _pad_and_resize(image, side, size)


def _only_extremes(image: np.ndarray) -> bool:
    return bool((image + np.uint8(1)).max() <= 1)  # 255 wraps to 0


def _pad_and_resize(image: np.ndarray, side: int, size: int) -> np.ndarray:
    """PIL's two passes (columns, 8-bit, rows) one after the other: side x side never exists.

    Bit-equal to resizing the padded square, which takes 1.2 GB for a 20000x500 strip.
    """
    n = max(1, 2**22 // side)
    bands = [image[y : y + n] for y in range(0, len(image), n)]
    bands = [_bicubic(_pad(band, 1, side), len(band), size) for band in bands]
    return _bicubic(_pad(np.concatenate(bands), 0, side), size, size)


def _pad(image: np.ndarray, axis: int, side: int) -> np.ndarray:
    """Zeros around `axis`, the odd one after (predictor.py `_zero_pad_image_to_square`)."""
    missing = side - image.shape[axis]
    padding = [(0, 0)] * 3
    padding[axis] = (missing // 2, missing - missing // 2)
    return np.pad(image, padding) if missing else image


def _bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized)


PRESETS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "big_vision": big_vision,
    "huggingface": huggingface,
    "serving": serving,
}


def preset(name: str) -> Callable[[np.ndarray, int], np.ndarray]:
    """The preset function of that name: (uint8 [H, W, 3], size) -> uint8 [size, size, 3].

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preprocess {name!r}, expected one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def value_range(pixels: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """0..255 -> [-1, 1] in float32: x / 255 * 2 - 1 (big_vision pp/ops_general.py:32-64).

    Bit-equal, for all 256 values, to the rescaling and normalisation of `SiglipImageProcessorPil`.
    """
    return pixels.astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)


def load_images(
    items: Any, size: int, preprocess: str = "big_vision", workers: int | None = None
) -> UInt8[np.ndarray, "n s s 3"]:
    """Decodes and resizes images; order is kept.

    Args:
        items: one image (anything `decode` takes), a sequence of them, or a batch: uint8 or uint16
            array [n, H, W, 3].
        size: height and width of the result, in pixels.
        preprocess: name of a preset: "big_vision", "huggingface" or "serving".
        workers: threads; default the number of cores, at most 8.

    Returns:
        uint8 [n, size, size, 3]; [0, size, size, 3] for an empty sequence.

    Raises:
        FileNotFoundError, UnreadableImage: an image that cannot be used, by position and name.
        ValueError: unknown preset, or a size or number of workers below 1.

    Warns:
        UserWarning: once, with the number of images whose EXIF orientation is not upright.
    """
    items, resize, size = _as_list(items), preset(preprocess), _check_size(size)
    workers = _check_size(min(8, os.cpu_count() or 1) if workers is None else workers)
    out = np.empty((len(items), size, size, 3), np.uint8)

    def load(i: int) -> bool:
        try:
            pixels, orientation = decoding.decode_with_orientation(items[i])
            out[i] = resize(pixels, size)
        except (FileNotFoundError, UnreadableImage) as error:
            where = f"image {i + 1} of {len(items)}: " if len(items) > 1 else ""
            raise type(error)(f"{where}{error}") from error
        return orientation != 1

    if workers == 1 or len(items) < 2:
        turned = sum(map(load, range(len(items))))
    else:
        with ThreadPoolExecutor(min(workers, len(items))) as pool:
            turned = sum(pool.map(load, range(len(items))))
    if turned:
        warnings.warn(
            f"{turned} of {len(items)} images carry an EXIF orientation that is not applied: pixels"
            " are used as stored (PIL.ImageOps.exif_transpose turns an image upright)",
            stacklevel=2,
        )
    return out


def _as_list(items: Any) -> list:
    if isinstance(items, np.ndarray):
        if items.ndim == 4 or items.dtype.kind in "OSU":  # a batch, or an array of paths
            return list(items)
        return [items]
    single = isinstance(items, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image))
    if single or isinstance(items, Mapping) or not isinstance(items, Iterable):
        return [items]
    return list(items)
