"""A compressed frame -> its samples, by imagecodecs: libjpeg-turbo, CharLS, OpenJPEG and libjxl.

Before anything is decoded, the sizes in the stream are checked against those of the file, since a
stream may claim more. Bits and colours are those of `pydicom.pixel_array` with its plugins
(tests/preprocess/test_dicom.py); libjpeg converts YCbCr to RGB, as for any other JPEG file.
"""

import io
import zlib
from typing import NamedTuple

import imagecodecs
import numpy as np
from PIL import Image

from medsiglip_jax.preprocess.dicom import streams
from medsiglip_jax.preprocess.dicom.file import name_of
from medsiglip_jax.preprocess.dicom.header import Header
from medsiglip_jax.preprocess.dicom.tags import damaged
from medsiglip_jax.preprocess.facts import UnreadableImage

_PREFIX = "1.2.840.10008.1.2."
_CANNOT = "a compressed frame cannot be decoded"
_LOSSLESS = 0xC3  # frame header of JPEG's own lossless process
# Frame headers of processes that libjpeg does not decode (ISO 10918-1 table B.1).
_NOT_DECODED: dict[int, str] = dict.fromkeys((0xC5, 0xC6, 0xC7), "hierarchical JPEG")
_NOT_DECODED |= {0xCB: "lossless JPEG with arithmetic coding"}


class Decoded(NamedTuple):
    """A decoded frame.

    Attributes:
        pixels: [H, W] or [H, W, S] of the codec's dtype.
        bits: how many of the low bits are in use; None where they are laid out as without
            compression.
        is_rgb: whether the codec has converted YCbCr to RGB.
        note: what to tell about it; "" if nothing.
    """

    pixels: np.ndarray
    bits: int | None
    is_rgb: bool = False
    note: str = ""


def check(syntax: str) -> None:
    """Raises UnreadableImage, with the reason, if frames of a transfer syntax are not decoded."""
    if syntax.startswith(_PREFIX) and syntax.removeprefix(_PREFIX) in _CODECS:
        return
    if not (name := name_of(syntax)):
        raise UnreadableImage(
            "DICOM in a transfer syntax that is not decoded here (of a vendor, or unknown)"
        )
    video = any(word in name for word in ("MPEG", "HEVC"))
    advice = ": it is a video, whose frames ffmpeg can extract" if video else ""
    raise UnreadableImage(f"DICOM in the transfer syntax {name}, which is not decoded here{advice}")


def decode(encoded: bytes, header: Header) -> Decoded:
    """Decodes a frame of a transfer syntax that `check` accepts.

    Raises:
        UnreadableImage: the frame is damaged, or contradicts the file.
    """
    decoded = _CODECS[header.syntax.removeprefix(_PREFIX)](encoded, header)
    shape = (header.rows, header.columns, *([header.samples] if header.samples > 1 else []))
    if decoded.pixels.shape != shape:
        raise UnreadableImage(
            f"DICOM whose compressed frame has shape {decoded.pixels.shape}, where it says {shape}"
        )
    return decoded


def decode_by_pil(encoded: bytes, header: Header) -> np.ndarray:
    """Samples of a JPEG 2000 frame as PIL has them: grey of 9 to 16 bits is shifted up to 16."""
    _, encoded = _checked(streams.read_jpeg_2000(encoded), encoded, header)
    with damaged(_CANNOT), Image.open(io.BytesIO(encoded), formats=["JPEG2000"]) as image:
        return np.asarray(image)


def _rle(encoded: bytes, header: Header) -> Decoded:
    """Byte planes, the highest of each sample first (PS3.5 G)."""
    size, samples = max(1, header.allocated // 8), header.samples
    if header.allocated not in (1, 8, 16, 32):
        raise UnreadableImage(f"DICOM with RLE of {header.allocated} bits per sample")
    with damaged(_CANNOT):
        planes = imagecodecs.dicomrle_decode(encoded, np.dtype(f"<u{size}"), out=header.frame_bytes)
    count = int.from_bytes(encoded[:4], "little")
    if len(planes) != header.frame_bytes or count != samples * size:
        raise UnreadableImage("damaged DICOM: a compressed frame is cut off")
    return Decoded(_laid_out(bytes(planes), header, planar=True), None)


def _deflated(encoded: bytes, header: Header) -> Decoded:
    """The bytes of an uncompressed frame, deflated: Deflated Image Frame Compression (PS3.6 A)."""
    with damaged(_CANNOT):
        plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(encoded, header.frame_bytes)
    if len(plain) < header.frame_bytes:
        raise UnreadableImage("damaged DICOM: a compressed frame is cut off")
    return Decoded(_laid_out(plain, header, header.planar), None)


def _laid_out(plain: bytes, header: Header, planar: bool) -> np.ndarray:
    """The bytes of a frame as [H, W] or [H, W, S]; bits are packed from the lowest on."""
    rows, columns, samples = header.rows, header.columns, header.samples
    if header.allocated == 1:
        bits = np.unpackbits(np.frombuffer(plain, np.uint8), bitorder="little")
        return bits[: rows * columns].reshape(rows, columns)
    pixels = np.frombuffer(plain, f"<u{header.allocated // 8}")
    if samples == 1:
        return pixels.reshape(rows, columns)
    if planar:
        return np.moveaxis(pixels.reshape(samples, rows, columns), 0, -1)
    return pixels.reshape(rows, columns, samples)


def _jpeg(encoded: bytes, header: Header) -> Decoded:
    """JPEG, whose own markers say how three components are encoded, if they are there.

    Where they contradict the file, they are right of lossy streams, as for pydicom, dcm4che and PIL
    (dcm4che issue 565); of lossless ones, which nothing converts, the file is, as for dcmtk, GDCM
    and pydicom.
    """
    stream, encoded = _checked(streams.read_jpeg(encoded), encoded, header)
    if (why := _NOT_DECODED.get(stream.process)) is not None:
        raise UnreadableImage(f"DICOM with {why}, which is not decoded here")
    lossless, says = stream.process == _LOSSLESS, "RGB" if header.photometric == "RGB" else "YCbCr"
    space = says if lossless or not stream.space else stream.space
    as_it_is = "RGB" if header.samples == 3 and (lossless or space == "RGB") else None
    with damaged(_CANNOT):
        pixels = imagecodecs.jpeg8_decode(encoded, colorspace=as_it_is, outcolorspace=as_it_is)
    note = ""
    if header.samples == 3 and stream.space not in ("", says):
        note = f"colours taken for {space}: the file says {says}, and its JPEG says {stream.space}"
    return Decoded(pixels, stream.bits, not lossless, note)


def _jpeg_ls(encoded: bytes, header: Header) -> Decoded:
    stream, encoded = _checked(streams.read_jpeg(encoded), encoded, header)
    with damaged(_CANNOT):
        return Decoded(imagecodecs.jpegls_decode(encoded), stream.bits)


def _jpeg_2000(encoded: bytes, header: Header) -> Decoded:
    """JPEG 2000. Where its own transformation of colours contradicts the file, the file is right,
    as for GDCM and pydicom; but OpenJPEG converts YCbCr if boxes around the stream say so."""
    stream, encoded = _checked(streams.read_jpeg_2000(encoded), encoded, header)
    says = "YCbCr" if header.photometric in ("YBR_FULL", "YBR_FULL_422") else "RGB"
    converted = header.samples == 3 and stream.space == "YCbCr"
    with damaged(_CANNOT):
        pixels = imagecodecs.jpeg2k_decode(encoded, numthreads=1)
    note = ""
    if header.samples == 3 and stream.space not in ("", says):
        taken = stream.space if converted else says
        note = f"colours taken for {taken}: the file says {says}, its JPEG 2000 {stream.space}"
    return Decoded(pixels, stream.bits, converted, note)


def _jpeg_xl(encoded: bytes, header: Header) -> Decoded:
    """JPEG XL. Without loss, samples are as the file says; else libjxl makes RGB of its colours.

    A recompressed JPEG (.111) is restored, as the container does, to have the pixels that it had.
    """
    if not imagecodecs.JPEGXL.available:
        raise UnreadableImage("DICOM in JPEG XL, which the imagecodecs installed here lacks")
    size = streams.read_jpeg_xl(encoded)
    if size is None:
        raise UnreadableImage("damaged DICOM: a compressed frame is not what it should be")
    _check_size(streams.Stream(*size, header.samples, 0, 0), header)
    if header.syntax.endswith(".111"):
        try:
            restored = imagecodecs.jpegxl_decode_jpeg(encoded, numthreads=1)
        except Exception:  # it was no JPEG, or a grey one, which libjxl does not restore
            pass
        else:
            return _jpeg(bytes(restored), header)
    with damaged(_CANNOT):
        pixels = imagecodecs.jpegxl_decode(encoded, numthreads=1)
    return Decoded(pixels, 8 * pixels.itemsize, not header.syntax.endswith(".110"))


# By the last part of the UID of a transfer syntax (PS3.6 A).
_CODECS = {
    "5": _rle,
    "8.1": _deflated,
    **dict.fromkeys("4.50 4.51 4.52 4.53 4.54 4.55 4.56 4.57 4.58 4.70".split(), _jpeg),
    **dict.fromkeys("4.80 4.81".split(), _jpeg_ls),
    **dict.fromkeys("4.90 4.91 4.92 4.93 4.201 4.202 4.203".split(), _jpeg_2000),
    **dict.fromkeys("4.110 4.111 4.112".split(), _jpeg_xl),
}


def _checked(
    stream: streams.Stream | None, encoded: bytes, header: Header
) -> tuple[streams.Stream, bytes]:
    """The header, and the stream to its end marker: some writers leave rubbish after it.

    Refuses a stream that is cut off, or contradicts the file. Compressed data hold no marker
    (ISO 10918-1 B.1.1.5, ISO 15444-1 B.10.1), so the last one found is the end.
    """
    if stream is None:
        raise UnreadableImage("damaged DICOM: a compressed frame is not what it should be")
    _check_size(stream, header)
    end = encoded.rfind(b"\xff\xd9", stream.at)
    if end < 0:  # decoders fill the rest with grey
        raise UnreadableImage("damaged DICOM: a compressed frame is cut off")
    return stream, encoded[: end + 2]


def _check_size(stream: streams.Stream, header: Header) -> None:
    has, says = ((x.rows, x.columns, x.samples) for x in (stream, header))
    if has != says:
        raise UnreadableImage(
            f"DICOM whose compressed frame has {has[0]} rows, {has[1]} columns and {has[2]}"
            f" samples, where it says {says[0]}, {says[1]} and {says[2]}"
        )
