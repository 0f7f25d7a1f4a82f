"""One image, in whatever form it comes -> uint8 RGB [H, W, 3]. PIL decodes, everywhere.

What is decided here, once, for every preset and every caller:

* Grey is replicated, palettes become real colours (the official container feeds palette *indices*).
* Alpha is dropped, never composited: `tf.io.decode_image(channels=3)` of big_vision
  (pp/ops_image.py:31), the official container (`x[..., :3]`) and the processor of transformers 4 do
  so. transformers 5 composites on white instead.
* 16-bit grey is scaled linearly, round(x / 257), never clipped or windowed. (16-bit *colour* files
  are reduced by PIL itself, to the high byte, as libpng does for TensorFlow.)
* EXIF orientation is not applied: pixels are used as stored, as in tf.data, big_vision and the
  container. `decode_with_facts` reports the tag so that a caller can warn. PIL itself turns
  TIFF and AVIF files upright while reading them.
* The first frame of a GIF, APNG or multi-page TIFF is taken.
* DICOM, known by its content, is read by the `Rules` given (preprocess/dicom/).
"""

import contextlib
import io
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from medsiglip_jax.preprocess.dicom import sniff
from medsiglip_jax.preprocess.dicom.rules import Rules

# 2 x PIL's default MAX_IMAGE_PIXELS, where PIL goes from a warning to an error: 537 MB of RGB.
MAX_PIXELS = 2 * 89_478_485

# Raster formats with a signature. Left out on purpose: EPS and WMF (run an interpreter), stubs
# that need a handler, formats without magic bytes (TGA, PCD, SPIDER, ...: they match any file).
FORMATS = (
    *("JPEG", "PNG", "TIFF", "GIF", "BMP", "DIB", "PPM", "WEBP", "JPEG2000", "AVIF", "ICO"),
    *("PSD", "PCX", "SGI", "SUN", "QOI", "DDS", "ICNS"),
)

ToArray = Callable[[Image.Image], np.ndarray]

_ORIENTATION_TAG = 0x0112
_EXPECTED = (
    "expected a path, bytes, a PIL image, or a uint8/uint16 array"
    " [H,W], [H,W,1], [H,W,2] (grey + alpha), [H,W,3] or [H,W,4] (channels last)"
)
# A lazily opened PIL image must not be loaded by two threads at once: they share one file position.
_load_lock = threading.Lock()


class UnreadableImage(ValueError):
    """This one image cannot be used; the message is one line naming the source and the reason."""


@dataclass(frozen=True, repr=False)
class Subject:
    """Whose image a DICOM file is, as it says so, "" for what it does not say: not to be shown.

    Attributes:
        patient, study, series: PatientID, StudyInstanceUID, SeriesInstanceUID.
    """

    patient: str
    study: str
    series: str


@dataclass(frozen=True)
class Facts:
    """What to tell about an image beside its pixels.

    Attributes:
        orientation: EXIF's, 1..8, which was *not* applied; 1 is upright.
        burned_in: a DICOM file says that annotation that may identify is in its pixels.
        frames: in a DICOM file, of which one was taken.
        frame: that one, from 0.
        seen: how the values of a DICOM file became levels, in words, such as "modality CT, rules
            dicom: W/L 2250/-100 350/40 80/40".
        subject: of a DICOM file.
    """

    orientation: int = 1
    burned_in: bool = False
    frames: int = 1
    frame: int = 0
    seen: str = ""
    subject: Subject | None = None


def decode(item: Any, rules: Rules = Rules()) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes one image to RGB.

    Args:
        item: path (str or PathLike) | bytes | PIL.Image.Image | uint8 or uint16 array [H,W],
            [H,W,1], [H,W,2] (grey + alpha), [H,W,3] or [H,W,4].
        rules: of DICOM.

    Returns:
        uint8 [H, W, 3], 0..255; may be read-only or share memory with `item`.

    Raises:
        FileNotFoundError: the path does not exist.
        UnreadableImage: anything else that keeps it from being an image: truncated, corrupt, empty,
            not an image, a folder, more than `MAX_PIXELS` pixels (refused before decoding), float
            or 32-bit pixels without an agreed range, or an unsupported type of `item`.
        ModuleNotFoundError: it is DICOM, and what reads that is not installed; no other DICOM file
            can be read, either.
    """
    return decode_with_facts(item, rules=rules)[0]


def decode_with_facts(
    item: Any, to_array: ToArray = np.asarray, rules: Rules = Rules()
) -> tuple[UInt8[np.ndarray, "h w 3"], Facts]:
    """Decodes one image and says what the pixels do not show.

    Args:
        item: as for `decode`.
        to_array: PIL image of mode RGB -> uint8 [H, W, 3].
        rules: of DICOM.

    Returns:
        The pixels as stored (uint8 [H, W, 3]), and facts.

    Raises:
        FileNotFoundError, UnreadableImage, ModuleNotFoundError: as for `decode`.
    """
    try:
        return _decode(item, to_array, rules)
    except FileNotFoundError:
        raise FileNotFoundError(f"{describe(item)}: no such file") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # PIL plugins raise nearly every type there is on hostile input
        raise UnreadableImage(f"{describe(item)}: {_reason(error)}") from error


def describe(item: Any) -> str:
    """Names an image in an error message, on one line."""
    if isinstance(item, (str, os.PathLike)):
        path = str(item)
        return path if path.isprintable() and path.strip() else repr(path)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return f"image of {len(item)} bytes"
    if isinstance(item, Image.Image):
        return f"PIL image (mode {item.mode}, {item.width}x{item.height})"
    if isinstance(item, np.ndarray):
        return f"{item.dtype} array {item.shape}"
    return f"object of type {type(item).__name__}"


def _reason(error: Exception) -> str:
    if isinstance(error, UnreadableImage):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):  # of a frame or tile inside the file
        return f"more pixels than PIL allows: {error}"
    if isinstance(error, UnidentifiedImageError):
        return "not an image file PIL can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:200] or "no further detail"
    return f"corrupt or unsupported image ({type(error).__name__}: {text})"


def _decode(item: Any, to_array: ToArray, rules: Rules) -> tuple[np.ndarray, Facts]:
    if isinstance(item, np.ndarray):
        return _rgb_from_array(item), Facts()
    if isinstance(item, Image.Image):
        with _load_lock:
            return _rgb_from_pil(item, to_array)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return _rgb_from_stream(io.BytesIO(item), to_array, rules)
    if isinstance(item, (str, os.PathLike)):
        mode = os.stat(item).st_mode
        if not stat.S_ISREG(mode):  # a pipe or device may never end
            raise UnreadableImage("a folder" if stat.S_ISDIR(mode) else "not a file")
        with open(item, "rb") as stream:
            return _rgb_from_stream(stream, to_array, rules)
    raise UnreadableImage(_EXPECTED)


def _rgb_from_stream(
    stream: io.BytesIO | io.BufferedReader, to_array: ToArray, rules: Rules
) -> tuple[np.ndarray, Facts]:
    if sniff.is_dicom(stream.read(sniff.START)):
        stream.seek(0)
        return _rgb_from_dicom(stream.read(), to_array, rules)
    stream.seek(0)
    with _open(stream) as image:
        return _rgb_from_pil(image, to_array)


def _rgb_from_dicom(data: bytes, to_array: ToArray, rules: Rules) -> tuple[np.ndarray, Facts]:
    with needing("DICOM", "dicom"):
        from medsiglip_jax.preprocess.dicom import pixels
    rgb, facts = pixels.decode(data, rules)
    return spread(rgb, to_array), facts


@contextlib.contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Says in one line what to install if an import in it fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {what} needs {error.name}: pip install 'medsiglip-jax[{extra}]'"
        ) from None


def spread(rgb: np.ndarray, to_array: ToArray) -> np.ndarray:
    """Pixels as `to_array` gives them: colours are not in PIL's memory yet, grey is alike."""
    if to_array is not np.asarray and rgb.flags.c_contiguous:
        return to_array(Image.fromarray(rgb))
    return rgb


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


def _rgb_from_pil(image: Image.Image, to_array: ToArray) -> tuple[np.ndarray, Facts]:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadableImage(f"no pixels, {width}x{height}")
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{width}x{height} = {width * height} pixels is more than the limit of {MAX_PIXELS}"
            " (a decompression bomb or a whole slide); pass a smaller image or tiles of it"
        )
    image.load()
    return _rgb_pixels(image, to_array), Facts(_orientation(image))


def _rgb_pixels(image: Image.Image, to_array: ToArray) -> np.ndarray:
    if image.mode == "F":
        raise UnreadableImage(
            "float pixels (mode F) have no agreed range; scale them to uint8 or uint16 first"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _rgb_from_array(_as_uint16(np.asarray(image)))
    if "transparency" in image.info:  # PIL would warn, or fail, while carrying it over to RGB
        image = image.copy()
        del image.info["transparency"]
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return to_array(image if image.mode == "RGB" else image.convert("RGB"))


def _as_uint16(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnreadableImage(
            f"32-bit pixels with values {low}..{high}, outside 0..65535;"
            " window or scale them to uint8 or uint16 first"
        )
    return values.astype(np.uint16)


def _rgb_from_array(pixels: np.ndarray) -> np.ndarray:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or not 1 <= channels <= 4 or pixels.dtype.kind != "u":
        raise UnreadableImage(_EXPECTED)
    if pixels.dtype.itemsize > 2:
        raise UnreadableImage(_EXPECTED)
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
