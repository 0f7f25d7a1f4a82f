"""Colour images: palettes, RGB and every form of YCbCr -> uint8 RGB. ICC profiles are ignored."""

import numpy as np
from jaxtyping import UInt8

from medsiglip_jax.preprocess.dicom import samples
from medsiglip_jax.preprocess.dicom.header import Header, Lut
from medsiglip_jax.preprocess.facts import UnreadableImage

_ROWS = 64  # rows that are converted to float32 at a time
# Matrices Y, Cb, Cr -> R, G, B, and the offsets subtracted first (PS3.3 C.7.6.3.1.2, BT.601).
_FULL = np.array(
    [[1, 1, 1], [0, -0.114 * 1.772 / 0.587, 1.772], [1.402, -0.299 * 1.402 / 0.587, 0]], np.float32
)
_PARTIAL = np.array(
    [[1.1644, 1.1644, 1.1644], [0, -0.3917, 2.0173], [1.596, -0.813, 0]], np.float32
)
_YBR: dict[str, tuple] = dict.fromkeys(("YBR_FULL", "YBR_FULL_422"), (_FULL, (0, 128, 128)))
_YBR |= dict.fromkeys(("YBR_PARTIAL_422", "YBR_PARTIAL_420"), (_PARTIAL, (16, 128, 128)))
# JPEG 2000 decoders undo ICT and RCT themselves.
_RGB = ("RGB", "YBR_ICT", "YBR_RCT")


def render(pixels: np.ndarray, header: Header, is_rgb: bool) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of a frame with three samples.

    Args:
        pixels: unsigned [H, W, 3].
        header: of the frame.
        is_rgb: whether the codec has already converted YCbCr to RGB.

    Raises:
        UnreadableImage: colours that are not supported.
    """
    if pixels.dtype.kind != "u":
        raise UnreadableImage("DICOM with colours that are signed or floats")
    pixels = _to_8_bits(pixels, header.stored)
    if is_rgb or header.photometric in _RGB:
        return pixels
    if header.photometric not in _YBR:
        raise UnreadableImage("DICOM with a photometric interpretation that is not supported")
    if header.stored != 8:
        raise UnreadableImage(f"DICOM with YCbCr of {header.stored} bits per sample")
    return _from_ybr(pixels, *_YBR[header.photometric])


def from_palette(pixels: np.ndarray, palette: Lut) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of indices into a palette; those outside of it get its first or last entry."""
    return samples.shaded(pixels, lambda stored: _looked_up(stored, palette))


def supplemented(
    image: UInt8[np.ndarray, "h w 3"], pixels: np.ndarray, header: Header, palette: Lut
) -> UInt8[np.ndarray, "h w 3"]:
    """A grey image, in which the values from a palette's first on are coloured (PS3.3 C.8.16.2).

    Args:
        image: grey, as `grey.render` returns it; it is changed.
        pixels: stored values [H, W].
        header: of the frame, with the padding, which stays black.
        palette: its colours.
    """
    coloured = (pixels >= palette.first) & ~samples.is_padding(pixels, header)
    image[coloured] = _looked_up(pixels[coloured], palette)
    return image


def _looked_up(stored: np.ndarray, palette: Lut) -> UInt8[np.ndarray, "k 3"]:
    colours = _to_8_bits(palette.values, palette.bits_in_use)
    return colours[np.clip(stored.astype(np.int64) - palette.first, 0, len(colours) - 1)]


def _to_8_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Scales the full range linearly; 16 bits become what `decode` makes of any 16-bit image."""
    top = 2**bits - 1
    if bits == 8:
        return pixels.astype(np.uint8)
    if bits <= 16:
        table = np.rint(np.arange(top + 1) * (255 / top)).astype(np.uint8)
        return table[pixels]
    return np.concatenate(
        [np.rint(pixels[y : y + _ROWS] * (255 / top)) for y in range(0, len(pixels), _ROWS)]
    ).astype(np.uint8)


def _from_ybr(pixels: np.ndarray, matrix: np.ndarray, zero: tuple[int, ...]) -> np.ndarray:
    out = np.empty_like(pixels)
    for y in range(0, len(pixels), _ROWS):
        x = (pixels[y : y + _ROWS] - np.array(zero, np.float32)) @ matrix
        out[y : y + _ROWS] = np.clip(np.floor(x + 0.5), 0, 255)
    return out
