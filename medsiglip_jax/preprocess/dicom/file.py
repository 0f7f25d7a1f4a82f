"""DICOM files, read by pydicom: headers, and samples as they are stored.

Only the elements listed here are parsed.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID

from medsiglip_jax.preprocess.dicom import kinds, sniff
from medsiglip_jax.preprocess.dicom.header import Header, Lut
from medsiglip_jax.preprocess.dicom.tags import (
    OVERLAY_BITS,
    Tags,
    damaged,
    inflate,
    parse,
    tag_of,
)
from medsiglip_jax.preprocess.facts import Subject, UnreadableImage

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
    *("SpecimenLabelInImage", *OVERLAY_BITS),
)
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_NO_PALETTE = "its palette cannot be read"
_COLOURS = ("Red", "Green", "Blue")
_DESCRIPTOR = "RedPaletteColorLookupTableDescriptor"
# Where a multi-frame file says what kind of image a frame is.
_FRAME_TYPES = ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence")


class File:
    """An open file: its header, and its pixels as stored."""

    def __init__(self, data: bytes):
        """Parses a file.

        Raises:
            UnreadableImage: it is not a DICOM image, or damaged.
        """
        syntax, start = sniff.transfer_syntax(data)
        if syntax == sniff.DEFLATED:
            data = inflate(data, start)
        with _explained(data, syntax):
            self._tags = parse(io.BytesIO(data), _KEYWORDS)
        guessed = not syntax or syntax == sniff.DEFLATED
        self.syntax = _guess(self._tags.dataset) if guessed else syntax
        self.nbytes = len(data)
        if not any(self._tags.has(name) for name in _PIXELS):
            if "JPIP" in name_of(self.syntax):
                raise UnreadableImage(
                    "DICOM whose pixels are on a server (JPIP), and not in the file"
                )
            raise UnreadableImage("DICOM without pixels, or cut off before them")

    @property
    def frames(self) -> int:
        """The number of frames; 1 if the file does not say."""
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
        element = self._tags.dataset[tag_of(name)]
        if element.is_undefined_length:  # its items would be taken for pixels
            raise UnreadableImage(
                "DICOM whose transfer syntax says no compression, and whose pixels are laid out as"
                " only compressed ones are (of undefined length): one of the two is wrong"
            )
        three_samples = header.frame_bytes * header.frames * 3 // 2
        if header.photometric == "YBR_FULL_422" and have >= three_samples:
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

    def _colours_from(self, kind: Tags, signed: bool, notes: list[str]) -> int | None:
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
        dataset.pop(tag_of("PixelPresentation"), None)  # else pydicom refuses: it has no grey part
        return apply_color_lut(np.arange(first, first + count)[None], dataset)[0, :, :3]


def name_of(syntax: str) -> str:
    """The name of a transfer syntax of the standard; "" of any other UID, which is not shown."""
    uid = UID(syntax)
    return "" if uid.is_private or uid.name == syntax else uid.name


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


def _padding(tags: Tags, signed: bool, allocated: int) -> tuple[int, int] | None:
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


def _windows(tags: Tags) -> tuple[tuple[float, float] | None, ...]:
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
