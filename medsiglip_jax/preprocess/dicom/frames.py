"""A compressed frame -> its samples, by imagecodecs: libjpeg-turbo, CharLS and OpenJPEG.

Before anything is decoded, the sizes in the stream are checked against those of the file, since a
stream may claim more. Bits and colours are those of `pydicom.pixel_array` with its plugins
(tests/preprocess/test_dicom.py); libjpeg converts YCbCr to RGB, as for any other JPEG file.
"""

import struct
from typing import NamedTuple

import imagecodecs
import numpy as np

from medsiglip_jax.preprocess.dicom.file import damaged
from medsiglip_jax.preprocess.dicom.header import Header
from medsiglip_jax.preprocess.facts import UnreadableImage

_PREFIX = "1.2.840.10008.1.2."
_SOFS = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), 0xF7))
_SIZ = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 code stream


class Stream(NamedTuple):
    """The header of a JPEG, JPEG-LS or JPEG 2000 stream.

    Attributes:
        rows, columns, samples: of the image.
        bits: per sample.
        at: where this header is; the end of the image comes after it.
        adobe: whether it has Adobe's marker, which says how colours are encoded.
        lossless: whether it is JPEG's own lossless process, in which nothing converts colours.
    """

    rows: int
    columns: int
    samples: int
    bits: int
    at: int
    adobe: bool = False
    lossless: bool = False


class Decoded(NamedTuple):
    """A decoded frame.

    Attributes:
        pixels: [H, W] or [H, W, S] of the codec's dtype.
        bits: how many of the low bits are in use; None where they are laid out as without
            compression.
        is_rgb: whether the codec has converted YCbCr to RGB.
    """

    pixels: np.ndarray
    bits: int | None
    is_rgb: bool = False


def decode(encoded: bytes, header: Header) -> Decoded:
    """Decodes a frame.

    Raises:
        UnreadableImage: the transfer syntax is not supported, or the frame is damaged.
    """
    codec = _CODECS.get(header.syntax.removeprefix(_PREFIX))
    if codec is None or not header.syntax.startswith(_PREFIX):
        raise UnreadableImage("DICOM in a transfer syntax that is not decoded here")
    decoded = codec(encoded, header)
    shape = (header.rows, header.columns, *([header.samples] if header.samples > 1 else []))
    if decoded.pixels.shape != shape:
        raise UnreadableImage(
            f"DICOM whose compressed frame has shape {decoded.pixels.shape}, where it says {shape}"
        )
    return decoded


def _rle(encoded: bytes, header: Header) -> Decoded:
    """Byte planes, the highest of each sample first (PS3.5 G)."""
    size, samples = header.allocated // 8, header.samples
    if header.allocated not in (8, 16, 32):
        raise UnreadableImage(f"DICOM with RLE of {header.allocated} bits per sample")
    with damaged("a compressed frame cannot be decoded"):
        planes = imagecodecs.dicomrle_decode(encoded, np.dtype(f"<u{size}"), out=header.frame_bytes)
    count = int.from_bytes(encoded[:4], "little")
    if len(planes) != header.frame_bytes or count != samples * size:
        raise UnreadableImage("damaged DICOM: a compressed frame is cut off")
    pixels = np.frombuffer(planes, f"<u{size}").reshape(samples, header.rows, header.columns)
    return Decoded(np.moveaxis(pixels, 0, -1) if samples > 1 else pixels[0], None)


def _jpeg(encoded: bytes, header: Header) -> Decoded:
    stream, encoded = _checked(_read_jpeg(encoded), encoded, header)
    # Without a marker libjpeg assumes that three components are YCbCr; the file knows better. It
    # cannot convert a lossless stream, whatever the marker says.
    as_it_is = stream.lossless or (header.photometric == "RGB" and not stream.adobe)
    space = "RGB" if as_it_is and header.samples == 3 else None
    with damaged("a compressed frame cannot be decoded"):
        pixels = imagecodecs.jpeg8_decode(encoded, colorspace=space, outcolorspace=space)
    return Decoded(pixels, stream.bits, is_rgb=not stream.lossless)


def _jpeg_ls(encoded: bytes, header: Header) -> Decoded:
    stream, encoded = _checked(_read_jpeg(encoded), encoded, header)
    with damaged("a compressed frame cannot be decoded"):
        return Decoded(imagecodecs.jpegls_decode(encoded), stream.bits)


def _jpeg_2000(encoded: bytes, header: Header) -> Decoded:
    stream, encoded = _checked(_read_jpeg_2000(encoded), encoded, header)
    with damaged("a compressed frame cannot be decoded"):
        return Decoded(imagecodecs.jpeg2k_decode(encoded, numthreads=1), stream.bits)


# By the last part of the UID of a transfer syntax (PS3.6 A).
_CODECS = {
    "5": _rle,
    **dict.fromkeys("4.50 4.51 4.57 4.70".split(), _jpeg),
    **dict.fromkeys("4.80 4.81".split(), _jpeg_ls),
    **dict.fromkeys("4.90 4.91 4.92 4.93 4.201 4.202 4.203".split(), _jpeg_2000),
}


def _checked(stream: Stream | None, encoded: bytes, header: Header) -> tuple[Stream, bytes]:
    """The header, and the stream to its end marker: some writers leave rubbish after it.

    Refuses a stream that is cut off, or contradicts the file. Compressed data hold no marker
    (ISO 10918-1 B.1.1.5, ISO 15444-1 B.10.1), so the last one found is the end.
    """
    if stream is None:
        raise UnreadableImage("damaged DICOM: a compressed frame is not what it should be")
    has, says = ((x.rows, x.columns, x.samples) for x in (stream, header))
    if has != says:
        raise UnreadableImage(
            f"DICOM whose compressed frame has {has[0]} rows, {has[1]} columns and {has[2]}"
            f" samples, where it says {says[0]}, {says[1]} and {says[2]}"
        )
    end = encoded.rfind(b"\xff\xd9", stream.at)
    if end < 0:  # decoders fill the rest with grey
        raise UnreadableImage("damaged DICOM: a compressed frame is cut off")
    return stream, encoded[: end + 2]


def _read_jpeg(encoded: bytes) -> Stream | None:
    """The frame header of a JPEG or JPEG-LS stream (ISO 10918-1 B.2.2)."""
    at, adobe = 2, False
    while encoded[:2] == b"\xff\xd8" and at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _SOFS and at + 10 <= len(encoded):
            bits, rows, columns, samples = struct.unpack_from(">BHHB", encoded, at + 4)
            return Stream(rows, columns, samples, bits, at, adobe, marker == 0xC3)
        if marker == 0xEE and length >= 14 and encoded[at + 4 : at + 9] == b"Adobe":
            adobe = True
        at += 2 + length
    return None


def _read_jpeg_2000(encoded: bytes) -> Stream | None:
    """The size marker of a JPEG 2000 code stream, also inside boxes (ISO 15444-1 A.5.1)."""
    at = encoded.find(_SIZ, 0, 4096) + len(_SIZ)
    if at < len(_SIZ) or len(encoded) < at + 39:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", encoded, at + 4)
    samples, bits = struct.unpack_from(">HB", encoded, at + 36)
    return Stream(bottom - top, right - left, samples, (bits & 0x7F) + 1, at)
