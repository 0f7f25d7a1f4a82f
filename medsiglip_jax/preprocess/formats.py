"""The input formats, a row each: how a file is recognised, and which file of this room reads it.

A new format is a reader and a row. Its reader offers, depending on the row:

* with frames or pages: `count_frames(stream) -> int`, from the header; a stream has read, seek and
  tell;
* recognised by content: `open_bytes(data)`; by suffix alone: `open_file(path)`. What they return
  stays open between frames, for several threads: `frames` says how many there are, `nbytes` what it
  holds in memory, and `render(number, rules)` gives a frame as uint8 [H, W, 3], and `Facts`;
* in series: `planes(stream) -> list[Plane]`, where each frame lies;
* cut into tiles: `is_slide`, `check`, `tiles` and `read`, as `slides` has them.

They raise `UnreadableImage` with the reason. Only `sources`, `decode` and `heatmap` call them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from medsiglip_jax.preprocess.dicom import sniff
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.names import Frame, Tile

START = sniff.START  # bytes of a file that its content is recognised by


@dataclass(frozen=True)
class Format:
    """One input format.

    Attributes:
        name: as in "reading NAME needs …".
        reader: the module that reads it, imported when the first such file is met.
        suffixes: that folders are searched for, in lower case.
        sniff: whether a file that starts with these `START` bytes is of this format, whatever its
            name; None of formats that are recognised by their suffix.
        extra: of pyproject.toml, with what the reader imports.
        packages: whose versions change pixels, and are recorded in embed's manifest.
        part: what its files are cut into, `Frame` or `Tile`. Files that have tiles are cut where
            `Parts.mpp` is given, and are no images otherwise.
        series: its files may be slices of a series.
        check: raises ValueError if the rules do not say enough to read such files.
    """

    name: str
    reader: str
    suffixes: tuple[str, ...]
    sniff: Callable[[bytes], bool] | None = None
    extra: str = ""
    packages: tuple[str, ...] = ()
    part: type[Frame] | type[Tile] = Frame
    series: bool = False
    check: Callable[[Rules], None] | None = None

    @property
    def pattern(self) -> str:
        """A regular expression that sources of this format match, for Arrow and `re`."""
        return rf"(?i)({'|'.join(map(re.escape, self.suffixes))})(#frame=\d+)?$"

    def load(self) -> Any:
        """The reader.

        Raises:
            ModuleNotFoundError: what it imports is not installed; the message says what to do.
        """
        try:
            return import_module(self.reader)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"reading {self.name} needs {error.name}: pip install 'medsiglip-jax[{self.extra}]'"
            ) from None


DICOM = Format(
    "DICOM",
    "medsiglip_jax.preprocess.dicom.pixels",
    suffixes=(".dcm", ".dicom", ".ima"),
    sniff=sniff.is_dicom,
    extra="dicom",
    packages=("pydicom", "imagecodecs"),
    series=True,
)
NIFTI = Format(
    "NIfTI",
    "medsiglip_jax.preprocess.volumes",
    suffixes=(".nii", ".nii.gz"),
    extra="volumes",
    packages=("nibabel",),
    check=Rules.check_volume,
)
SLIDES = Format(
    "slides",
    "medsiglip_jax.preprocess.slides",
    suffixes=(".bif", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".vms", ".vmu"),
    extra="slides",
    packages=("openslide-python",),
    part=Tile,
)
# OpenSlide takes some of these for slides, too, where `Parts.mpp` asks for tiles.
MAY_BE_SLIDES = (".dcm", ".dicom", ".tif", ".tiff")
# PIL tries what no other row recognises, whatever its name. Of its files with several frames, or
# pages, the first is taken where none is named.
PICTURES = Format(
    "images",
    "medsiglip_jax.preprocess.pil",
    suffixes=tuple(".avif .bmp .gif .jfif .jp2 .jpeg .jpg .png .ppm .pgm .tif .tiff .webp".split()),
    sniff=lambda start: True,
    packages=("pillow",),
)

FORMATS = (DICOM, NIFTI, SLIDES, PICTURES)
# What makes the pixels; another version may make others. In the order of the records of runs.
PACKAGES = tuple(p for format in (PICTURES, DICOM, NIFTI, SLIDES) for p in format.packages)


def libopenslide() -> str | None:
    """The version of the library below openslide-python; None where there is none."""
    try:
        from openslide import __library_version__
    except (ImportError, OSError):
        return None
    return __library_version__


def by_content(start: bytes) -> Format:
    """The format of a file that starts so, among those that are recognised by content."""
    return next(f for f in FORMATS if f.sniff is not None and f.sniff(start))


def is_image(start: bytes) -> bool:
    """Whether a file that starts so is an image of a format that is recognised by content."""
    format = by_content(start)
    return format is not PICTURES or format.load().is_known(start)


def by_name(name: str) -> Format | None:
    """The format of a file that is recognised by its suffix alone, whatever it holds."""
    format = by_suffix(name)
    return format if format is not None and format.sniff is None else None


def by_suffix(name: str) -> Format | None:
    """The format whose suffix a name has."""
    name = name.lower()
    return next((f for f in FORMATS if name.endswith(f.suffixes)), None)
