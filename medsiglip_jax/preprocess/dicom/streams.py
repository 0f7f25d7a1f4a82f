"""What compressed streams say of themselves before they are decoded: sizes, bits and colours."""

import re
import struct
from typing import NamedTuple

_SOFS = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), 0xF7))
SIZ = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 code stream
# Starts of JPEG XL: a code stream, a file of boxes, and the (first) box with the code stream.
_JXL, _JXL_BOXES = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
_JXL_BOX = re.compile(rb"jxl(c|p[\0\x80]\0\0\0)\xff\x0a")


class Stream(NamedTuple):
    """The header of a JPEG, JPEG-LS or JPEG 2000 stream.

    Attributes:
        rows, columns, samples: of the image.
        bits: per sample.
        at: where this header is; the end of the image comes after it.
        space: "RGB" or "YCbCr" of three samples; "" where the stream does not say.
        process: marker of a JPEG's frame header, which names its process.
    """

    rows: int
    columns: int
    samples: int
    bits: int
    at: int
    space: str = ""
    process: int = 0


def read_jpeg(encoded: bytes) -> Stream | None:
    """The frame header of a JPEG or JPEG-LS stream (ISO 10918-1 B.2.2)."""
    at, jfif, adobe = 2, False, None
    while encoded[:2] == b"\xff\xd8" and at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        segment = encoded[at + 4 : at + 2 + length]
        if marker in _SOFS and len(segment) >= 6:
            bits, rows, columns, samples = struct.unpack_from(">BHHB", segment)
            space = _space(jfif, adobe, segment[6:])
            return Stream(rows, columns, samples, bits, at, space, marker)
        jfif |= marker == 0xE0 and segment[:5] == b"JFIF\0"
        if marker == 0xEE and segment[:5] == b"Adobe" and len(segment) >= 12:
            adobe = segment[11]
        at += 2 + length
    return None


def _space(jfif: bool, adobe: int | None, components: bytes) -> str:
    """How three components are encoded, by libjpeg's rules, and by subsampling, which nobody does
    to RGB; "" if nothing says it.

    Args:
        jfif: whether there is JFIF's marker, which only YCbCr may have.
        adobe: the transform in Adobe's marker; None without one.
        components: 3 bytes for each: its name, its sampling, its table.
    """
    if jfif or adobe:
        return "YCbCr"
    if adobe == 0 or components[::3] == b"RGB":
        return "RGB"
    return "YCbCr" if len(set(components[1::3])) > 1 else ""


def read_jpeg_2000(encoded: bytes) -> Stream | None:
    """The size marker of a JPEG 2000 code stream, also inside boxes (ISO 15444-1 A.5.1, I.5.3)."""
    at = encoded.find(SIZ, 0, 4096) + len(SIZ)
    if at < len(SIZ) or len(encoded) < at + 39:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", encoded, at + 4)
    samples, bits = struct.unpack_from(">HB", encoded, at + 36)
    space = "RGB" if _is_transformed(encoded, at) else ""
    if b"colr\x01\0\0\0\0\0\x12" in encoded[:at]:  # sYCC
        space = "YCbCr"
    return Stream(bottom - top, right - left, samples, (bits & 0x7F) + 1, at, space)


def _is_transformed(encoded: bytes, at: int) -> bool:
    """Whether colours are transformed as if from RGB, by the marker COD (ISO 15444-1 A.6.1).

    Args:
        encoded: a JPEG 2000 stream.
        at: the length of its first marker segment.
    """
    while len(encoded) >= at + 2:
        at += int.from_bytes(encoded[at : at + 2], "big") + 2
        marker = encoded[at - 2 : at]
        if marker == b"\xff\x52":
            return encoded[at + 6 : at + 7] == b"\x01"
        if marker[:1] != b"\xff" or marker == b"\xff\x90":  # the first tile
            break
    return False


def read_jpeg_xl(encoded: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG XL stream, also inside boxes (ISO 18181-1, SizeHeader)."""
    boxed = _JXL_BOX.search(encoded) if encoded.startswith(_JXL_BOXES) else None
    if not (boxed or encoded.startswith(_JXL)):
        return None
    at = boxed.end() - len(_JXL) if boxed else 0
    left = int.from_bytes(encoded[at + 2 : at + 16].ljust(14, b"\0"), "little")

    def take(count: int) -> int:
        nonlocal left
        value, left = left & ((1 << count) - 1), left >> count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    rows, ratio = side(), take(3)
    if ratio == 0:
        return rows, side()
    over, under = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return rows, rows * over // under
