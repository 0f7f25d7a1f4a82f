"""Images that PIL reads, and arrays -> uint8 RGB [H, W, 3]. What is decided here, once, for all:

* Grey is replicated, palettes become real colours (the official container feeds palette *indices*).
* Alpha is dropped, never composited: `tf.io.decode_image(channels=3)` of big_vision
  (pp/ops_image.py:31), the official container (`x[..., :3]`) and the processor of transformers 4 do
  so. transformers 5 composites on white instead.
* 16-bit grey is scaled linearly, by the range that the file states, or else round(x / 257); see
  `grey16`. (16-bit *colour* files are reduced by PIL itself, to the high byte, as libpng does for
  TensorFlow.)
* EXIF orientation is not applied: pixels are used as stored, as in tf.data, big_vision and the
  container. `Facts` reports the tag so that a caller can warn. PIL itself turns TIFF files upright
  while reading them, and `Facts` then has no orientation to report.
* Of the pages of a TIFF and the frames of a GIF, APNG, WebP or AVIF the first is taken, unless one
  is asked for by its number. Other formats have one image, whatever else they hold.
* What a TIFF calls a reduced version of another image (NewSubfileType, TIFF 6.0 page 36), such as
  the levels of a pyramid, or a transparency mask, is no page. A page that says that it is the
  label of a slide is refused, as in DICOM.
"""

import io
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from medsiglip_jax.preprocess import grey16, tiff
from medsiglip_jax.preprocess.costs import Costs
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import NO_MEMORY, Facts, UnreadableImage, mute

# Raster formats with a signature. Left out on purpose: EPS and WMF (run an interpreter), stubs
# that need a handler, formats without magic bytes (TGA, PCD, SPIDER, ...: they match any file).
FORMATS = (
    *("JPEG", "PNG", "TIFF", "GIF", "BMP", "DIB", "PPM", "WEBP", "JPEG2000", "AVIF", "ICO"),
    *("PSD", "PCX", "SGI", "SUN", "QOI", "DDS", "ICNS"),
)
# Formats whose further images are pages or frames; in PSD they are layers, in a JPEG thumbnails.
_PAGED = frozenset(("TIFF", "GIF", "PNG", "WEBP", "AVIF"))
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
_DESCRIPTION_TAG = 0x010E
# A line of it, as scanners of slides name what they photograph beside the tissue: "Label",
# "macro 1280x431", "Label_Image". Both mostly show the patient's name.
_LABEL = re.compile(r"^\s*(label|macro)([ _]image)?(\s+\d+x\d+)?\s*(\||$)", re.I | re.M)
# Larger images are converted in bands: PIL and numpy would hold them three times for a moment.
_AT_ONCE = 1 << 25  # pixels
_BAND = 1 << 22
# What PIL says without quoting the file: words of a header may be a name.
_QUOTABLE = re.compile(
    "image file is truncated|truncated file read|not enough image data|buffer overrun|broken data "
    "stream|decoding error|unrecognized data stream|codec configuration error|broken png file|"
    "unknown pixel mode|unsupported bmp|not a tiff|cannot handle this data type",
    re.IGNORECASE,
)
# A lazily opened PIL image must not be loaded by two threads at once: they share one file position.
_load_lock = threading.Lock()


def from_stream(stream: Any, to_array: ToArray, rules: Rules) -> tuple[np.ndarray, Facts]:
    """Decodes an image file; PIL's errors pass through."""
    with _open(stream) as image:
        number = rules.frame if isinstance(rules.frame, int) else None
        return _frame(image, _pages(image), to_array, number, rules)


def count_frames(stream: Any) -> int:
    """How many pages or frames a file has; 1 if it is of another format.

    Raises:
        UnreadableImage: PIL cannot open it.
    """
    try:
        with _open(stream) as image:
            return len(_pages(image))
    except Exception as error:
        raise UnreadableImage(reason(error)) from None


def size(stream: Any) -> tuple[int, int]:
    """Width and height of the first page, from the header.

    Raises:
        UnreadableImage: PIL cannot open it.
    """
    try:
        with _open(stream) as image:
            return image.size
    except Exception as error:
        raise UnreadableImage(reason(error)) from None


class Pages:
    """An open file; several threads may render its pages, one after the other.

    Attributes:
        frames: how many it has.
        nbytes: in memory.
    """

    def __init__(self, data: bytes):
        self._lock, self.nbytes = threading.Lock(), len(data)
        try:
            self._image = _open(io.BytesIO(data))
            self._pages = _pages(self._image)
        except Exception as error:
            raise UnreadableImage(reason(error)) from None
        self.frames = len(self._pages)

    def render(self, number: int, rules: Rules) -> tuple[np.ndarray, Facts]:
        """Decodes a page or frame, from 0.

        Raises:
            UnreadableImage: it does not exist, or cannot be read.
        """
        if number >= self.frames:
            raise _no_page(self._image, self.frames, number)
        try:
            with self._lock:
                return _frame(self._image, self._pages, np.array, number, rules)
        except Exception as error:
            raise UnreadableImage(reason(error)) from None


open_bytes = Pages


def _frame(
    image: Image.Image, pages: Sequence[int], to_array: ToArray, number: int | None, rules: Rules
) -> tuple[np.ndarray, Facts]:
    """One of the pages, by default the first; files with a single one ignore the number."""
    count = len(pages)
    number = number or 0 if count > 1 else 0
    if number >= count:
        raise _no_page(image, count, number)
    if image.tell() != pages[number]:
        Costs(image).check_passes(number + 1, rules)
        image.seek(pages[number])
    if not rules.slide_labels and (label := _label(image)):
        raise UnreadableImage(
            f"TIFF that shows the {label} of a slide, which may name the patient; --slide-labels "
            "reads it"
        )
    pixels, facts = _rgb(image, to_array, rules)
    return pixels, replace(facts, frames=count, frame=number)


def _no_page(image: Image.Image, count: int, number: int) -> UnreadableImage:
    return UnreadableImage(f"{image.format} of {count} pages; number {number} is asked for")


def _label(image: Image.Image) -> str | None:
    """Whether the description of a TIFF page says that it is the label or the macro of a slide."""
    text = getattr(image, "tag_v2", {}).get(_DESCRIPTION_TAG)
    match = _LABEL.search(text) if isinstance(text, str) else None
    return match and match[1].lower()


def _pages(image: Image.Image) -> Sequence[int]:
    """The positions to seek for each page or frame of an open file that is not loaded yet."""
    if image.format == "TIFF":
        return tiff.pages(image.fp)  # pyright: ignore[reportAttributeAccessIssue]
    # PIL counts the layers of a PSD from 1, and opens it as a whole.
    return range(getattr(image, "n_frames", 1)) if image.format in _PAGED else [image.tell()]


def from_image(image: Image.Image, to_array: ToArray, rules: Rules) -> tuple[np.ndarray, Facts]:
    """Decodes an image that a caller has opened."""
    with _load_lock:
        return _rgb(image, to_array, rules)


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


def _open(stream: Any) -> Image.Image:
    """`PIL.Image.open` for `FORMATS`, without its decompression-bomb warning.

    That warning starts at half of `MAX_PIXELS`, and `warnings.catch_warnings` is not thread-safe.
    """
    prefix = stream.read(16)
    if not prefix:
        raise UnreadableImage("empty, 0 bytes")
    mute("PIL")
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


def reason(error: Exception) -> str:
    """The reason to give for an error that a reader raised: its own words where they quote nothing
    of the file, else its type."""
    if isinstance(error, UnreadableImage):
        return error.reason
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if isinstance(error, Image.DecompressionBombError):  # of a frame or tile inside the file
        return "more pixels inside than PIL allows (a decompression bomb?)"
    if isinstance(error, UnidentifiedImageError):
        return "not an image file PIL can read"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    words = _QUOTABLE.search(str(error))
    return f"corrupt or unsupported image ({words[0].lower() if words else type(error).__name__})"


def _rgb(image: Image.Image, to_array: ToArray, rules: Rules) -> tuple[np.ndarray, Facts]:
    rules.check_size(*image.size)
    if image.mode == "F":
        raise UnreadableImage(f"float pixels (mode F) have no agreed range; {_SCALE}")
    Costs(image).check(rules)
    stated, layouts = grey16.stated_by(image), {str(tile[3]) for tile in _tiles(image)}
    if (image.mode, layouts) == ("RGBA", {"LA;16B"}):
        image_16 = _grey_with_alpha(image)
    else:
        image.load()
        rules.check_size(*image.size)  # what is in an ICO may be larger than that says
        image_16 = np.asarray(image) if image.mode == "I" or image.mode[:4] == "I;16" else None
    orientation = _orientation(image)
    if image_16 is None:
        pixels = _rgb_pixels(image, to_array)
        reduced = any(";16" in name for name in layouts)  # to the high byte
        dark = reduced and rules.grey16 != "full" and grey16.is_dark(int(pixels.max()) << 8)
        return pixels, Facts(orientation, dark=dark)
    pixels, seen, dark = grey16.render(image_16, rules.grey16, stated, grey16.is_inverted(image))
    return spread(pixels, to_array), Facts(orientation, seen=seen, dark=dark)


def _grey_with_alpha(image: Image.Image) -> np.ndarray:
    """The grey of a PNG of 16 bits: PIL keeps its high bytes, but as RGBA it reads both of each."""
    stream: Any = getattr(image, "fp")  # noqa: B009
    position = stream.tell()
    stream.seek(0)
    with _open(io.BytesIO(stream.read())) as copy:  # a caller may go on to use the image
        stream.seek(position)
        copy.tile = [tile._replace(args="RGBA") for tile in _tiles(copy)]  # pyright: ignore
        high, low = (np.asarray(copy)[..., n].astype(np.uint16) for n in range(2))
        return high << 8 | low


def _tiles(image: Image.Image) -> list:
    """What PIL has still to decode; the last element of each names the layout of the samples."""
    return getattr(image, "tile", [])


def _rgb_pixels(image: Image.Image, to_array: ToArray) -> np.ndarray:
    width, height = image.size
    if width * height <= _AT_ONCE:
        return to_array(_as_rgb(image))
    pixels, rows = np.empty((height, width, 3), np.uint8), max(1, _BAND // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(_as_rgb(band))
    return pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    if "transparency" in image.info:  # PIL would warn, or fail, while carrying it over to RGB
        image = image.copy()
        del image.info["transparency"]
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image if image.mode == "RGB" else image.convert("RGB")


def from_array(pixels: np.ndarray, rules: Rules) -> tuple[np.ndarray, Facts]:
    """uint8 RGB of a uint8 or uint16 array: one grey channel, grey and alpha, RGB or RGBA."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    known = pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2
    if not known or pixels.ndim not in (2, 3) or not 1 <= channels <= 4:
        raise UnreadableImage(EXPECTED)
    if pixels.size == 0:
        raise UnreadableImage("no pixels")
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    pixels = pixels[..., : 1 if channels < 3 else 3]
    if pixels.dtype.itemsize == 1:
        return pixels if channels >= 3 else np.repeat(pixels, 3, axis=2), Facts()
    if channels < 3:
        pixels, seen, dark = grey16.render(pixels[..., 0], rules.grey16)
        return pixels, Facts(seen=seen, dark=dark)
    # Exact round(x / 257): 257 is odd, so there are no ties; 65535 = 255 * 257.
    levels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return levels, Facts(dark=rules.grey16 != "full" and grey16.is_dark(int(pixels.max())))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata does not make the pixels unreadable
        return 1
    return int(value) if value in range(1, 9) else 1
