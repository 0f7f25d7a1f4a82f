"""Files that hold more than one image -> the parts of them that are asked for."""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

import contextlib
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsiglip_jax.data import left_out
from medsiglip_jax.data.listing import File, expand
from medsiglip_jax.data.rows import EXTRA, REASON
from medsiglip_jax.files import dicomweb
from medsiglip_jax.files.threads import Step, Threads, watched
from medsiglip_jax.preprocess import formats, sources
from medsiglip_jax.preprocess.dicom import series
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage, describe
from medsiglip_jax.preprocess.names import Cell, Frame, Part, Range, Tile, Whole, parse, part_of
from medsiglip_jax.preprocess.parts import Parts

OnFile = Callable[[int], Any]
LIST = "the list of inputs"  # in messages
# Headers are small, and a network disk takes a while to answer for each.
_WORKERS = 16
_BLOCK = 4096  # files whose headers may be read ahead
_SAME_MPP = 0.01  # resolutions that differ by less, as 0.2502 and 0.25 um/px, are the same
# The tile of a slide that cannot be cut. Reading it raises the reason.
_NO_TILE = Tile(0, 0, 0, 0)
_ZERO = np.zeros(1, np.int32)
_COLUMNS_OF_NO_TILE = {**dict.fromkeys(Tile._fields, _ZERO), "mpp": _ZERO.astype(np.float32)}


class _Piece(NamedTuple):
    """What becomes of one image: itself where `parts` is None, or these parts of it.

    Attributes:
        row: number of the image among those given.
        columns: what the parts have in `EXTRA`.
        shared: equal for all files of one slide, where a slide has several.
        overruled: um/px that a slide records where `Parts.slide_mpp` says something else.
    """

    row: int
    parts: Sequence[Part] | None = None
    columns: Mapping[str, np.ndarray] = {}
    shared: str | None = None
    overruled: float | None = None

    @property
    def rows(self) -> int:
        return 1 if self.parts is None else len(self.parts)

    @property
    def suffixes(self) -> list[str]:
        return [""] if self.parts is None else [part_of("", part) for part in self.parts]


def names(
    given: Sequence[str],
    parts: Parts,
    on_file: OnFile = int,
    all_files: bool = False,
    skipped: Counter[str] | None = None,
) -> list[str]:
    """The sources given, or the parts of them that are asked for, as `table` has them.

    A local folder stands for the images in it; `all_files` and `skipped` are as for `inputs.rows`.
    """
    skipped = Counter() if skipped is None else skipped
    images = watched(
        lambda on_step: [
            source for name in given for source in _images(name, parts, all_files, skipped, on_step)
        ],
        LIST,
    )
    if not _asked(parts):
        return images
    pieces = _pieces(images, parts, on_file, skipped)
    return [images[piece.row] + suffix for piece in pieces for suffix in piece.suffixes]


def is_image(file: File, parts: Parts) -> bool:
    """Whether a listed file is an image, or a slide that is to be cut into tiles."""
    return file.format == "image" or (file.format == "slide" and parts.mpp is not None)


def _images(
    name: str, parts: Parts, all_files: bool, skipped: Counter[str], on_step: Step
) -> list[str]:
    on_step()
    if not (dicomweb.is_address(name) or os.path.isdir(name)):
        return [name]
    images = []
    for file in itertools.chain.from_iterable(expand([name], all_files, on_step)):
        if is_image(file, parts):
            images.append(file.path)
        else:
            skipped[file.suffix] += 1
    if not images:
        raise ValueError(f"{name}: no images in this folder, nor slides with --mpp")
    return images


def table(
    rows: pa.Table, parts: Parts, on_file: OnFile = int, skipped: Counter[str] | None = None
) -> pa.Table:
    """Rows whose images are the parts that are asked for.

    Texts, files with one image, and files that cannot be opened stay as they are; reading the
    latter raises the reason.

    Args:
        rows: with `id`, `source` and `kind`.
        parts: what is asked for.
        on_file: called with 1 for each file that was opened.
        skipped: gets the number of images that are left out, by what they are.

    Returns:
        The rows in order, ids and sources ending in "#" and the part, and the columns of `EXTRA`
        that they have. With `parts.series`, all slices of a series are where its first file was.

    Raises:
        ValueError: nothing is left.
    """
    if not _asked(parts):
        return rows
    is_image = pc.equal(rows["kind"].cast(pa.string()), "image").to_numpy(zero_copy_only=False)
    if REASON.name in rows.column_names:
        is_image &= pc.is_null(rows[REASON.name]).to_numpy()
    images = np.where(is_image, rows["source"].to_numpy(), "").tolist()
    pieces = _pieces(images, parts, on_file, Counter() if skipped is None else skipped)
    numbers = np.repeat([piece.row for piece in pieces], [piece.rows for piece in pieces])
    expanded = rows.take(pa.array(numbers.astype(np.int64)))
    strings = pa.large_string()
    endings = pa.array([suffix for piece in pieces for suffix in piece.suffixes], strings)
    for place, name in enumerate(("id", "source")):  # the first columns of `SCHEMA`
        joined = pc.binary_join_element_wise(expanded[name], endings, pa.scalar("", strings))
        expanded = expanded.set_column(place, expanded.field(name), joined)
    for field in EXTRA:
        if any(field.name in piece.columns for piece in pieces):
            expanded = expanded.append_column(field, _column(field, pieces))
    return expanded


def _column(field: pa.Field, pieces: Sequence[_Piece]) -> pa.Array:
    chunks = [
        pa.array(piece.columns[field.name], field.type)
        if field.name in piece.columns
        else pa.nulls(piece.rows, field.type)
        for piece in pieces
    ]
    return pa.concat_arrays(chunks)  # a slice of many chunks takes milliseconds


def _asked(parts: Parts) -> bool:
    return parts.series or parts.step is not None or parts.mpp is not None


def _pieces(
    images: Sequence[str], parts: Parts, on_file: OnFile, skipped: Counter[str]
) -> list[_Piece]:
    """What becomes of each image; "" is a row that is no image, and stays.

    Raises:
        ValueError: there were some, and nothing is left.
    """
    if parts.series:
        with_repeats = _series(images, parts, on_file, skipped)
    else:
        with_repeats = _in_threads(lambda row: _piece(row, images[row], parts), images, on_file)
    pieces = list(_without_repeated_slides(with_repeats))
    if images and not any(piece.rows for piece in pieces):
        reasons = [f"no series has the images asked for (--frame {parts.frame})"] * parts.series
        if parts.mpp is not None:
            reasons.append(
                f"no tile holds enough tissue (--tissue {parts.tissue:g}; 0 keeps all tiles)"
            )
        others = " and all others" if len(images) > 1 else ""
        raise ValueError(f"{images[0]}{others}: {', and '.join(reasons)}")
    if parts.mpp is not None:
        slides = [piece for piece in pieces if piece.columns]
        empty = sum(not piece.rows for piece in slides)
        overruled = [piece.overruled for piece in slides if piece.overruled is not None]
        left_out.warn_of_slides(images, len(slides), empty, overruled, parts, skipped)
    return pieces


def _without_repeated_slides(pieces: Iterator[_Piece]) -> Iterator[_Piece]:
    """In DICOM each level of a slide is a file, and OpenSlide opens the slide by any of them."""
    seen = set()
    for piece in pieces:
        yield _Piece(piece.row, ()) if piece.shared in seen else piece
        seen |= {piece.shared} - {None}


def _series(
    images: Sequence[str], parts: Parts, on_file: OnFile, skipped: Counter[str]
) -> Iterator[_Piece]:
    """The slices asked for of each stack; files that are in none as they would be without."""

    def look(row: int) -> list[series.Plane] | _Piece:
        return _planes(images[row], parts) or _piece(row, images[row], parts)

    looks = list(_in_threads(look, images, on_file))
    planes = [[] if isinstance(look, _Piece) else look for look in looks]
    stacks = series.into_stacks(planes, by_time="time" in parts.choices)
    chosen = [stack for stack in stacks.stacks if stack.kind.has(parts.choices)]
    others = sum(isinstance(look, _Piece) and not look.columns for look in looks)
    left_out.warn_of_series(stacks, chosen, others if parts.choices else 0, parts, skipped)
    places: list[tuple[int, _Piece | series.Stack]] = [
        *((min(stack.slots).file, stack) for stack in chosen),
        *((look.row, look) for look in looks if isinstance(look, _Piece)),
    ]
    for _, place in sorted(places, key=lambda place: place[0]):
        if isinstance(place, _Piece):
            yield place
            continue
        for number in parts.chosen(len(place.slots)):
            file, frame = place.slots[number]
            yield _Piece(file, [Frame(frame)] if len(planes[file]) > 1 else None)


def _whole(source: str) -> tuple[str, Whole | None] | None:
    """The file of a source and where in it; None for parts of images, and where there is none."""
    file, part = parse(source)
    return None if not file or isinstance(part, (Frame, Tile)) else (file, part)


def _is_slide(file: str, span: Whole | None, parts: Parts) -> bool:
    return span is None and sources.is_cut(file, parts)


def _planes(source: str, parts: Parts) -> list[series.Plane]:
    if (whole := _whole(source)) is None or _is_slide(*whole, parts):
        return []
    with contextlib.suppress(UnreadableImage):
        return sources.planes(*whole)
    return []


def _piece(row: int, source: str, parts: Parts) -> _Piece:
    if (whole := _whole(source)) is None:
        return _Piece(row)
    if _is_slide(*whole, parts):
        return _tiles(row, whole[0], parts)
    with contextlib.suppress(UnreadableImage):
        if parts.step is not None and (count := sources.frames(*whole)) > 1:
            return _Piece(row, [Frame(n) for n in parts.chosen(count)])
    return _Piece(row)


def _tiles(row: int, file: str, parts: Parts) -> _Piece:
    try:
        columns, shared = sources.tiles(file, parts)
    except UnreadableImage:  # as an image it may be the slide's label, which names the patient
        return _Piece(row, [_NO_TILE], _COLUMNS_OF_NO_TILE)
    places = zip(*(columns[name].tolist() for name in Tile._fields), strict=True)
    tiles, overruled = [Tile(*place) for place in places], None
    if parts.slide_mpp is not None and (stated := sources.stated_mpp(file)) is not None:
        overruled = stated if abs(stated / parts.slide_mpp - 1) > _SAME_MPP else None
    return _Piece(row, tiles, columns, shared, overruled)


def warn_of_unused(rules: Rules, sources: Iterable[str]) -> None:
    """Warns if rules of DICOM files or volumes are asked for and no input has the name of one."""
    default = Rules()
    flags = {"name": "--dicom-rules", "ct_window": "--ct-window", "window": "--window",
             "volume": "--volume"}  # fmt: skip
    asked = [flag for name, flag in flags.items() if getattr(rules, name) != getattr(default, name)]
    if not asked or (first := next(sources := iter(sources), None)) is None:
        return
    if all(map(_is_picture, itertools.chain([first], sources))):
        warnings.warn(
            f"{', '.join(asked)}: without effect, since all inputs are named as ordinary pictures, "
            "and none as a DICOM file or a NIfTI volume",
            stacklevel=2,
        )


def _is_picture(source: str) -> bool:
    file, part = parse(source)
    return formats.by_suffix(file) is formats.PICTURES and not isinstance(part, (Range, Cell))


def _in_threads(
    make: Callable[[int], Any], images: Sequence[str], on_file: OnFile
) -> Iterator[Any]:
    """The results of `make` for the number of each image, in order."""
    with Threads("headers", _WORKERS) as pool:
        for start in range(0, len(images), _BLOCK):
            rows = range(start, min(start + _BLOCK, len(images)))
            for result in pool.map(make, rows, lambda row: describe(images[row])):
                on_file(1)
                yield result
