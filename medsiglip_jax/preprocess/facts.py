"""What is known of an image beside its pixels, and the error of one that cannot be used."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from medsiglip_jax.files.credentials import without

# 2 x PIL's default MAX_IMAGE_PIXELS, where PIL goes from a warning to an error: 537 MB of RGB.
MAX_PIXELS = 2 * 89_478_485
# The longest side that JPEG has. Within MAX_PIXELS alone one row of 178,956,970 pixels, a PNG of
# 174 kB, would be padded to a square, or resized through rows of that length: 23 GB.
MAX_SIDE = 65_500
# The longest text that is tokenized. The model reads 64 tokens, which end long before; a text of
# 200 MB would take gigabytes.
MAX_CHARACTERS = 1 << 20
# Why an image is not read where it is the machine that has too little.
NO_MEMORY = "reading it takes more memory than there is"

# What is said, after their number, of images that `Facts.dark` is true of.
DARK = (
    "images of 16 bits come out dark: their values use 14 bits or fewer, and the files do not say "
    "so. --grey16 stretch (Rules(grey16='stretch')) brightens grey images, --grey16 full takes "
    "them as they are without this warning; scale colours to 8 bits"
)


class UnreadableImage(ValueError):
    """This one image cannot be used; the message is one line, with the source and the reason.

    Attributes:
        reason: why.
        source: which image it is, as it is named to people; "" where the caller knows it.
    """

    def __init__(self, reason: str, source: str = ""):
        super().__init__(f"{source}: {reason}" if source else reason)
        self.reason, self.source = reason, source

    def __reduce__(self) -> tuple[Any, ...]:  # it comes from other processes, too
        return type(self), (self.reason, self.source)

    def of(self, source: str) -> "UnreadableImage":
        """The same error with the name of its image."""
        return type(self)(self.reason, source)


def check_size(
    width: int, height: int, max_pixels: int = MAX_PIXELS, max_side: int = MAX_SIDE
) -> None:
    """Refuses an image without pixels, or with too many, which costs nothing before it is decoded.

    Raises:
        UnreadableImage: a side is 0 or longer than `max_side`, or there are more than `max_pixels`
            pixels.
    """
    if width < 1 or height < 1:
        raise UnreadableImage(f"no pixels, {width}x{height}")
    if max(width, height) > max_side:
        raise UnreadableImage(
            f"{width}x{height}: a side is longer than the limit of {max_side} pixels (--max-side); "
            "pass tiles"
        )
    if width * height > max_pixels:
        raise UnreadableImage(
            f"{width}x{height} = {width * height} pixels is more than the limit of {max_pixels} "
            "(a decompression bomb or a whole slide); pass a smaller image or tiles of it, or "
            "raise --max-pixels"
        )


class NoSuchFile(UnreadableImage, FileNotFoundError):
    """Unreadable to a caller that embeds a million files, not found to one that names a file."""


class Refused(UnreadableImage):
    """The server that has it does not give it: one dead address, unless many follow each other."""


@dataclass(frozen=True, repr=False)
class Subject:
    """Whose image a DICOM file is, according to the file. It must not be shown.

    Attributes:
        patient, study, series: PatientID, StudyInstanceUID, SeriesInstanceUID; "" where the file
            does not say.
    """

    patient: str
    study: str
    series: str


@dataclass(frozen=True)
class Facts:
    """Facts about an image that its pixels do not show.

    Attributes:
        orientation: EXIF's, 1..8, which was *not* applied; 1 is upright.
        burned_in: a DICOM file says that its pixels hold annotation that may identify a person.
        frames: number of frames in the file, of which one was taken.
        frame: the one that was taken, from 0.
        seen: how stored values became levels, in words, such as "modality CT, rules dicom: W/L
            2250/-100 350/40 80/40", and after semicolons what is unusual about it; "" of ordinary
            images.
        subject: whose image it is; None of files that are not DICOM.
        dark: 16 bits, of which the values use 14 or fewer, and nothing says that this is the range.
    """

    orientation: int = 1
    burned_in: bool = False
    frames: int = 1
    frame: int = 0
    seen: str = ""
    subject: Subject | None = None
    dark: bool = False

    @property
    def unusual(self) -> bool:
        """Whether `seen` says something unusual."""
        return "; " in self.seen


def too_long(text: str) -> str | None:
    """Why a text is not tokenized, if so."""
    if len(text) <= MAX_CHARACTERS:
        return None
    return f"a text of {len(text)} characters, more than the limit of {MAX_CHARACTERS}"


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Turns a lack of memory into an `UnreadableImage`: it is one file that asks for too much."""
    try:
        yield
    except MemoryError:
        raise UnreadableImage(NO_MEMORY) from None


def mute(package: str) -> None:
    """Silences the warnings and log lines of a library, which quote values of files, in the whole
    process: `warnings.catch_warnings` around each file would not do, since it is not thread-safe.

    Args:
        package: its name, which its modules and its loggers begin with.
    """
    pattern = rf"{package}\."
    if not any(getattr(rule[3], "pattern", None) == pattern for rule in warnings.filters):
        warnings.filterwarnings("ignore", module=pattern)
    if (logger := logging.getLogger(package)).level != (silent := logging.CRITICAL + 1):
        logger.setLevel(silent)


def describe(item: Any) -> str:
    """Names an image in an error message, on one line, without credentials."""
    if isinstance(item, (str, os.PathLike)):
        path = without(str(item))
        return path if path.isprintable() and path.strip() else repr(path)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return f"image of {len(item)} bytes"
    if isinstance(item, Image.Image):
        return f"PIL image (mode {item.mode}, {item.width}x{item.height})"
    if isinstance(item, np.ndarray):
        return f"{item.dtype} array {item.shape}"
    if hasattr(item, "shape") and hasattr(item, "dtype"):
        return f"{str(item.dtype).rpartition('.')[2]} tensor {tuple(item.shape)}"
    if isinstance(item, Mapping):
        names = [describe(item[key]) for key in ("path", "bytes") if item.get(key)]
        return names[0] if names else f"mapping with the keys {', '.join(map(str, item))}"
    return f"object of type {type(item).__name__}"


# Of a header without its voxels (NIfTI-1 8.1, "ni1" and "ni2"), and of the voxels by themselves.
NIFTI_PAIR = (
    "NIfTI in two files, .hdr and .img; make one of them: "
    "nibabel.save(nibabel.load('FILE.img'), 'FILE.nii.gz')"
)


def is_nifti_header(start: bytes) -> bool:
    """Whether a file that starts so is the .hdr of a NIfTI pair."""
    return start[344:348] == b"ni1\0" or start[4:8] == b"ni2\0"
