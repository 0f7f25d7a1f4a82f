"""Images that PIL reads, and arrays -> uint8 RGB [H, W, 3]. What is decided here, once, for all:

* Grey is replicated, palettes become real colours (the official container feeds palette *indices*).
* Alpha is dropped, never composited: `tf.io.decode_image(channels=3)` of big_vision
  (pp/ops_image.py:31), the official container (`x[..., :3]`) and the processor of transformers 4 do
  so. transformers 5 composites on white instead.
* 16-bit grey is scaled linearly, round(x / 257), never clipped or windowed. (16-bit *colour* files
  are reduced by PIL itself, to the high byte, as libpng does for TensorFlow.)
* EXIF orientation is not applied: pixels are used as stored, as in tf.data, big_vision and the
  container. `Facts` reports the tag so that a caller can warn. PIL itself turns TIFF and AVIF files
  upright while reading them.
* The first frame of a GIF, APNG or multi-page TIFF is taken.
"""

import io
import struct
import threading
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from medsiglip_jax.preprocess.facts import Facts, UnreadableImage, check_size

# Raster formats with a signature. Left out on purpose: EPS and WMF (run an interpreter), stubs
# that need a handler, formats without magic bytes (TGA, PCD, SPIDER, ...: they match any file).
FORMATS = (
    *("JPEG", "PNG", "TIFF", "GIF", "BMP", "DIB", "PPM", "WEBP", "JPEG2000", "AVIF", "ICO"),
    *("PSD", "PCX", "SGI", "SUN", "QOI", "DDS", "ICNS"),
)
# Their signatures are two to four bytes that are common in other files.
_SHORT_SIGNATURES = frozenset(("DIB", "ICO", "PCX", "SGI"))
_SCALE = "scale them to uint8 or uint16 first"
EXPECTED = (
    "expected a path, bytes, an open file, a PIL image, or a uint8/uint16 array"
    " [H,W], [H,W,1], [H,W,2] (grey + alpha), [H,W,3] or [H,W,4] (channels last)"
)

# PIL image of mode RGB -> uint8 [H, W, 3].
ToArray = Callable[[Image.Image], np.ndarray]

_ORIENTATION_TAG = 0x0112
# A lazily opened PIL image must not be loaded by two threads at once: they share one file position.
_load_lock = threading.Lock()


def from_stream(
    stream: io.BytesIO | io.BufferedReader, to_array: ToArray
) -> tuple[np.ndarray, Facts]:
    """Decodes an image file; PIL's errors pass through."""
    with _open(stream) as image:
        return _rgb(image, to_array)


def from_image(image: Image.Image, to_array: ToArray) -> tuple[np.ndarray, Facts]:
    """Decodes an image that a caller has opened."""
    with _load_lock:
        return _rgb(image, to_array)


def spread(rgb: np.ndarray, to_array: ToArray) -> np.ndarray:
    """Pixels as `to_array` gives them, unless they are 4 bytes apart already."""
    if to_array is not np.asarray and rgb.flags.c_contiguous:
        return to_array(Image.fromarray(rgb))
    return rgb


def is_known(start: bytes) -> bool:
    """Whether a file that starts so is of one of `FORMATS` whose signature no other file has."""
    Image.init()
    names = [name for name in FORMATS if name in Image.OPEN and name not in _SHORT_SIGNATURES]
    accepts = (Image.OPEN[name][1] for name in names)
    return len(start) >= 16 and any(accept and accept(start[:16]) is True for accept in accepts)


def _open(stream: io.BytesIO | io.BufferedReader) -> Image.Image:
    """`PIL.Image.open` for `FORMATS`, without its decompression-bomb warning.

    That warning starts at half of `MAX_PIXELS`, and `warnings.catch_warnings` is not thread-safe.
    """
    prefix = stream.read(16)
    if not prefix:
        raise UnreadableImage("empty, 0 bytes")
    Image.preinit()
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        if name not in Image.OPEN:  # this build of PIL lacks the codec
            continue
        factory, accept = Image.OPEN[name]
        try:
            verdict = accept(prefix) if accept else True
            if not verdict or isinstance(verdict, str):  # a string says which codec is missing
                continue
            stream.seek(0)
            return factory(stream, "")
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError, struct.error):
            continue  # how a plugin says "not mine"
    raise UnidentifiedImageError


def _rgb(image: Image.Image, to_array: ToArray) -> tuple[np.ndarray, Facts]:
    check_size(*image.size)
    image.load()
    return _rgb_pixels(image, to_array), Facts(_orientation(image))


def _rgb_pixels(image: Image.Image, to_array: ToArray) -> np.ndarray:
    if image.mode == "F":
        raise UnreadableImage(f"float pixels (mode F) have no agreed range; {_SCALE}")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            outside = f"32-bit pixels with values {low}..{high}, outside 0..65535"
            raise UnreadableImage(f"{outside}; window or {_SCALE}")
        return from_array(values.astype(np.uint16))
    if "transparency" in image.info:  # PIL would warn, or fail, while carrying it over to RGB
        image = image.copy()
        del image.info["transparency"]
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return to_array(image if image.mode == "RGB" else image.convert("RGB"))


def from_array(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGB of a uint8 or uint16 array: one grey channel, grey and alpha, RGB or RGBA."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    known = pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2
    if not known or pixels.ndim not in (2, 3) or not 1 <= channels <= 4:
        raise UnreadableImage(EXPECTED)
    if pixels.size == 0:
        raise UnreadableImage("no pixels")
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    pixels = pixels[..., : 1 if channels < 3 else 3]
    if pixels.dtype.itemsize == 2:
        # Exact round(x / 257): 257 is odd, so there are no ties; 65535 = 255 * 257.
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return pixels if channels >= 3 else np.repeat(pixels, 3, axis=2)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata does not make the pixels unreadable
        return 1
    return int(value) if value in range(1, 9) else 1
