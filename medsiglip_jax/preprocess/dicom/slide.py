"""Slides in DICOM from their own frames, where OpenSlide cannot read them: other transfer syntaxes.

Each level is a file; its frames are tiles of the total pixel matrix (PS3.3 C.7.6.17.3, C.8.12.6).
A file is in memory as a whole while it is read.
"""

import functools
import os
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from medsiglip_jax.preprocess import handles
from medsiglip_jax.preprocess.bytes import open_binary, read_bytes
from medsiglip_jax.preprocess.dicom import kinds, pixels, sniff
from medsiglip_jax.preprocess.dicom.planes import header_of
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.dicom.tags import Tags, damaged
from medsiglip_jax.preprocess.facts import UnreadableImage

_RULES = Rules()
_FRAMES = 64  # decoded ones that are kept: neighbouring tiles share them


class Tiling(NamedTuple):
    """How the frames of a file make up a level of a slide (PS3.3 C.8.12.6).

    Attributes:
        series: UID; "" if the file does not say.
        is_volume: whether it is a level of the slide, and no thumbnail of it.
        size: (width, height) of the level.
        tile: (width, height) of a frame.
        frames: number of them.
        places: (column, row) of the first pixel of each frame, from 1; () where they lie side by
            side, row by row.
        mpp: um/px, the mean of both directions; None if the file does not say.
    """

    series: str
    is_volume: bool
    size: tuple[int, int]
    tile: tuple[int, int]
    frames: int
    places: tuple[tuple[float, ...], ...]
    mpp: float | None


class FramesSlide:
    """An open slide; what it offers is documented in `slides`."""

    nbytes = 16 << 20  # without the files

    def __init__(self, path: str):
        self._levels = levels = _levels(path)
        self._places = [_places(level) for _, level in levels]
        self.sizes = tuple(level.size for _, level in levels)
        self.downsamples = tuple(self.sizes[0][0] / width for width, _ in self.sizes)
        self.mpp = levels[0][1].mpp
        self.shared: str | None = f"{os.path.dirname(path)}:{levels[0][1].series or path}"
        self._frame = functools.lru_cache(_FRAMES)(self._decoded)

    def region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3], white outside of the slide; x and y are pixels of level 0.

        Raises:
            UnreadableImage: a frame is damaged.
        """
        tiling, places = self._levels[level][1], self._places[level]
        corner = np.rint(np.array([x, y]) / self.downsamples[level]).astype(int)
        out = np.full((height, width, 3), 255, np.uint8)
        low, high = places - corner, np.minimum(places + tiling.tile, tiling.size) - corner
        inside = (low < (width, height)).all(axis=1) & (high > 0).all(axis=1)
        for number in np.flatnonzero(inside).tolist()[::-1]:  # of several at one place the first
            (left, top), (right, bottom) = low[number], np.minimum(high[number], (width, height))
            target = out[max(top, 0) : bottom, max(left, 0) : right]
            target[:] = self._frame(level, number)[max(-top, 0) :, max(-left, 0) :][
                : len(target), : target.shape[1]
            ]
        return out

    def _decoded(self, level: int, number: int) -> UInt8[np.ndarray, "h w 3"]:
        image = handles.opened(self._levels[level][0], _open)
        return np.ascontiguousarray(image.render(number, _RULES)[0])


def _open(path: str) -> pixels.Image:
    if (size := os.path.getsize(path)) > handles.MAX_BYTES:
        raise UnreadableImage(
            f"DICOM slide that OpenSlide cannot read, of {size} bytes; without it the limit is "
            f"{handles.MAX_BYTES}"
        )
    return pixels.open_bytes(read_bytes(path))


def _levels(path: str) -> list[tuple[str, Tiling]]:
    """The files of the slide that lie in the same folder, the finest first."""
    own, folder = _tiling_of(path), os.path.dirname(path)
    levels = {path: own}
    for entry in os.scandir(folder or ".") if own.series else ():
        other = os.path.join(folder, entry.name)
        if other not in levels and entry.is_file() and (level := _known_tiling(other)) is not None:
            if level.series == own.series:
                levels[other] = level
    volumes = {name: level for name, level in levels.items() if level.is_volume} or {path: own}
    return sorted(volumes.items(), key=lambda item: -item[1].size[0])


def _known_tiling(path: str) -> Tiling | None:
    """The tiling of a file; None if it is no slide, or damaged."""
    try:
        status = os.stat(path)
        return _cached_tiling(path, status.st_size, status.st_mtime_ns)
    except (UnreadableImage, OSError):
        return None


@functools.lru_cache(4096)  # a folder may hold many slides, and is looked through for each
def _cached_tiling(path: str, size: int, time: int) -> Tiling | None:
    try:
        return _tiling_of(path)
    except UnreadableImage:
        return None


def _tiling_of(path: str) -> Tiling:
    with open_binary(path) as stream:
        if not sniff.is_dicom(stream.read(sniff.START)):
            raise UnreadableImage("not DICOM")
        return tiling(stream)


def _places(level: Tiling) -> Int[np.ndarray, "frames 2"]:
    """Where the upper left corner of each frame lies, x and y; of the first focal plane and path.

    Raises:
        UnreadableImage: there are fewer frames than a full slide has.
    """
    if level.places:
        with damaged("its tiles are not where it says"):
            return np.array(level.places, np.int64) - 1  # PS3.3 counts from 1
    (width, height), (across, down) = level.size, level.tile
    tiles = -(-width // across) * -(-height // down)
    if tiles > level.frames:
        raise UnreadableImage(
            f"damaged DICOM: a slide of {tiles} tiles, with {level.frames} frames"
        )
    return np.array([(x, y) for y in range(0, height, down) for x in range(0, width, across)])


def tiling(stream: Any) -> Tiling:
    """How the frames of a file make up a level of a slide; from its header.

    Args:
        stream: binary, and can seek.

    Raises:
        UnreadableImage: it is not a slide in DICOM, or damaged; or it is grey of more than 8 bits,
            whose frames would be scaled each by itself.
    """
    with damaged("its header cannot be made sense of"):
        tags, count = header_of(stream)
        if reason := kinds.refusal(tags):
            raise UnreadableImage(reason)
        if tags.whole("SamplesPerPixel", 1) == 1 and tags.whole("BitsStored", 8) > 8:
            raise UnreadableImage("DICOM slide in grey of more than 8 bits, which is not read")
        shared = tags.items("SharedFunctionalGroupsSequence")[:1]
        spacing = tags.nested(shared, "PixelMeasuresSequence").vector("PixelSpacing", 2)
        size = tags.whole("TotalPixelMatrixColumns"), tags.whole("TotalPixelMatrixRows")
        tile = tags.whole("Columns"), tags.whole("Rows")
        if min(*size, *tile) < 1:
            raise UnreadableImage("damaged DICOM: a slide without pixels")
        places = ()
        if tags.label("DimensionOrganizationType") != "TILED_FULL":
            groups = tags.items("PerFrameFunctionalGroupsSequence")
            places = tuple(place for group in groups[:count] if (place := _place_of(group)))
        return Tiling(
            tags.label("SeriesInstanceUID"),
            "THUMBNAIL" not in tags.words("ImageType"),
            size,
            tile,
            count,
            places if len(places) == count else (),
            1e3 * sum(spacing) / 2 if spacing and min(spacing) > 0 else None,
        )


def _place_of(group: Tags) -> tuple[float, ...]:
    at = group.nested([group], "PlanePositionSlideSequence")
    names = (f"{name}PositionInTotalImagePixelMatrix" for name in ("Column", "Row"))
    place = [value for name in names if (value := at.first(name)) is not None]
    return tuple(place) if len(place) == 2 else ()
