"""The content of a file in a request -> the squares that the image tower takes."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from medsiglip_jax.files import storage
from medsiglip_jax.inference.reader import Reader
from medsiglip_jax.preprocess import formats, handles
from medsiglip_jax.preprocess.dicom.official import WholeSlide
from medsiglip_jax.preprocess.dicom.sniff import START, is_dicom
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.serve.errors import (
    DICOM,
    DIMENSIONS,
    INVALID_FIELD,
    OUTSIDE,
    UNREADABLE,
    InstanceError,
)
from medsiglip_jax.serve.instances import Level, Patch, Picture

# The official container applies the window of a request to these, too.
_RADIOGRAPHS = ("modality CR", "modality DX")


def squares(data: bytes, picture: Picture, reader: Reader) -> list[UInt8[np.ndarray, "s s 3"]]:
    """One square for the image, or one for each of its patches.

    Args:
        data: the file; DICOM, volumes and pictures are known by their content.
        picture: which patches of it.
        reader: the size and the rules.

    Raises:
        InstanceError: the image cannot be read, or a patch does not lie in it.
    """
    try:
        if picture.level is not None:
            return list(_of_slide(data, picture, picture.level, reader))
        try:
            pixels, facts = reader.decode(data)
        except WholeSlide:
            return list(_of_slide(data, picture, Level(0), reader))
        if picture.windowed and facts.seen.startswith(_RADIOGRAPHS):
            problem = "a window is applied to CT; of radiographs the file's own is"
            raise InstanceError(INVALID_FIELD, problem)
        return [reader.square(part) for part in _parts(pixels, picture, reader)]
    except UnreadableImage as error:
        code = DICOM if is_dicom(data[:START]) else UNREADABLE
        raise InstanceError(code, error.reason) from None
    except ModuleNotFoundError as error:
        raise InstanceError(UNREADABLE, str(error)) from None
    except ValueError as error:  # rules that do not say how a volume is read
        raise InstanceError(UNREADABLE, str(error)) from None


def _of_slide(data: bytes, picture: Picture, level: Level, reader: Reader) -> Iterator[np.ndarray]:
    """The patches of one level, or all of it; OpenSlide reads files only."""
    with storage.temporary(_beside(), folder=True, mode=0o700) as folder:
        path = os.path.join(folder, "slide.svs")
        with open(path, "wb") as file:
            file.write(data)
        try:
            yield from _of_slide_file(path, picture, level, reader)
        finally:
            handles.forget(str(folder))


def remove_leftovers() -> None:
    """Removes the slides that servers were reading when they were killed."""
    storage.remove_leftovers(_beside())


def _beside() -> Path:
    """The name from which those of the folders of slides are made."""
    return Path(tempfile.gettempdir(), "medsiglip-jax-slide")


def _of_slide_file(
    path: str, picture: Picture, level: Level, reader: Reader
) -> Iterator[np.ndarray]:
    slides = formats.SLIDES.load()
    sizes = slides.sizes(path)
    number = level.chosen(sizes)
    width, height = sizes[number]
    if picture.resized:
        raise InstanceError(DIMENSIONS, "image_dimensions is not for levels of slides")
    for patch in picture.patches or (Patch(0, 0, width, height),):
        inside = 0 <= patch.x <= width - patch.width and 0 <= patch.y <= height - patch.height
        if picture.inside and not inside:
            raise _outside(patch, width, height)
        reader.rules.check_size(patch.width, patch.height)
        region = slides.region(path, patch.x, patch.y, number, patch.width, patch.height)
        yield reader.square(region)


def _parts(pixels: np.ndarray, picture: Picture, reader: Reader) -> Iterator[np.ndarray]:
    if picture.resized:
        pixels = _resized(pixels, picture.resized, reader)
    if not picture.patches:
        yield pixels
    for patch in picture.patches:
        yield _cut(pixels, patch, picture.inside, reader)


def _resized(pixels: np.ndarray, size: tuple[int, int], reader: Reader) -> np.ndarray:
    """By the mean of an area where it shrinks, else bicubic, as the official container does with
    OpenCV; PIL rounds otherwise, by one level at most where it shrinks."""
    _check_size(reader, *size)
    height, width, _ = pixels.shape
    shrinks = size[0] * size[1] <= width * height
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, resampling))


def _check_size(reader: Reader, width: int, height: int) -> None:
    """Refuses to make an image of a size that a request asks for."""
    try:
        reader.rules.check_size(width, height)
    except UnreadableImage as error:
        raise InstanceError(DIMENSIONS, error.reason) from None


def _outside(patch: Patch, width: int, height: int) -> InstanceError:
    place = f"the patch at {patch.x},{patch.y} of {patch.width}x{patch.height}"
    return InstanceError(OUTSIDE, f"{place} does not lie in the image of {width}x{height}")


def _cut(pixels: np.ndarray, patch: Patch, inside: bool, reader: Reader) -> np.ndarray:
    height, width, _ = pixels.shape
    right, bottom = patch.x + patch.width, patch.y + patch.height
    if patch.x >= 0 and patch.y >= 0 and right <= width and bottom <= height:
        return pixels[patch.y : bottom, patch.x : right]
    if inside:
        raise _outside(patch, width, height)
    _check_size(reader, patch.width, patch.height)
    page = np.zeros((patch.height, patch.width, 3), np.uint8)
    left, top = max(patch.x, 0), max(patch.y, 0)
    visible = pixels[top : max(bottom, 0), left : max(right, 0)]
    above, before = top - patch.y, left - patch.x
    page[above : above + visible.shape[0], before : before + visible.shape[1]] = visible
    return page
