"""Pixels for the image tower: four named presets, uint8 [H, W, 3] -> uint8 [size, size, 3].

The official sources disagree, so the name of the preset is recorded beside every embedding:

* `big_vision`: squash to a square, TF2 bilinear without antialias, truncated to uint8. The model
  card's recipe for its evaluations (big_vision pp/ops_image.py:57-87 at 0127fb6); the default.
* `big_vision_pad`: zero-pad to a square as `serving` does, then as `big_vision`. No source names
  it; the published figures leave open whether images were padded, so evaluations compare all four.
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
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.decode import UnreadableImage, decode
from medsiglip_jax.preprocess.dicom.rules import Rules

__all__ = [
    "PRESETS",
    "UnreadableImage",
    "big_vision",
    "big_vision_pad",
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
    return _bilinear(lambda rows: image[rows], image.shape, height, width)


def _bilinear(
    rows_of: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], height: int, width: int
) -> np.ndarray:
    """Resizes an image [H, W, C] of that shape; `rows_of` gives some of its rows, by number."""
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
    return _check_size(size[0]), _check_size(size[1])


def _check_size(size: Any) -> int:
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size is {size!r}, expected whole numbers >= 1 (pixels)")
    return int(size)


def big_vision(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Squashes to [size, size, 3] as big_vision's `resize(size)` does (pp/ops_image.py:57)."""
    return resize_bilinear(image, (size, size))


def big_vision_pad(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Pads to a black square, centred, as `serving` does, then resizes as `big_vision` does.

    Rows are padded when they are read: the square, 1.2 GB for a 20000x500 strip, never exists.
    """
    size, (height, width) = _check_size(size), image.shape[:2]
    side = max(height, width)
    above = before(height, side)

    def rows_of(rows: np.ndarray) -> np.ndarray:
        band = image[np.clip(rows - above, 0, height - 1)]
        band[(rows < above) | (rows >= above + height)] = 0
        return _pad(band, 1, side)

    return _bilinear(rows_of, (side, side, 3), size, size)


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
    missing, zeros = side - image.shape[axis], before(image.shape[axis], side)
    padding = [(0, 0)] * 3
    padding[axis] = (zeros, missing - zeros)
    return np.pad(image, padding) if missing else image


def before(length: int, side: int) -> int:
    """Zeros before a row or column that is padded to `side`."""
    return (side - length) // 2


def _bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized)


PRESETS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "big_vision": big_vision,
    "big_vision_pad": big_vision_pad,
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
    items: Any,
    size: int,
    preprocess: str = "big_vision",
    workers: int | None = None,
    dicom: Rules = Rules(),
) -> UInt8[np.ndarray, "n s s 3"]:
    """Decodes and resizes images; order is kept.

    Args:
        items: one image (a source, see `preprocess.sources`, or anything else that `decode` takes),
            a sequence of them, or a batch: uint8 or uint16 array [n, H, W, 3].
        size: height and width of the result, in pixels.
        preprocess: name of a preset: "big_vision", "big_vision_pad", "huggingface" or "serving".
        workers: threads; default the number of cores, at most 8.
        dicom: how DICOM files become pixels.

    Returns:
        uint8 [n, size, size, 3]; [0, size, size, 3] for an empty sequence.

    Raises:
        UnreadableImage: an image that cannot be used, by position and name; a FileNotFoundError as
            well where there is none.
        OSError: the disk or the network fails.
        ValueError: unknown preset, or a size or number of workers below 1.

    Warns:
        UserWarning: once, with the number of images whose EXIF orientation is not upright; and
            once, with that of DICOM files that say that annotation is burned into their pixels.
    """
    items, resize, size = _as_list(items), preset(preprocess), _check_size(size)
    workers = _check_size(min(8, os.cpu_count() or 1) if workers is None else workers)
    out = np.empty((len(items), size, size, 3), np.uint8)

    def load(i: int) -> decoding.Facts:
        try:
            pixels, facts = _decoded(items[i], dicom)
            out[i] = resize(pixels, size)
        except UnreadableImage as error:
            where = f"image {i + 1} of {len(items)}: " if len(items) > 1 else ""
            raise type(error)(f"{where}{error}") from error
        return facts

    if workers == 1 or len(items) < 2:
        facts = list(map(load, range(len(items))))
    else:
        with ThreadPoolExecutor(min(workers, len(items))) as pool:
            facts = list(pool.map(load, range(len(items))))
    if turned := sum(f.orientation != 1 for f in facts):
        warnings.warn(
            f"{turned} of {len(items)} images carry an EXIF orientation that is not applied: pixels"
            " are used as stored (PIL.ImageOps.exif_transpose turns an image upright)",
            stacklevel=2,
        )
    if burned := sum(f.burned_in for f in facts):
        warnings.warn(
            f"{burned} of {len(items)} images are DICOM files that say that annotation, which may"
            " identify people, is burned into their pixels",
            stacklevel=2,
        )
    return out


def _decoded(item: Any, rules: Rules) -> tuple[np.ndarray, decoding.Facts]:
    if isinstance(item, (str, os.PathLike)):
        return sources.read(os.fspath(item), rules=rules)
    return decoding.decode_with_facts(item, rules=rules)


def _as_list(items: Any) -> list:
    if isinstance(items, np.ndarray):
        if items.ndim == 4 or items.dtype.kind in "OSU":  # a batch, or an array of paths
            return list(items)
        return [items]
    single = isinstance(items, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image))
    if single or isinstance(items, Mapping) or not isinstance(items, Iterable):
        return [items]
    return list(items)
