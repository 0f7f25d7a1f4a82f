"""The elements of a DICOM data set, read by pydicom within limits and checked to have their types.

No message quotes a value of the file: messages, warnings and log lines of pydicom may, so none of
them is passed on.
"""

import contextlib
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from medsiglip_jax.preprocess.dicom.header import Lut
from medsiglip_jax.preprocess.facts import NO_MEMORY, UnreadableImage, mute

# Bytes that a deflated data set may inflate to; for a moment it is in memory twice.
MAX_INFLATED = 1 << 28
# Limits on the reads while a file is parsed (one or two per element and item; 500 frames need
# 50,000), and on the bytes and items of a sequence, which is parsed on access. A million empty
# items are 8 MB on disk and 10 kB deflated; parsed, they would take 15 s and 1 GB.
MAX_READS, MAX_SEQUENCE, MAX_ITEMS = 500_000, 1 << 25, 250_000
# Overlay Bit Position of the 16 groups of overlays; more than 0 where they are in Pixel Data.
OVERLAY_BITS = frozenset(Tag(0x6000 + 2 * n, 0x0102) for n in range(16))


@contextlib.contextmanager
def damaged(problem: str) -> Iterator[None]:
    """Turns any other error into an `UnreadableImage` that says how the file is damaged.

    Hostile input raises errors of every type, and their messages may quote values.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except MemoryError:
        raise UnreadableImage(NO_MEMORY) from None
    except Exception:
        raise UnreadableImage(f"damaged DICOM: {problem}") from None


def parse(stream: Any, names: Sequence[str | int], **options: bool) -> "Tags":
    """Parses a file, and keeps these of its elements.

    Args:
        stream: binary, and can seek.
        names: keywords, or tags as numbers.
        options: of `pydicom.dcmread`.

    Raises:
        UnreadableImage: it is damaged, or has more elements than the limit.
    """
    mute("pydicom")
    bounded: Any = _Bounded(stream)
    tags: Any = [*map(tag_of, names)]
    try:
        return Tags(pydicom.dcmread(bounded, force=True, specific_tags=tags, **options))
    except MemoryError:
        raise UnreadableImage(NO_MEMORY) from None
    except Exception:  # pydicom raises nearly every type there is, with values in the message
        too_many = "DICOM with more elements than the limit (damaged, or a bomb?)"
        unreadable = "damaged DICOM: its elements cannot be read"
        raise UnreadableImage(unreadable if bounded.left >= 0 else too_many) from None


class _Bounded:
    """A stream that can be read `MAX_READS` times, which ends the parsing of too many elements."""

    def __init__(self, stream: Any):
        self._read, self.left = stream.read, MAX_READS
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError("read too often")
        return self._read(size)


@functools.cache
def tag_of(name: str | int) -> Any:
    """The tag of a keyword. Cached: pydicom's lookup would take a tenth of a CT slice's time."""
    return name if isinstance(name, int) else tag_for_keyword(name)


class Tags:
    """Elements of a data set, checked to have the right type.

    Names are keywords, or tags as numbers. Methods raise UnreadableImage, without the value, for an
    element that is malformed, unless they say what they return then.
    """

    def __init__(self, dataset: pydicom.Dataset):
        self.dataset = dataset

    def has(self, name: str | int) -> bool:
        """Whether there is such an element."""
        return tag_of(name) in self.dataset

    @property
    def has_overlays(self) -> bool:
        """Whether overlays are in the bits of pixels."""
        elements = map(self.dataset.get_item, self.dataset.keys() & OVERLAY_BITS)
        return any(any(x.value or b"") for x in elements if isinstance(x, RawDataElement))

    def raw(self, name: str | int) -> Any:
        """The value as pydicom has it; None if it is missing or empty."""
        try:
            element = self.dataset.get(tag_of(name))
            value = None if element is None else element.value
        except Exception:  # its message quotes the value
            raise UnreadableImage(f"damaged DICOM: {name} is malformed") from None
        return None if value == "" else value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number; UnreadableImage if it is missing and there is no default."""
        value = self.raw(name)
        value = default if value is None else value
        if value is None:
            raise UnreadableImage(f"DICOM without {name}")
        try:
            return int(value)
        except (TypeError, ValueError, OverflowError):
            raise UnreadableImage(f"damaged DICOM: {name} is malformed") from None

    def numbers(self, name: str | int) -> list[float]:
        """Finite numbers; [] if they are missing."""
        value = self.raw(name)
        if value is None:
            return []
        try:
            values = [float(x) for x in np.atleast_1d(np.array(value, np.float64))]
        except (TypeError, ValueError):
            raise UnreadableImage(f"damaged DICOM: {name} is malformed") from None
        if not np.isfinite(values).all():
            raise UnreadableImage(f"damaged DICOM: {name} is not finite")
        return values

    def vector(self, name: str, size: int) -> tuple[float, ...]:
        """Exactly `size` numbers; () if they are missing or malformed."""
        with contextlib.suppress(UnreadableImage):
            if len(values := self.numbers(name)) == size:
                return tuple(values)
        return ()

    def number(self, name: str) -> float | None:
        """The first number; None if it is missing."""
        return next(iter(self.numbers(name)), None)

    def text(self, name: str) -> str:
        """A text without blanks around it; "" if it is missing."""
        value = self.raw(name)
        return str(value).strip() if isinstance(value, str) else ""

    def label(self, name: str) -> str:
        """A text; "" if it is malformed."""
        with contextlib.suppress(UnreadableImage):
            return self.text(name)
        return ""

    def words(self, name: str) -> tuple[str, ...]:
        """Code strings, in upper case; () if they are malformed."""
        with contextlib.suppress(UnreadableImage):
            value = self.raw(name)
            several = isinstance(value, Sequence) and not isinstance(value, str)
            values = value if several else [value]
            return tuple(word.strip().upper() for word in values if isinstance(word, str))
        return ()

    def first(self, name: str | int) -> float | None:
        """The first number; None if it is missing or malformed."""
        with contextlib.suppress(UnreadableImage):
            return next(iter(self.numbers(name)), None)
        return None

    def items(self, name: str) -> "list[Tags]":
        """The items of a sequence; [] if it is missing."""
        raw = self.dataset.get_item(tag_of(name)) if self.has(name) else None
        encoded = getattr(raw, "value", None)
        if isinstance(encoded, bytes):  # not parsed yet
            count = encoded.count(b"\xfe\xff\x00\xe0") + encoded.count(b"\xff\xfe\xe0\x00")
            if len(encoded) > MAX_SEQUENCE or count > MAX_ITEMS:
                raise UnreadableImage(f"DICOM with {name} of more items than the limit")
        value = self.raw(name)
        return [Tags(item) for item in value] if isinstance(value, pydicom.Sequence) else []

    def tables(self, name: str, notes: list[str]) -> "list[Tags]":
        """The items of a LUT sequence that hold a table; some files have empty ones."""
        items = self.items(name)
        filled = [x for x in items if x.raw("LUTDescriptor") and x.raw("LUTData") is not None]
        if len(filled) < len(items):
            notes.append(f"an item of {name} that holds no table is left out")
        return filled

    def nested(self, groups: "Sequence[Tags]", *macros: str) -> "Tags":
        """Where the elements of a macro are: in a group, in multi-frame files, else in this."""
        items = (item for name in macros for group in groups for item in group.items(name))
        return next((item for item in items if len(item.dataset)), self)

    def table_size(self, name: str, signed: bool) -> tuple[int, int, int]:
        """Number of entries, first value mapped, and bits, from the descriptor of a table.

        Some writers give the bits of a negative first value as an unsigned number.
        """
        count, first, bits = map(int, self.numbers(name))
        return count or 1 << 16, first - (1 << 16) * (signed and first >= 1 << 15), bits

    def entries(self, data: Any, count: int) -> np.ndarray:
        """The first `count` entries of a table: uint8, or uint16; they may be fewer.

        Entries of 8 bits are packed in words, the first in the low byte (PS3.3 C.7.6.3.1.6).
        """
        if not isinstance(data, bytes):
            return np.atleast_1d(np.array(data, np.int64))[:count].astype(np.uint16)
        order = "<" if self.dataset.original_encoding[1] in (True, None) else ">"
        words = np.frombuffer(data + bytes(len(data) % 2), f"{order}u2").astype("<u2")
        return (words if len(words) >= count else words.view(np.uint8))[:count]

    def lut(self, signed: bool) -> Lut:
        """The table in an item of a LUT sequence (PS3.3 C.11.1.1, C.11.2.1.1)."""
        with damaged("a lookup table is malformed"):
            count, first, bits = self.table_size("LUTDescriptor", signed)
            values = self.entries(self.raw("LUTData"), count).astype(np.uint16)
            if not 1 <= bits <= 16 or len(values) < count:
                raise ValueError
            return Lut(first, values, bits)


def inflate(data: bytes, start: int) -> bytes:
    """The data set of a deflated file, without its file meta information.

    Args:
        data: the file.
        start: where the data set begins, in bytes.

    Raises:
        UnreadableImage: it is damaged, or larger than `MAX_INFLATED`.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    with damaged("its deflated elements cannot be read"):
        inflated = stream.decompress(memoryview(data)[start:], MAX_INFLATED)
    if stream.unconsumed_tail:
        limit = f"more than the limit of {MAX_INFLATED} bytes (a decompression bomb?)"
        raise UnreadableImage(f"DICOM that inflates to {limit}")
    return inflated
