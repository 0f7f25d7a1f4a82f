"""What a source names, a file or a part of one (see `names`) -> its pixels, or its bytes.

Which reader that takes is looked up in `formats`.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess import formats, handles
from medsiglip_jax.preprocess.decode import decode_with_facts
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.dicom.series import Plane
from medsiglip_jax.preprocess.facts import (
    NIFTI_PAIR,
    Facts,
    UnreadableImage,
    describe,
    within_memory,
)
from medsiglip_jax.preprocess.formats import Format
from medsiglip_jax.preprocess.names import Cell, Frame, Range, Tile, Whole, parse
from medsiglip_jax.preprocess.parts import Parts, Tiles
from medsiglip_jax.preprocess.pil import ToArray, spread


def read(
    source: str,
    to_array: ToArray = np.asarray,
    rules: Rules = Rules(),
    decode: Callable[[bytes], tuple[Any, Facts]] | None = None,
    on_format: Callable[[Format], Any] = lambda format: None,
) -> tuple[Any, Facts]:
    """The pixels of a source: the one way from a name to what the model sees.

    Args:
        source: local path or URI, or a part of one.
        to_array: PIL image of mode RGB -> uint8 [H, W, 3].
        rules: how DICOM files and NIfTI volumes become pixels.
        decode: makes pixels of the bytes of an image; default `decode_with_facts`.
        on_format: called with the format whose reader is asked, also if that cannot read it.

    Returns:
        uint8 [H, W, 3], which may be read-only, or what `decode` made; and facts.

    Raises:
        UnreadableImage: one line, with the source and the reason; `NoSuchFile` if that is it.
        Outage: the disk or the network fails, which says nothing about the file.
        ModuleNotFoundError: the package that reads this format is not installed, so no other file
            of the format can be read, either.
        ValueError: the rules do not say how volumes are read; no other can be read, either.
    """
    try:
        with within_memory():
            return _read(source, to_array, rules, decode, on_format)
    except UnreadableImage as error:
        raise error.of(describe(source)) from error


def _read(
    source: str,
    to_array: ToArray,
    rules: Rules,
    decode: Callable[[bytes], tuple[Any, Facts]] | None,
    on_format: Callable[[Format], Any],
) -> tuple[Any, Facts]:
    file, part = parse(source)
    if isinstance(part, Tile):
        on_format(formats.SLIDES)
        return spread(formats.SLIDES.load().read(file, *part), to_array), Facts()
    named = None if isinstance(part, (Range, Cell)) else formats.by_name(file)
    if isinstance(part, Frame) or (named is not None and named.part is Frame):
        _check(named, source, rules)
        opened = _opened(file, on_format)
        number = part.number if isinstance(part, Frame) else rules.chosen(opened.frames)
        pixels, facts = opened.render(number, rules)
        return spread(pixels, to_array), facts
    if named is not None:  # a slide, which may have gigabytes
        on_format(formats.SLIDES)
        formats.SLIDES.load().check(file)
        raise UnreadableImage(
            "a whole slide; expected tiles of it: --mpp, or FILE#tile=X,Y,LEVEL,SIZE"
        )
    stem, suffix = os.path.splitext(file)
    if suffix.lower() == ".img" and part is None and os.path.exists(f"{stem}.hdr"):
        raise UnreadableImage(NIFTI_PAIR)
    data = _bytes(file, part)
    on_format(formats.by_content(data[: formats.START]))
    return decode(data) if decode else decode_with_facts(data, to_array, rules)


@dataclass(frozen=True)
class _Opened:
    """A file that stays open, and its format."""

    format: Format
    file: Any

    @property
    def nbytes(self) -> int:
        return getattr(self.file, "nbytes", 0)


def _opened(file: str, on_format: Callable[[Format], Any]) -> Any:
    """An open file, of this read or an earlier one."""
    try:
        opened = handles.opened(file, _open)
    except UnreadableImage:  # of frames, only those of DICOM files have names without a suffix
        on_format(formats.by_suffix(file) or formats.DICOM)
        raise
    on_format(opened.format)
    return opened.file


def _open(file: str) -> _Opened:
    named = formats.by_name(file)
    if named is not None and named.part is Frame:
        return _Opened(named, named.load().open_file(file))
    data = read_bytes(file)  # which may be a range of a shard
    format = formats.by_content(data[: formats.START])
    return _Opened(format, format.load().open_bytes(data))


def check_rules(source: str, rules: Rules) -> None:
    """Raises ValueError if the rules do not say enough to read a file of this name."""
    _check(formats.by_name(parse(source)[0]), source, rules)


def _check(format: Format | None, source: str, rules: Rules) -> None:
    try:
        if format is not None and format.check is not None:
            format.check(rules)
    except ValueError as error:
        raise ValueError(f"{describe(source)}: {error}") from None


def read_bytes(source: str) -> bytes:
    """The bytes that a source names; raises as `bytes.read_bytes` does."""
    file, part = parse(source)
    if isinstance(part, (Frame, Tile)):
        raise UnreadableImage("part of an image, which has no bytes of its own")
    return _bytes(file, part)


def _bytes(file: str, whole: Whole | None) -> bytes:
    if isinstance(whole, Cell):
        from medsiglip_jax.preprocess import parquet  # pyarrow takes a while to import

        return parquet.read_bytes(file, *whole)
    return content.read_bytes(file, whole)


# --------------------------------------------------------------------- which parts a file has


def frames(file: str, span: Whole | None = None) -> int:
    """How many frames a file has, from its header; 1 if its format has no frames.

    Args:
        file: local path or URI.
        span: where in the file it lies, if that holds others, too.

    Raises:
        UnreadableImage: the file cannot be opened, or is damaged; the reason, without the path.
        Outage: the disk or the network fails, which says nothing about the file.
    """

    def count(format: Format, stream: Any) -> int:
        return format.load().count_frames(stream) if format.part is Frame else 1

    return _from_header(file, span, count)


def size(source: str) -> tuple[int, int]:
    """Width and height of an image, before it is turned: of a picture from its header, of any other
    decoded.

    Raises:
        UnreadableImage: it cannot be read.
    """
    file, part = parse(source)

    def of_picture(format: Format, stream: Any) -> tuple[int, int] | None:
        return format.load().size(stream) if format is formats.PICTURES else None

    if part is None and (in_header := _from_header(file, None, of_picture)):
        return in_header
    height, width = read(source, rules=Rules(volume="percentile"))[0].shape[:2]
    return width, height


def planes(file: str, span: Whole | None = None) -> list[Plane]:
    """Where each frame of a DICOM file lies, from its header; empty for other files.

    Arguments and errors are those of `frames`.
    """

    def list_planes(format: Format, stream: Any) -> list[Plane]:
        return format.load().planes(stream) if format.series else []

    return _from_header(file, span, list_planes)


def _from_header(file: str, span: Whole | None, ask: Callable[[Format, Any], Any]) -> Any:
    named = formats.by_name(file) if span is None else None

    def look(stream: Any) -> Any:
        format = named or formats.by_content(stream.read(formats.START))
        stream.seek(0)
        return ask(format, stream)

    with within_memory():
        if isinstance(span, Cell):
            return look(io.BytesIO(_bytes(file, span)))
        return content.looked_at(file, span, look)


def is_cut(file: str, parts: Parts) -> bool:
    """Whether a file is a slide, and is to be cut into tiles; the label of one is not."""
    if parts.mpp is None or not os.path.isfile(file) or not formats.SLIDES.load().is_slide(file):
        return False
    with open(file, "rb") as stream:
        is_dicom = formats.by_content(stream.read(formats.START)) is formats.DICOM
        try:
            return not (is_dicom and formats.DICOM.load().is_label(stream))
        except UnreadableImage:  # its tile says why
            return True


def tiles(file: str, parts: Parts) -> Tiles:
    """The tiles of a slide; see `slides.tiles`."""
    with within_memory():
        return formats.SLIDES.load().tiles(file, parts)


def stated_mpp(file: str) -> float | None:
    """um/px of the finest level of a slide, as the file says; see `slides.stated_mpp`."""
    return formats.SLIDES.load().stated_mpp(file)
