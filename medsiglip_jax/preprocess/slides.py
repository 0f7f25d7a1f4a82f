"""Whole slides, read by OpenSlide: their regions, and the grid of tiles over their tissue.

Pixels are those of OpenSlide's `read_region`, over white where the slide has none; colour profiles
are not applied. Slides in DICOM that OpenSlide cannot read are put together from their frames.
Labels, which name patients, are never read.
"""

import contextlib
import math
import os
import threading
from typing import Protocol, runtime_checkable

import numpy as np
import openslide
from jaxtyping import UInt8
from PIL import Image

from medsiglip_jax.files.threads import Threads
from medsiglip_jax.preprocess import facts, handles, tissue
from medsiglip_jax.preprocess.dicom import sniff
from medsiglip_jax.preprocess.facts import NoSuchFile, UnreadableImage, check_size
from medsiglip_jax.preprocess.parts import Parts, Tiles

MPP = 0.5  # default um/px of tiles: 20x, at which pathologists look at cells
TILE = 448  # pixels of a tile at the resolution asked for: the input size of the model

# Scanners miss the round figures: 0.2627 for 0.25 um/px, 0.5040 for 0.5. A level that is coarser by
# up to this factor is used; the next finer one often has 16 times the pixels.
_SLACK = 1.1
# Columns of tiles that are read together, row by row: rows as wide as the slide (98 MB at 100,000
# pixels) would push what two of them share out of OpenSlide's cache of 32 MB.
_STRIP = 8
# Where a thumbnail cannot be read: a colour, so that it counts as tissue and its tiles report why.
_DAMAGED = 255, 0, 255
# All that is said of an error of OpenSlide, whose message may quote the file.
_DAMAGE = "damaged slide"
_THUMBNAIL, _BLOCK = 2048, 512  # pixels: largest side; side of the blocks that are read


@runtime_checkable
class _Slide(Protocol):
    """An open slide.

    Attributes:
        sizes: (width, height) of each level, the finest first.
        downsamples: pixels of level 0 that a pixel of each level spans.
        mpp: um/px of level 0, the mean of both directions; None if the file does not say.
        shared: equal for the files that make up a slide in DICOM, one per level; else None.
        nbytes: memory that it may hold.
    """

    sizes: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    mpp: float | None
    shared: str | None
    nbytes: int

    def region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]; x and y are pixels of level 0."""
        ...


class _OfOpenSlide:
    """A slide that OpenSlide reads; see `_Slide`."""

    nbytes = 32 << 20  # OpenSlide's cache

    def __init__(self, path: str):
        self._path = path
        self._handle = handle = self._open()
        self.sizes, self.downsamples = handle.level_dimensions, handle.level_downsamples
        self.mpp = _mpp(handle)
        vendor = handle.properties.get(openslide.PROPERTY_NAME_VENDOR)
        digest = handle.properties.get(openslide.PROPERTY_NAME_QUICKHASH1)
        self.shared = f"{os.path.dirname(path)}:{digest}" if vendor == "dicom" else None
        # OpenSlide 4.0.1 crashed where two threads met the damaged end of one DICOM file: libdicom
        # leaves locking to its callers.
        self._turn = threading.Lock() if vendor == "dicom" else contextlib.nullcontext()

    def region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """See `_Slide.region`.

        After an error OpenSlide refuses all further reads through that handle, also to other
        threads, whose tiles may be intact. So the handle is replaced, and this region is read
        again through a handle of its own.
        """
        where = (x, y), level, (width, height)
        with self._turn:
            try:
                return _over_white(self._handle.read_region(*where))
            except openslide.OpenSlideError:
                self._handle = self._open()
            try:
                return _over_white(self._open().read_region(*where))
            except openslide.OpenSlideError:
                raise UnreadableImage(_DAMAGE) from None

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except openslide.OpenSlideUnsupportedFormatError:
            if "://" in self._path:
                raise UnreadableImage("OpenSlide reads local files only") from None
            if not os.path.exists(self._path):
                raise NoSuchFile("no such file") from None
            raise UnreadableImage("not a slide that OpenSlide can read") from None
        except openslide.OpenSlideError:
            raise UnreadableImage(_DAMAGE) from None


def _open(path: str) -> _Slide:
    """Opens a slide by OpenSlide, or from its frames if it is DICOM that OpenSlide cannot read."""
    try:
        return _OfOpenSlide(path)
    except UnreadableImage:
        if not os.path.isfile(path) or not _is_dicom(path):
            raise
    try:
        from medsiglip_jax.preprocess.dicom.slide import FramesSlide
    except ModuleNotFoundError as error:
        raise UnreadableImage(
            f"a DICOM slide that OpenSlide cannot read; reading its frames needs {error.name}: "
            "pip install 'medsiglip-jax[dicom]'"
        ) from None
    return FramesSlide(path)


def _is_dicom(path: str) -> bool:
    with open(path, "rb") as file:
        return sniff.is_dicom(file.read(sniff.START))


def _mpp(handle: openslide.OpenSlide) -> float | None:
    names = openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y
    try:
        x, y = (float(handle.properties[name]) for name in names)
    except (KeyError, ValueError):
        return None
    return (x + y) / 2 if 0 < x < math.inf and 0 < y < math.inf else None


def _over_white(region: Image.Image) -> np.ndarray:
    """RGB of RGBA; a view, with 4 bytes per pixel, where the region is opaque."""
    rgba = np.asarray(region)
    if np.bitwise_and.reduce(rgba.view("<u4"), axis=None) >> 24 == 255:
        return rgba[..., :3]
    page = Image.new("RGB", region.size, "white")
    page.paste(region, mask=region)
    return np.asarray(page)


def is_slide(path: str) -> bool:
    """Whether OpenSlide takes a local file for a slide: a tiled TIFF is one, a striped one not."""
    return openslide.OpenSlide.detect_format(path) is not None


def check(path: str, parts: Parts | None = None) -> None:
    """Raises UnreadableImage if a slide cannot be opened, or not be cut as `parts` says."""
    slide = handles.opened(path, _open)
    if parts is not None:
        _level(slide, path, parts)


def stated_mpp(path: str) -> float | None:
    """um/px of the finest level, as the file says; None if it does not."""
    return handles.opened(path, _open).mpp


def downsamples(path: str) -> tuple[float, ...]:
    """How many pixels of level 0 a pixel of each level spans, across and down."""
    return handles.opened(path, _open).downsamples


def read(path: str, x: int, y: int, level: int, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """A square of a slide: OpenSlide's `read_region((x, y), level, (size, size))`, over white.

    Args:
        path: a local file.
        x, y: its upper left corner, in pixels of level 0.
        level: of the pyramid; 0 is the finest.
        size: in pixels of that level; 0 for a slide that `tiles` refused.

    Returns:
        uint8 [size, size, 3]; the pixels may be 4 bytes apart.

    Raises:
        UnreadableImage: not a slide, no such level, wholly outside, or damaged at this place; the
            reason, without the path.
    """
    slide = handles.opened(path, _open)
    if size == 0:
        raise _not_cut(slide)
    if not 0 <= level < len(slide.sizes):
        raise UnreadableImage(f"no level {level}; the slide has {len(slide.sizes)}, from 0")
    check_size(size, size)
    side, (width, height) = size * slide.downsamples[level], slide.sizes[0]
    if not (-side < x < width and -side < y < height):
        raise UnreadableImage(f"tile at {x},{y} is outside of the slide of {width}x{height}")
    return slide.region(x, y, level, size, size)


def sizes(path: str) -> tuple[tuple[int, int], ...]:
    """(width, height) of each level, the finest first; raises as `read`."""
    return handles.opened(path, _open).sizes


def region(
    path: str, x: int, y: int, level: int, width: int, height: int
) -> UInt8[np.ndarray, "h w 3"]:
    """A rectangle that lies in a level, over white.

    Args:
        path: a local file.
        x, y: its upper left corner, in pixels of that level.
        level: of the pyramid; 0 is the finest.
        width, height: in pixels of that level.

    Raises:
        UnreadableImage: not a slide, or damaged at this place; the reason, without the path.
    """
    slide = handles.opened(path, _open)
    scale = slide.downsamples[level]
    return slide.region(round(x * scale), round(y * scale), level, width, height)


def _not_cut(slide: _Slide) -> UnreadableImage:
    """Why a slide cannot be cut into tiles."""
    if slide.mpp is None:
        return UnreadableImage("does not say its resolution; give it, in um/px (--slide-mpp)")
    least = f"{slide.mpp:.4g}"
    return UnreadableImage(
        f"its finest level has {least} um/px; expected --mpp {least} or more, or, if the file is "
        "wrong, its resolution in um/px (--slide-mpp)"
    )


# ------------------------------------------------------------------------------------------ tiles


def tiles(path: str, parts: Parts) -> Tiles:
    """The tiles of a slide that hold tissue, in an order in which neighbours are near.

    They lie side by side from the upper left corner, at a resolution of about `parts.mpp`: each is
    a square of the coarsest level that is fine enough, to be resized to `TILE` pixels. The last
    tiles of a row or column extend beyond the slide's edge, where they are white.

    Args:
        path: a local file.
        parts: `mpp`, um/px of the tiles, default `MPP`; `slide_mpp`, um/px of level 0, whatever the
            file says; `tissue`, the minimum tissue fraction of a tile, 0 for all tiles.

    Raises:
        UnreadableImage: not a slide, damaged, or its resolution is unknown, or coarser than asked
            for; the reason, without the path.
        ValueError: `parts` makes no sense for this slide.
    """
    slide = handles.opened(path, _open)
    level, own = _level(slide, path, parts)
    target, downsample = parts.mpp or MPP, slide.downsamples[level]
    size = max(1, round(TILE * target / (own * downsample)))
    if size**2 > facts.MAX_PIXELS:
        raise ValueError(
            f"{path}: --mpp {target:g} asks for tiles of {size}x{size} pixels; expected at most "
            f"{facts.MAX_PIXELS} pixels"
        )
    width, height = slide.sizes[level]
    left, top = (np.rint(np.arange(0, n, size) * downsample) for n in (width, height))
    row, column = np.nonzero(_kept(slide, path, left, top, size * downsample, parts.tissue))
    order = np.lexsort((column, row, column // _STRIP))
    x, y = left[column[order]].astype(np.int32), top[row[order]].astype(np.int32)
    levels, sizes = np.full_like(x, level), np.full_like(x, size)
    mpp = np.full(len(x), own * downsample * size / TILE, np.float32)
    return Tiles(dict(x=x, y=y, level=levels, size=sizes, mpp=mpp), slide.shared)


def _level(slide: _Slide, path: str, parts: Parts) -> tuple[int, float]:
    """The coarsest level that is fine enough, and um/px of level 0; raises as `tiles` does."""
    target, own = parts.mpp or MPP, parts.slide_mpp or slide.mpp
    enough = [d for d in slide.downsamples if own and own * d <= target * _SLACK]
    if own and enough:
        return len(enough) - 1, own
    if parts.slide_mpp is None:
        raise _not_cut(slide)
    raise ValueError(f"{path}: --slide-mpp {own:g} is coarser than --mpp {target:g}")


def _kept(
    slide: _Slide, path: str, left: np.ndarray, top: np.ndarray, side: float, least: float
) -> np.ndarray:
    """Which squares of a grid, with edges at `left` and `top` in pixels of level 0, hold tissue."""
    if least == 0:
        return np.ones((len(top), len(left)), bool)
    pixels, scale = _thumbnail(slide, path)
    fractions = tissue.fractions(tissue.mask(pixels), left / scale, top / scale, side / scale)
    return fractions >= least - 1e-6  # a sum of 1 may be rounded down


def thumbnail(path: str) -> tuple[UInt8[np.ndarray, "h w 3"], float]:
    """A slide in at most 2048 pixels a side, and how many pixels of level 0 each of them spans.

    It is read in blocks, even if that means the whole of a slide that has a single level. Blocks
    that are damaged have a colour, as tissue has.

    Raises:
        UnreadableImage: not a slide; the reason, without the path.
        Stalled: a block is not read in time, see `files.threads`.
    """
    return _thumbnail(handles.opened(path, _open), path)


def _thumbnail(slide: _Slide, path: str) -> tuple[np.ndarray, float]:
    large = (i for i, sides in enumerate(slide.sizes) if max(sides) >= _THUMBNAIL // 2)
    level = max(large, default=0)
    (width, height), downsample = slide.sizes[level], slide.downsamples[level]
    factor = -(-max(width, height) // _THUMBNAIL)
    block = factor * max(1, _BLOCK // factor)
    out = np.empty((-(-height // factor), -(-width // factor), 3), np.uint8)

    def fill(corner: tuple[int, int]) -> None:
        left, top = corner
        sides = min(block, width - left), min(block, height - top)
        place = out[top // factor :, left // factor :][: block // factor, : block // factor]
        try:
            pixels = slide.region(round(left * downsample), round(top * downsample), level, *sides)
            place[:] = np.asarray(Image.fromarray(pixels).reduce(factor))
        except UnreadableImage:
            place[:] = _DAMAGED

    corners = [(x, y) for y in range(0, height, block) for x in range(0, width, block)]
    with Threads("thumbnail") as pool:
        list(pool.map(fill, corners, lambda corner: facts.describe(path)))
    return out, factor * downsample
