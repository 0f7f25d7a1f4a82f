"""The pixels of the official container, for the files that it serves, with all its quirks.

Google-Health/medsiglip at 56b1447, python/data_accessors/local_file_handlers/
generic_dicom_handler.py and python/data_processing/image_utils.py. The quirks:

* CT is rendered in one grey window: the file's, or level 100, width 2500. An odd width loses one.
* CR and DX are stretched from their minimum to their maximum, also after a window. A constant image
  becomes white. With a rescale but no window, negative values wrap around.
* VOI LUTs, the function of a window and padding are ignored; so are the sign and the bits in use of
  compressed files. Several windows in a file are an error.
* GM, SM, XC and colours are used as stored: 12-bit samples are dark, MONOCHROME1 is negative.
* 16 bits become 8 by truncation, where it hands an image to PIL.
* JPEG 2000 is decoded by PIL (ez_wsi_dicomweb 6.1.2, dicom_frame_decoder.py), which shifts grey of
  9 to 15 bits up to 16 and adds half the range to signed samples (Pillow, Jpeg2KDecode.c): the
  values of a CT of 12 bits are 16 times too large for its window.
"""

import numpy as np
from jaxtyping import UInt8

from medsiglip_jax.preprocess.dicom import samples, sniff
from medsiglip_jax.preprocess.dicom.grey import looked_up, rescaled
from medsiglip_jax.preprocess.dicom.header import Header
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage

MODALITIES = ("CR", "DX", "CT", "GM", "SM", "XC")
_DEFAULT_CT = (2500.0, 100.0)  # width, level
_NATIVE = (sniff.IMPLICIT, sniff.EXPLICIT)  # and deflated
_ENCAPSULATED = tuple(
    f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 110, 111, 112)
)
# JPEG 2000.
BY_PIL = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


class WholeSlide(UnreadableImage):
    """A level of a slide, whose frames are tiles: `slides` reads it, as another part of the
    container does."""


def check(header: Header) -> None:
    """Raises UnreadableImage, with the reason, for files that the container refuses."""
    if header.sop_class == _SLIDE:
        raise WholeSlide("official rules: whole slides are read by another path of theirs")
    if header.modality not in MODALITIES:
        raise UnreadableImage(
            f"official rules: modality {header.modality_named} is not served; expected one of "
            f"{', '.join(MODALITIES)} (the rules 'dicom' read every modality)"
        )
    if header.syntax not in (*_NATIVE, *_ENCAPSULATED):
        raise UnreadableImage("official rules: the transfer syntax is not served")
    if header.samples not in (1, 3):
        raise UnreadableImage(f"official rules: {header.samples} samples per pixel")
    if header.frames != 1:
        raise UnreadableImage(f"official rules: {header.frames} frames, expected 1")
    if header.syntax in _NATIVE and not (header.grey or header.photometric == "RGB"):
        raise UnreadableImage("official rules: the photometric interpretation is not served")
    if (header.samples == 1) != header.grey:
        raise UnreadableImage("official rules: colours that do not fit the samples per pixel")


def render(
    pixels: np.ndarray, header: Header, rules: Rules
) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """What the container hands to PIL, and a description, in which windows are width/level.

    Args:
        pixels: [H, W] or [H, W, 3] as `pixel_array`, or the codec, returns them.
        header: of the frame.
        rules: `ct_window` is the window of a request.

    Raises:
        UnreadableImage: values that the container cannot take.
    """
    if header.samples == 3 or header.modality in ("GM", "SM", "XC"):
        return _to_8_bits(pixels), "as stored"
    if pixels.dtype.kind not in "iu" or pixels.dtype.itemsize > 2:
        raise UnreadableImage(f"official rules: {pixels.dtype} samples")
    spanned, counts = samples.histogram(pixels)
    values = spanned[counts > 0].astype(pixels.dtype)
    levels, words = (_ct if header.modality == "CT" else _radiograph)(values, header, rules)
    if header.photometric == "MONOCHROME1":
        levels, words = np.iinfo(levels.dtype).max - levels, f"{words}, inverted"
    table = _to_8_bits(levels)
    last = len(values) - 1

    def shade(stored: np.ndarray) -> np.ndarray:
        return table[np.searchsorted(values, stored).clip(0, last)]

    return samples.shaded(pixels, shade), words


def windowed(x: np.ndarray, width: float, level: float) -> np.ndarray:
    """The container's window: uint16, half-width rounded down, values to even."""
    half = width // 2
    low, high = level - half, level + half
    shares = np.interp(np.clip(x, low, high), (low, high), (0, 65535))
    return np.round(shares).astype(np.uint16)


def stretched(x: np.ndarray) -> np.ndarray:
    """Stretches unsigned integers to the range of their type; a constant becomes its maximum."""
    top = np.iinfo(x.dtype).max
    return np.interp(x, (x.min(), x.max()), (0, top)).astype(x.dtype)


def unsigned(x: np.ndarray) -> np.ndarray:
    """Signed integers minus their minimum."""
    if x.dtype.kind == "u":
        return x
    return (x.astype(np.int64) - int(x.min())).astype(f"u{x.dtype.itemsize}")


def _ct(stored: np.ndarray, header: Header, rules: Rules) -> tuple[np.ndarray, str]:
    if (header.slope is None) != (header.intercept is None):
        raise UnreadableImage("official rules: CT with only one of slope and intercept")
    width, level = map(float, rules.ct_window or _file_window(header) or _DEFAULT_CT)
    return windowed(rescaled(stored, header), width, level), f"W/L {width:g}/{level:g}"


def _radiograph(stored: np.ndarray, header: Header, rules: Rules) -> tuple[np.ndarray, str]:
    lut, window, words = header.modality_lut, _file_window(header), "stretched"
    x = rescaled(stored, header) if lut is None else looked_up(stored.astype(np.float64), lut)
    if lut is not None and lut.bits <= 8:
        x = x.astype(np.uint8)
    if window is not None:
        x, words = windowed(x, *window), "W/L {:g}/{:g}, stretched".format(*window)
    if x.dtype == np.float64:
        x = x.astype(np.int64).astype(stored.dtype)  # wraps
    return (x if x.dtype == np.uint8 else stretched(unsigned(x))), words


def _file_window(header: Header) -> tuple[float, float] | None:
    """(width, level) of the file."""
    if len(header.windows) > 1:
        raise UnreadableImage(
            f"official rules: {len(header.windows)} windows in one file, on which the container "
            "fails (the rules 'dicom' take the first)"
        )
    window = header.windows[0] if header.windows else None
    return None if window is None else (window[1], window[0])


def _to_8_bits(levels: np.ndarray) -> np.ndarray:
    """x / 65535 in float32, times 255, truncated (predictor.py, then transformers' to_pil_image);
    grey as three channels."""
    if levels.dtype.kind != "u" or levels.dtype.itemsize > 2:
        raise UnreadableImage(f"official rules: {levels.dtype} samples")
    if levels.dtype.itemsize == 2:
        shares = np.arange(65536, dtype=np.float32) / 65535
        table = (shares.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)
        levels = table[levels]
    return levels if levels.shape[-1:] == (3,) and levels.ndim == 3 else np.stack([levels] * 3, -1)
