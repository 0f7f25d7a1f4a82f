"""The directories of a TIFF file, and which of them are pages (TIFF 6.0, section 2; BigTIFF)."""

import io
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

_SUBFILE, _WIDTH, _HEIGHT = 254, 256, 257  # tags
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_INTEGERS = {3: "H", 4: "I"}  # SHORT and LONG
_MOST_TAGS = 1 << 16  # of a directory; there are no more in an ordinary TIFF


class Directory(NamedTuple):
    """What a TIFF says of an image; 0 where it does not say.

    Attributes:
        subfile: the bits of NewSubfileType.
        size: number of pixels.
    """

    subfile: int
    size: int


def pages(stream: Any) -> Sequence[int]:
    """Numbers of the directories that are pages, from 0; [0] if none says so.

    Only what is smaller than another image can be a reduced version of it, whatever it says.

    Args:
        stream: of a TIFF or BigTIFF, binary, and can seek.
    """
    entries = list(directories(stream))
    largest = max((d.size for d in entries if not d.subfile & _REDUCED), default=0)
    numbers = [
        number
        for number, (subfile, size) in enumerate(entries)
        if not subfile & _MASK and not (subfile & _REDUCED and size < largest)
    ]
    return numbers or [0]


def directories(stream: Any) -> Iterator[Directory]:
    """The directories of a TIFF that are whole: the first page is readable without those after it,
    of which PIL would complain (TIFF 6.0, section 2; BigTIFF)."""
    stream.seek(0)
    start = stream.read(16)
    left, order = stream.seek(0, io.SEEK_END), "<" if start[:2] == b"II" else ">"
    is_big = struct.unpack(f"{order}H", start[2:4])[0] == 43
    number, entry, count = ("Q", "HHQ8s", "Q") if is_big else ("I", "HHI4s", "H")
    (at,) = struct.unpack_from(order + number, start, 8 if is_big else 4)
    seen: set[int] = set()
    while at and at not in seen and left > 0:  # directories that share bytes would never end
        stream.seek(at)
        (length,) = _unpacked(stream, order + count) or (0,)
        entries = stream.read(min(length, _MOST_TAGS) * struct.calcsize(order + entry))
        left -= len(entries)
        if (after := _unpacked(stream, order + number)) is None:
            return
        seen.add(at)
        yield _directory(struct.iter_unpack(order + entry, entries), order)
        (at,) = after


def _unpacked(stream: Any, form: str) -> tuple[int, ...] | None:
    """Numbers of a stream; None where it ends."""
    data = stream.read(struct.calcsize(form))
    return struct.unpack(form, data) if len(data) == struct.calcsize(form) else None


def _directory(entries: Iterator[tuple[int, int, int, bytes]], order: str) -> Directory:
    values = {
        tag: struct.unpack_from(order + _INTEGERS[kind], value)[0]
        for tag, kind, _, value in entries
        if tag in (_SUBFILE, _WIDTH, _HEIGHT) and kind in _INTEGERS
    }
    return Directory(values.get(_SUBFILE, 0), values.get(_WIDTH, 0) * values.get(_HEIGHT, 0))
