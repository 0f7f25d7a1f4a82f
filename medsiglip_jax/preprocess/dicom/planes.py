"""What the header of a DICOM file says of its frames: how many there are, and where each lies."""

import io
import math
from typing import Any

from medsiglip_jax.preprocess.dicom import kinds, sniff
from medsiglip_jax.preprocess.dicom.series import Plane
from medsiglip_jax.preprocess.dicom.tags import Tags, damaged, inflate, parse
from medsiglip_jax.preprocess.facts import UnreadableImage

# Frames that a file may have. A large slide has 200,000 tiles.
MAX_FRAMES = 1 << 20

_KEYWORDS = (
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
_NO_SENSE = "its header cannot be made sense of"


def planes(stream: Any) -> list[Plane]:
    """Where each frame of a file lies, from its header; pixels are not read.

    There are none of files that hold no image, and of labels of slides.

    Args:
        stream: binary, and can seek.

    Raises:
        UnreadableImage: it is not a DICOM file, or damaged.
    """
    with damaged(_NO_SENSE):
        tags, count = header_of(stream)
        if kinds.refusal(tags):
            return []
        of_each = tags.items("PerFrameFunctionalGroupsSequence")
        shared = tags.items("SharedFunctionalGroupsSequence")[:1]
        series, uid = tags.text("SeriesInstanceUID"), tags.text("SOPInstanceUID")
        number = next(iter(tags.vector("InstanceNumber", 1)), None)
        frames = []
        for n in range(count):
            groups = [*of_each[n : n + 1], *shared]
            at = tags.nested(groups, "PlanePositionSequence").vector("ImagePositionPatient", 3)
            turned = tags.nested(groups, "PlaneOrientationSequence")
            along = turned.vector("ImageOrientationPatient", 6)
            kind = kinds.of_frame(tags, groups)
            frames.append(Plane(series, uid, number, at, along, kind))
        return frames


def count_frames(stream: Any) -> int:
    """How many frames a file has, from its header; 1 if it holds no image, and is refused once.

    Arguments and errors are those of `planes`.
    """
    with damaged(_NO_SENSE):
        tags, count = header_of(stream)
        return 1 if kinds.refusal(tags) else count


def is_label(stream: Any) -> bool:
    """Whether a file shows the label of a slide; arguments and errors as of `planes`."""
    stream.seek(0)
    with damaged(_NO_SENSE):
        tags = parse(stream, kinds.TAGS, stop_before_pixels=True)
        return kinds.refusal(tags) is not None and kinds.refusal(tags, slide_labels=True) is None


def header_of(stream: Any) -> tuple[Tags, int]:
    """The header, and the number of frames.

    Args:
        stream: binary, and can seek.

    Raises:
        UnreadableImage: it is not a DICOM file, damaged, or has more than `MAX_FRAMES` frames.
    """
    stream.seek(0)
    start = stream.read(_META_BYTES)
    syntax, at = sniff.transfer_syntax(start)
    if syntax == sniff.DEFLATED:
        stream = io.BytesIO(inflate(start + stream.read(), at))
    stream.seek(0)
    tags = parse(stream, _KEYWORDS, stop_before_pixels=True)
    pixels = stream.tell()
    return tags, _count(tags, syntax, stream.seek(0, io.SEEK_END) - pixels)


def _count(tags: Tags, syntax: str, room: int) -> int:
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
