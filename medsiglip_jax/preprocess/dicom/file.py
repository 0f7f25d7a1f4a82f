"""DICOM files, read by pydicom: headers, and samples as they are stored.

Only the tags listed here are parsed. No message quotes a value of the file: messages, warnings and
log lines of pydicom may, so none of them is passed on.
"""

import contextlib
import functools
import io
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.tag import Tag
from pydicom.uid import UID

from medsiglip_jax.preprocess.dicom import kinds, sniff
from medsiglip_jax.preprocess.dicom.header import Header, Lut
from medsiglip_jax.preprocess.dicom.series import Plane
from medsiglip_jax.preprocess.facts import NO_MEMORY, Subject, UnreadableImage, mute

# Bytes that a deflated data set may inflate to; for a moment it is in memory twice.
MAX_INFLATED = 1 << 28
# Limits on the reads while a file is parsed (one or two per element and item; 500 frames need
# 50,000), and on the bytes and items of a sequence, which is parsed on access. A million empty
# items are 8 MB on disk and 10 kB deflated; parsed, they would take 15 s and 1 GB.
MAX_READS, MAX_SEQUENCE, MAX_ITEMS = 500_000, 1 << 25, 250_000
# Frames that a file may have. A large slide has 200,000 tiles.
MAX_FRAMES = 1 << 20

_KEYWORDS = (
    *("SOPClassUID", "Modality", "ImageType", "BurnedInAnnotation", "PixelPresentation"),
    *("PatientID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
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
_NO_PALETTE = "its palette cannot be read"
_COLOURS = ("Red", "Green", "Blue")
_DESCRIPTOR = "RedPaletteColorLookupTableDescriptor"
# Overlay Bit Position of the 16 groups of overlays; more than 0 where they are in Pixel Data.
_OVERLAY_BITS = frozenset(Tag(0x6000 + 2 * n, 0x0102) for n in range(16))
# Where a multi-frame file says what kind of image a frame is.
_FRAME_TYPES = ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence")


class File:
    """An open file: its header, and its pixels as stored."""

    def __init__(self, data: bytes):
        """Parses a file.

        Raises:
            UnreadableImage: it is not a DICOM image, or damaged.
        """
        mute("pydicom")
        syntax, start = sniff.transfer_syntax(data)
        if syntax == sniff.DEFLATED:
            data = _inflate(data, start)
        with _explained(data, syntax):
            dataset = _parse(io.BytesIO(data), _KEYWORDS, _OVERLAY_BITS)
        self._tags = _Tags(dataset)
        self.syntax = syntax if syntax and syntax != sniff.DEFLATED else _guess(dataset)
        self.nbytes = len(data)
        if not any(self._tags.has(name) for name in _PIXELS):
            if "JPIP" in name_of(self.syntax):
                raise UnreadableImage(
                    "DICOM whose pixels are on a server (JPIP), and not in the file"
                )
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
        kind = tags.nested(groups, *_FRAME_TYPES)
        signed = not self.floats and tags.whole("PixelRepresentation", 0) == 1
        notes: list[str] = []
        lut = tags.tables("ModalityLUTSequence", notes)
        tables = window.tables("VOILUTSequence", notes)
        units = lut[0].label("ModalityLUTType") if lut else values.label("RescaleType")
        samples = tags.whole("SamplesPerPixel", 1)
        return Header(
            syntax=self.syntax,
            sop_class=tags.text("SOPClassUID"),
            modality=tags.text("Modality"),
            image_type=kind.words("FrameType") or tags.words("ImageType"),
            photometric=tags.text("PhotometricInterpretation"),
            samples=samples,
            planar=samples > 1 and tags.whole("PlanarConfiguration", 0) == 1,
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
            modality_lut=lut[0].lut(signed) if lut else None,
            units=units.upper(),
            colours_from=self._colours_from(kind, signed, notes),
            overlays=tags.has_overlays,
            windows=_windows(window),
            function=window.text("VOILUTFunction").upper() or "LINEAR",
            voi_luts=tuple(item.lut(signed) for item in tables),
            burned_in=tags.text("BurnedInAnnotation").upper() == "YES",
            notes=tuple(notes),
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
        name = next(name for name in _PIXELS if self._tags.has(name))
        have = len(self._tags.raw(name) or b"")
        if self._tags.dataset[
            _tag(name)
        ].is_undefined_length:  # its items would be taken for pixels
            raise UnreadableImage(
                "DICOM whose transfer syntax says no compression, and whose pixels are laid out as"
                " only compressed ones are (of undefined length): one of the two is wrong"
            )
        if (
            header.photometric == "YBR_FULL_422"
            and have >= header.frame_bytes * header.frames * 3 // 2
        ):
            raise UnreadableImage(
                "DICOM that says YBR_FULL_422, and holds three samples of every pixel: they may be"
                " YBR_FULL or RGB"
            )
        bits = header.frame_bytes * 8 if header.allocated > 1 else header.rows * header.columns
        if have < -(-bits * (header.frame + 1) // 8):
            raise UnreadableImage("DICOM with fewer pixels than it says: cut off")
        with damaged("its pixels are not as it says"):
            decoder = get_decoder(UID(self.syntax))
            options: Any = {"view_only": True, "correct_unused_bits": False}
            if header.photometric == "YBR_PARTIAL_422":  # pydicom knows the same layout as FULL
                options["photometric_interpretation"] = "YBR_FULL_422"
            return decoder.as_array(self._tags.dataset, raw=True, index=header.frame, **options)[0]

    def _colours_from(self, kind: "_Tags", signed: bool, notes: list[str]) -> int | None:
        """The first stored value that a supplemental palette colours (PS3.3 C.8.16.2.1.1)."""
        tags = self._tags
        if not tags.text("PhotometricInterpretation").startswith("MONOCHROME"):
            return None
        shown = kind.label("PixelPresentation") or tags.label("PixelPresentation")
        wanted, there = shown in ("COLOR", "MIXED"), tags.has(_DESCRIPTOR)
        if wanted and there:
            with damaged(_NO_PALETTE):
                return tags.table_size(_DESCRIPTOR, signed)[1]
        if wanted:
            notes.append("to be shown in colour, but without a palette")
        elif shown.startswith("COLOR"):
            notes.append("to be shown in colours that are not supported, so it is grey")
        elif there:
            notes.append("a palette that the file does not apply, so it is not used")
        return None

    def palette(self, header: Header) -> Lut:
        """The colours of stored values."""
        with damaged(_NO_PALETTE):
            count, first, bits = self._tags.table_size(_DESCRIPTOR, header.signed)
            columns = [self._tags.raw(f"{c}PaletteColorLookupTableData") for c in _COLOURS]
            if any(column is None for column in columns):
                colours = self._segmented(count, first, bits)
            else:
                colours = np.stack([self._tags.entries(x, count) for x in columns], -1)
            if len(colours) < count or not 1 <= bits <= 16:
                raise ValueError
            return Lut(first, colours.astype(np.uint16), 8 * colours.itemsize)

    def _segmented(self, count: int, first: int, bits: int) -> np.ndarray:
        """Expanded by pydicom, which takes numbers of entries of 8 bits modulo 256."""
        if bits <= 8 and count > 256:
            raise UnreadableImage("DICOM with a segmented palette of more than 256 8-bit entries")
        dataset = self._tags.dataset.copy()
        dataset.pop(_tag("PixelPresentation"), None)  # else pydicom refuses: it has no grey part
        return apply_color_lut(np.arange(first, first + count)[None], dataset)[0, :, :3]


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


def name_of(syntax: str) -> str:
    """The name of a transfer syntax of the standard; "" of any other UID, which is not shown."""
    uid = UID(syntax)
    return "" if uid.is_private or uid.name == syntax else uid.name


def count_frames(stream: Any) -> int:
    """How many frames a file has, from its header; 1 if it holds no image, and is refused once.

    Arguments and errors are those of `planes`.
    """
    with damaged("its header cannot be made sense of"):
        tags, count = header_of(stream)
        return 1 if kinds.refusal(tags) else count


def is_label(stream: Any) -> bool:
    """Whether a file shows the label of a slide; arguments and errors as of `planes`."""
    mute("pydicom")
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
    except MemoryError:
        raise UnreadableImage(NO_MEMORY) from None
    except Exception:
        raise UnreadableImage(f"damaged DICOM: {how}") from None


def header_of(stream: Any) -> tuple["_Tags", int]:
    """The header, and the number of frames."""
    mute("pydicom")
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


def _parse(
    stream: Any, names: Sequence[str | int], others: Iterable[Any] = (), **options: bool
) -> pydicom.Dataset:
    bounded: Any = _Bounded(stream)
    tags: Any = [*map(_tag, names), *others]
    try:
        return pydicom.dcmread(bounded, force=True, specific_tags=tags, **options)
    except MemoryError:
        raise UnreadableImage(NO_MEMORY) from None
    except Exception:  # pydicom raises nearly every type there is, with values in the message
        too_many = "DICOM with more elements than the limit (damaged, or a bomb?)"
        unreadable = "damaged DICOM: its elements cannot be read"
        raise UnreadableImage(unreadable if bounded.left >= 0 else too_many) from None


@contextlib.contextmanager
def _explained(data: bytes, syntax: str) -> Iterator[None]:
    """Says what pydicom 3.0 cannot read: it takes the items of such an element for big endian,
    and they are little endian (PS3.5 6.2.2)."""
    try:
        yield
    except UnreadableImage:
        if syntax == sniff.BIG_ENDIAN and b"UN\0\0\xff\xff\xff\xff" in data:
            raise UnreadableImage(
                "DICOM in big endian with an element of unknown type and undefined length, which"
                " pydicom does not read; dcmconv +te of dcmtk makes a file that it does"
            ) from None
        raise


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

    @property
    def has_overlays(self) -> bool:
        """Whether overlays are in the bits of pixels."""
        found = map(self.dataset.get_item, self.dataset.keys() & _OVERLAY_BITS)
        return any(any(x.value or b"") for x in found if isinstance(x, RawDataElement))

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

    def tables(self, name: str, notes: list[str]) -> "list[_Tags]":
        """The items of a LUT sequence that hold a table; some files have empty ones."""
        items = self.items(name)
        filled = [x for x in items if x.raw("LUTDescriptor") and x.raw("LUTData") is not None]
        if len(filled) < len(items):
            notes.append(f"an item of {name} that holds no table is left out")
        return filled

    def nested(self, groups: "Sequence[_Tags]", *macros: str) -> "_Tags":
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
