"""DICOM files, read by pydicom: headers, and samples as they are stored.

Only the tags listed here are parsed. No message quotes a value of the file: messages, warnings and
log lines of pydicom may, so none of them is passed on.
"""

import contextlib
import functools
import io
import logging
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID

from medsiglip_jax.preprocess.dicom import kinds, sniff
from medsiglip_jax.preprocess.dicom.header import Header, Lut
from medsiglip_jax.preprocess.dicom.series import Plane
from medsiglip_jax.preprocess.facts import Subject, UnreadableImage

# Bytes that a deflated data set may inflate to; for a moment it is in memory twice.
MAX_INFLATED = 1 << 28
# Limits on the reads while a file is parsed (one or two per element and item; 500 frames need
# 50,000), and on the bytes and items of a sequence, which is parsed on access. A million empty
# items are 8 MB on disk and 10 kB deflated; parsed, they would take 15 s and 1 GB.
MAX_READS, MAX_SEQUENCE, MAX_ITEMS = 500_000, 1 << 25, 250_000
# Frames that a file may have. A large slide has 200,000 tiles.
MAX_FRAMES = 1 << 20

_KEYWORDS = (
    *("SOPClassUID", "Modality", "BurnedInAnnotation", "PixelPresentation"),
    *("PatientID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept"),
    *("ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *("SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData"),
    *("SegmentedBluePaletteColorLookupTableData", "AlphaPaletteColorLookupTableData"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData"),
    *("ImageType", "SpecimenLabelInImage"),
)
_PLANE_KEYWORDS = (
    *("SOPInstanceUID", "SeriesInstanceUID", "InstanceNumber", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "Rows", "Columns", "BitsAllocated"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("TotalPixelMatrixColumns", "TotalPixelMatrixRows", "DimensionOrganizationType"),
    *("PixelSpacing", "SamplesPerPixel", "BitsStored"),
    *kinds.TAGS,
)
_ITEM = 8  # bytes of the header of an item, which holds a compressed frame
# More than the file meta information ever takes.
_META_BYTES = 1 << 16
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


class File:
    """An open file: its header, and its pixels as stored."""

    def __init__(self, data: bytes):
        """Parses a file.

        Raises:
            UnreadableImage: it is not a DICOM image, or damaged.
        """
        _keep_quiet()
        syntax, start = sniff.transfer_syntax(data)
        if syntax == sniff.DEFLATED:
            data = _inflate(data, start)
        dataset = _parse(io.BytesIO(data), _KEYWORDS)
        self._tags = _Tags(dataset)
        self.syntax = syntax if syntax and syntax != sniff.DEFLATED else _guess(dataset)
        self.nbytes = len(data)
        if not any(self._tags.has(name) for name in _PIXELS):
            raise UnreadableImage("DICOM without pixels, or cut off before them")

    @property
    def frames(self) -> int:
        frames = self._tags.whole("NumberOfFrames", 1)
        if frames < 1:
            raise UnreadableImage("DICOM: NumberOfFrames is less than 1")
        return frames

    @property
    def subject(self) -> Subject:
        """Whose image it is; malformed elements count as missing."""
        names = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
        return Subject(*(self._tags.label(name) for name in names))

    def refusal(self, slide_labels: bool) -> str | None:
        """Why it is not to be read as an image; see `kinds.refusal`."""
        return kinds.refusal(self._tags, slide_labels)

    @property
    def floats(self) -> bool:
        """Whether pixels are floats."""
        return not self._tags.has("PixelData")

    def header(self, frame: int) -> Header:
        """What the pixels of a frame depend on.

        Raises:
            UnreadableImage: an element is missing or malformed.
        """
        tags, allocated = self._tags, self._tags.whole("BitsAllocated")
        stored = allocated if self.floats else tags.whole("BitsStored", allocated)
        per_frame = tags.items("PerFrameFunctionalGroupsSequence")[frame : frame + 1]
        groups = [*per_frame, *tags.items("SharedFunctionalGroupsSequence")[:1]]
        values = tags.nested(groups, "PixelValueTransformationSequence")
        window = tags.nested(groups, "FrameVOILUTSequence")
        lut = tags.items("ModalityLUTSequence")
        signed = not self.floats and tags.whole("PixelRepresentation", 0) == 1
        return Header(
            syntax=self.syntax,
            sop_class=tags.text("SOPClassUID"),
            modality=tags.text("Modality"),
            photometric=tags.text("PhotometricInterpretation"),
            samples=tags.whole("SamplesPerPixel", 1),
            rows=tags.whole("Rows"),
            columns=tags.whole("Columns"),
            frames=self.frames,
            frame=frame,
            allocated=allocated,
            stored=stored,
            high=stored - 1 if self.floats else tags.whole("HighBit", stored - 1),
            signed=signed,
            padding=None if self.floats else _padding(tags, signed, allocated),
            slope=values.number("RescaleSlope"),
            intercept=values.number("RescaleIntercept"),
            modality_lut=lut[0].lut() if lut else None,
            windows=_windows(window),
            function=window.text("VOILUTFunction").upper() or "LINEAR",
            voi_luts=tuple(item.lut() for item in window.items("VOILUTSequence")),
            burned_in=tags.text("BurnedInAnnotation").upper() == "YES",
        )

    def encoded(self, header: Header) -> bytes:
        """The compressed frame."""
        tables: Any = [self._tags.raw(f"ExtendedOffsetTable{name}") for name in ("", "Lengths")]
        with damaged("the compressed frames are cut off, or not where it says"):
            return get_frame(
                self._tags.raw("PixelData"), header.frame, number_of_frames=header.frames,
                extended_offsets=tables if all(tables) else None,
            )  # fmt: skip

    def native(self, header: Header) -> np.ndarray:
        """An uncompressed frame: [H, W] or [H, W, S], all bits of each sample."""
        have = len(self._tags.raw(next(name for name in _PIXELS if self._tags.has(name))) or b"")
        bits = header.frame_bytes * 8 if header.allocated > 1 else header.rows * header.columns
        if have < -(-bits * (header.frame + 1) // 8):
            raise UnreadableImage("DICOM with fewer pixels than it says: cut off")
        with damaged("its pixels are not as it says"):
            decoder = get_decoder(UID(self.syntax))
            options: Any = {"view_only": True, "correct_unused_bits": False}
            if header.photometric == "YBR_PARTIAL_422":  # pydicom knows the same layout as FULL
                options["photometric_interpretation"] = "YBR_FULL_422"
            return decoder.as_array(self._tags.dataset, raw=True, index=header.frame, **options)[0]

    def palette(self, header: Header) -> np.ndarray:
        """The colour of every possible stored value: uint8 or uint16 [2**stored, 3]."""
        values = np.arange(1 << header.stored, dtype=np.uint16 if header.stored > 8 else np.uint8)
        with damaged("its palette cannot be read"):
            return apply_color_lut(values[None], self._tags.dataset)[0, :, :3]


def planes(stream: Any) -> list[Plane]:
    """Where each frame of a file lies, from its header; pixels are not read.

    There are none of files that hold no image, and of labels of slides.

    Args:
        stream: binary, and can seek.

    Raises:
        UnreadableImage: it is not a DICOM file, or damaged.
    """
    with damaged("its header cannot be made sense of"):
        tags, count = header_of(stream)
        if kinds.refusal(tags):
            return []
        of_each = tags.items("PerFrameFunctionalGroupsSequence")
        shared = tags.items("SharedFunctionalGroupsSequence")[:1]
        series, uid = tags.text("SeriesInstanceUID"), tags.text("SOPInstanceUID")
        number = next(iter(tags.vector("InstanceNumber", 1)), None)
        found = []
        for n in range(count):
            groups = [*of_each[n : n + 1], *shared]
            at = tags.nested(groups, "PlanePositionSequence").vector("ImagePositionPatient", 3)
            turned = tags.nested(groups, "PlaneOrientationSequence")
            along = turned.vector("ImageOrientationPatient", 6)
            kind = kinds.of_frame(tags, groups)
            found.append(Plane(series, uid, number, at, along, kind))
        return found


def count_frames(stream: Any) -> int:
    """How many frames a file has, from its header; 1 if it holds no image, and is refused once.

    Arguments and errors are those of `planes`.
    """
    with damaged("its header cannot be made sense of"):
        tags, count = header_of(stream)
        return 1 if kinds.refusal(tags) else count


def is_label(stream: Any) -> bool:
    """Whether a file shows the label of a slide; arguments and errors as of `planes`."""
    _keep_quiet()
    stream.seek(0)
    with damaged("its header cannot be made sense of"):
        tags = _Tags(_parse(stream, kinds.TAGS, stop_before_pixels=True))
        return kinds.refusal(tags) is not None and kinds.refusal(tags, slide_labels=True) is None


@contextlib.contextmanager
def damaged(how: str) -> Iterator[None]:
    """Turns any other error into an `UnreadableImage` that says how the file is damaged.

    Hostile input raises errors of every type, and their messages may quote values.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except Exception:
        raise UnreadableImage(f"damaged DICOM: {how}") from None


def header_of(stream: Any) -> tuple["_Tags", int]:
    """The header, and the number of frames."""
    _keep_quiet()
    stream.seek(0)
    start = stream.read(_META_BYTES)
    syntax, at = sniff.transfer_syntax(start)
    if syntax == sniff.DEFLATED:
        stream = io.BytesIO(_inflate(start + stream.read(), at))
    stream.seek(0)
    tags = _Tags(_parse(stream, _PLANE_KEYWORDS, stop_before_pixels=True))
    pixels = stream.tell()
    return tags, _count(tags, syntax, stream.seek(0, io.SEEK_END) - pixels)


def _count(tags: "_Tags", syntax: str, room: int) -> int:
    """The number of frames, if `room` bytes of pixels can hold the one in the middle.

    A file that is cut off behind it has frames to read. Others are refused here, so that they are
    reported once and not a million times.
    """
    count = max(1, tags.whole("NumberOfFrames", 1))
    if count > MAX_FRAMES:
        raise UnreadableImage(f"DICOM with {count} frames, more than the limit of {MAX_FRAMES}")
    if count == 1:
        return 1
    bits = 8 * _ITEM
    if not sniff.is_compressed(syntax):
        bits = math.prod(tags.whole(name, 0) for name in ("Rows", "Columns", "BitsAllocated"))
    if bits * (count // 2 + 1) > 8 * room:
        raise UnreadableImage(f"DICOM of {count} frames, with bytes for fewer: damaged, or cut off")
    return count


def _parse(stream: Any, names: Sequence[str | int], **options: bool) -> pydicom.Dataset:
    bounded: Any = _Bounded(stream)
    try:
        return pydicom.dcmread(bounded, force=True, specific_tags=list(map(_tag, names)), **options)
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
def _tag(name: str | int) -> Any:
    """The tag of a keyword. Cached: pydicom's lookup would take a tenth of a CT slice's time."""
    return name if isinstance(name, int) else tag_for_keyword(name)


class _Tags:
    """Elements of a data set, checked to have the right type."""

    def __init__(self, dataset: pydicom.Dataset):
        self.dataset = dataset

    def has(self, name: str | int) -> bool:
        return _tag(name) in self.dataset

    def raw(self, name: str | int) -> Any:
        try:
            element = self.dataset.get(_tag(name))
            value = None if element is None else element.value
        except Exception:  # its message quotes the value
            raise UnreadableImage(f"damaged DICOM: {name} is malformed") from None
        return None if value == "" else value

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.raw(name)
        value = default if value is None else value
        if value is None:
            raise UnreadableImage(f"DICOM without {name}")
        try:
            return int(value)
        except (TypeError, ValueError, OverflowError):
            raise UnreadableImage(f"damaged DICOM: {name} is malformed") from None

    def numbers(self, name: str | int) -> list[float]:
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
        return next(iter(self.numbers(name)), None)

    def text(self, name: str) -> str:
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
            values = (
                value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            )
            return tuple(word.strip().upper() for word in values if isinstance(word, str))
        return ()

    def first(self, name: str | int) -> float | None:
        """The first number; None if it is missing or malformed."""
        with contextlib.suppress(UnreadableImage):
            return next(iter(self.numbers(name)), None)
        return None

    def items(self, name: str) -> "list[_Tags]":
        raw = self.dataset.get_item(_tag(name)) if self.has(name) else None
        encoded = getattr(raw, "value", None)
        if isinstance(encoded, bytes):  # not parsed yet
            count = encoded.count(b"\xfe\xff\x00\xe0") + encoded.count(b"\xff\xfe\xe0\x00")
            if len(encoded) > MAX_SEQUENCE or count > MAX_ITEMS:
                raise UnreadableImage(f"DICOM with {name} of more items than the limit")
        value = self.raw(name)
        return [_Tags(item) for item in value] if isinstance(value, pydicom.Sequence) else []

    def nested(self, groups: "Sequence[_Tags]", macro: str) -> "_Tags":
        """Where the elements of a macro are: in a group, in multi-frame files, else in this."""
        return [*(item for group in groups for item in group.items(macro)), self][0]

    def lut(self) -> Lut:
        """The table in an item of a LUT sequence (PS3.3 C.11.1.1, C.11.2.1.1)."""
        descriptor, data = self.numbers("LUTDescriptor"), self.raw("LUTData")
        with damaged("a lookup table is malformed"):
            count, first, bits = map(int, descriptor)
            count = count or 1 << 16
            if isinstance(data, bytes):
                width = 1 if len(data) < 2 * count else 2
                order = "<" if self.dataset.original_encoding[1] in (True, None) else ">"
                values = np.frombuffer(data[: len(data) // width * width], f"{order}u{width}")
            else:
                values = np.atleast_1d(np.array(data, np.int64))
            values = values[:count].astype(np.uint16)
            if not 1 <= bits <= 16 or len(values) < count:
                raise ValueError
            return Lut(first, values, bits)


def _padding(tags: _Tags, signed: bool, allocated: int) -> tuple[int, int] | None:
    """The first and last value of padding, as stored values.

    Some writers (GE) give the bits of a signed value as an unsigned number: 63536 is -2000 in 16
    bits; others the other way round.
    """
    if tags.raw("PixelPaddingValue") is None:
        return None
    value = tags.whole("PixelPaddingValue")
    both, half = (value, tags.whole("PixelPaddingRangeLimit", value)), 1 << max(allocated - 1, 0)
    low = -half if signed else 0
    both = [(x - low) % (2 * half) + low if -half <= x < 2 * half else x for x in both]
    return min(both), max(both)


def _windows(tags: _Tags) -> tuple[tuple[float, float] | None, ...]:
    """Windows; None for those of a width below 1, which is not allowed (PS3.3 C.11.2.1.2)."""
    exact = tags.text("VOILUTFunction").upper() in ("LINEAR_EXACT", "SIGMOID")
    pairs = zip(tags.numbers("WindowCenter"), tags.numbers("WindowWidth"), strict=False)
    return tuple(
        (center, width) if width >= 1 or (exact and width > 0) else None for center, width in pairs
    )


def _guess(dataset: pydicom.Dataset) -> str:
    """The transfer syntax of a file that does not say, from how pydicom managed to read it."""
    implicit, little = dataset.original_encoding
    if implicit:
        return sniff.IMPLICIT
    return sniff.EXPLICIT if little else sniff.BIG_ENDIAN


def _inflate(data: bytes, start: int) -> bytes:
    """The data set of a deflated file, without its file meta information."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    with damaged("its deflated elements cannot be read"):
        inflated = stream.decompress(memoryview(data)[start:], MAX_INFLATED)
    if stream.unconsumed_tail:
        limit = f"more than the limit of {MAX_INFLATED} bytes (a decompression bomb?)"
        raise UnreadableImage(f"DICOM that inflates to {limit}")
    return inflated


_OF_PYDICOM = r"pydicom\."


def _mute(record: logging.LogRecord) -> bool:
    """A filter that lets nothing pass."""
    return False


def _keep_quiet() -> None:
    """Silences warnings and log lines of pydicom, which quote values, in the whole process.

    `warnings.catch_warnings` around each file would not do: it is not thread-safe.
    """
    if not any(getattr(rule[3], "pattern", None) == _OF_PYDICOM for rule in warnings.filters):
        warnings.filterwarnings("ignore", module=_OF_PYDICOM)
    logging.getLogger("pydicom").addFilter(_mute)  # once: it may be there already
