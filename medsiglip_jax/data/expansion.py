"""Files that hold more than one image -> the parts of them that are asked for."""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsiglip_jax.data.listing import File, expand
from medsiglip_jax.data.rows import EXTRA
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.dicom import series
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.names import Frame, Part, Tile, parse, part_of
from medsiglip_jax.preprocess.parts import Parts

OnFile = Callable[[int], Any]
# Headers are small, and a network disk gives each after a while.
_WORKERS = 16
_BLOCK = 4096  # files that wait for them
# Of a slide that cannot be cut: a tile that says why when it is read.
_NONE = Tile(0, 0, 0, 0)
_COLUMNS_OF_NONE = {
    **dict(zip(Tile._fields, np.zeros((4, 1), np.int32), strict=True)),
    "mpp": np.zeros(1, np.float32),
}
# What OpenSlide would be asked about, if it were here.
_MAY_BE_SLIDES = (".dcm", ".dicom", ".tif", ".tiff")


class _Piece(NamedTuple):
    """What becomes of a source: itself, or parts of it and what they have in `EXTRA`.

    Attributes:
        shared: the same for all files of one slide, if there are more.
    """

    row: int
    parts: Sequence[Part] | None = None
    columns: Mapping[str, np.ndarray] = {}
    shared: str | None = None

    def __len__(self) -> int:
        return 1 if self.parts is None else len(self.parts)

    @property
    def suffixes(self) -> list[str]:
        return [""] if self.parts is None else [part_of("", part) for part in self.parts]


def names(given: Sequence[str], parts: Parts, on_file: OnFile = int) -> list[str]:
    """Sources, or the parts of them that are asked for, see `table`; of local folders, those of
    their images."""
    found = [source for name in given for source in _images(name, parts)]
    if not _asked(parts):
        return found
    pieces = _pieces(found, parts, on_file)
    return [found[piece.row] + suffix for piece in pieces for suffix in piece.suffixes]


def is_image(file: File, parts: Parts) -> bool:
    """Whether a file that was listed is an image, or a slide that is cut into some."""
    return file.format == "image" or (file.format == "slide" and parts.mpp is not None)


def _images(name: str, parts: Parts) -> list[str]:
    if not os.path.isdir(name):
        return [name]
    found = [file.path for files in expand([name]) for file in files if is_image(file, parts)]
    if not found:
        raise ValueError(f"{name}: no images in this folder, nor slides with --mpp")
    return found


def table(rows: pa.Table, parts: Parts, on_file: OnFile = int) -> pa.Table:
    """Rows whose images are the parts that are asked for.

    A file that cannot be opened stays as it is: who reads it says why. So do those that hold one
    image, and texts.

    Args:
        rows: with `id`, `source` and `kind`.
        parts: what is asked for.
        on_file: called with 1 for each file that was looked at.

    Returns:
        The rows in order (with `parts.series` that of the slices, all together where the first one
        was), ids and sources ending in "#" and the part, and the columns of `EXTRA` that it has.

    Raises:
        ValueError: nothing is left.
    """
    if not _asked(parts):
        return rows
    images = pc.equal(rows["kind"].cast(pa.string()), "image").to_numpy(zero_copy_only=False)
    found = [s if i else "" for s, i in zip(rows["source"].to_pylist(), images, strict=True)]
    pieces = _pieces(found, parts, on_file)
    rows_of = np.repeat([p.row for p in pieces], [len(p) for p in pieces])
    taken = rows.take(pa.array(rows_of.astype(np.int64)))
    strings = pa.large_string()
    suffixes = pa.array([suffix for piece in pieces for suffix in piece.suffixes], strings)
    for name in ("id", "source"):
        joined = pc.binary_join_element_wise(taken[name], suffixes, pa.scalar("", strings))
        taken = taken.set_column(taken.column_names.index(name), taken.field(name), joined)
    for field in EXTRA:
        if any(field.name in piece.columns for piece in pieces):
            taken = taken.append_column(field, _column(field, pieces))
    return taken


def _column(field: pa.Field, pieces: Sequence[_Piece]) -> pa.Array:
    chunks = [
        pa.array(piece.columns[field.name], field.type)
        if field.name in piece.columns
        else pa.nulls(len(piece), field.type)
        for piece in pieces
    ]
    return pa.concat_arrays(chunks)  # a slice of many chunks takes milliseconds


def _asked(parts: Parts) -> bool:
    return parts.series or parts.step is not None or parts.mpp is not None


def _pieces(found: Sequence[str], parts: Parts, on_file: OnFile) -> list[_Piece]:
    """What becomes of each source; "" is none.

    Raises:
        ValueError: there were some, and nothing is left.
    """
    pieces = list(_expanded(found, parts, on_file))
    if found and not sum(map(len, pieces)):
        raise ValueError(
            f"{found[0]}{' and all others' if len(found) > 1 else ''}: no tile of a slide has so "
            f"much tissue (--tissue {parts.tissue:g}; 0 for all), no series the slice asked for"
        )
    if parts.mpp is not None:
        _warn_of_slides(found, pieces, parts)
    return pieces


def _expanded(found: Sequence[str], parts: Parts, on_file: OnFile) -> Iterator[_Piece]:
    """Without slides that were there before: in DICOM each level of one is a file."""
    seen = set()
    for piece in _pieces_of_all(found, parts, on_file):
        yield _Piece(piece.row, ()) if piece.shared in seen else piece
        seen |= {piece.shared} - {None}


def _pieces_of_all(found: Sequence[str], parts: Parts, on_file: OnFile) -> Iterator[_Piece]:
    if parts.series:
        return _slices(found, parts, on_file)
    return _in_threads(lambda row: _piece(row, found[row], parts), len(found), on_file)


def _slices(found: Sequence[str], parts: Parts, on_file: OnFile) -> Iterator[_Piece]:
    """Of each stack those that are asked for; other files as they would be without series."""

    def look(row: int) -> tuple[list[series.Plane], _Piece | None]:
        of_file = _planes(found[row], parts)
        return of_file, None if of_file else _piece(row, found[row], parts)

    looked = list(_in_threads(look, len(found), on_file))
    planes = [of_file for of_file, _ in looked]
    stacks = series.stacks(planes)
    _warn(stacks, parts)
    places: list[tuple[int, _Piece | series.Stack]] = [
        *((min(stack.slots).file, stack) for stack in stacks.found),
        *((piece.row, piece) for _, piece in looked if piece is not None),
    ]
    for _, stack in sorted(places, key=lambda place: place[0]):
        if isinstance(stack, _Piece):
            yield stack
            continue
        for number in parts.chosen(len(stack.slots)):
            file, frame = stack.slots[number]
            yield _Piece(file, [Frame(frame)] if len(planes[file]) > 1 else None)


def _planes(source: str, parts: Parts) -> list[series.Plane]:
    file, part = parse(source)
    if not file or isinstance(part, (Frame, Tile)):
        return []
    if part is None and sources.is_cut(file, parts):
        return []
    try:
        return sources.planes(file, part)
    except UnreadableImage:
        return []


def _warn(stacks: series.Stacks, parts: Parts) -> None:
    """Says once what a user may not expect."""
    notes = []
    if stacks.copies:
        notes.append(f"{stacks.copies} files are copies of others and left out")
    if stacks.split:
        notes.append(f"{stacks.split} series have several orientations, each sorted by itself")
    for order in ("instance number", "name"):
        if count := sum(s.order == order and len(s.slots) > 1 for s in stacks.found):
            notes.append(f"{count} series do not say where their slices are: sorted by {order}")
    if count := sum(not parts.chosen(len(s.slots)) for s in stacks.found):
        notes.append(f"{count} series have no slice {parts.frame} and are left out")
    if notes:
        warnings.warn(f"DICOM series: {'; '.join(notes)}", stacklevel=2)


def _warn_of_slides(found: Sequence[str], pieces: Sequence[_Piece], parts: Parts) -> None:
    notes = []
    if count := sum(bool(piece.columns) and not len(piece) for piece in pieces):
        notes.append(
            f"{count} have no tile with so much tissue (--tissue {parts.tissue:g}) and are left out"
        )
    if count := sum("://" in s and s.lower().endswith(_MAY_BE_SLIDES) for s in found):
        notes.append(
            f"{count} remote files are not cut into tiles: OpenSlide reads local files only"
        )
    if notes:
        warnings.warn(f"slides: {'; '.join(notes)}", stacklevel=2)


def _in_threads(make: Callable[[int], Any], count: int, on_file: OnFile) -> Iterator[Any]:
    with ThreadPoolExecutor(_WORKERS) as pool:
        for start in range(0, count, _BLOCK):
            for result in pool.map(make, range(start, min(start + _BLOCK, count))):
                on_file(1)
                yield result


def _piece(row: int, source: str, parts: Parts) -> _Piece:
    file, part = parse(source)
    if not file or isinstance(part, (Frame, Tile)):
        return _Piece(row)
    if part is None and sources.is_cut(file, parts):
        return _tiles(row, file, parts)
    try:
        if parts.step is not None and (count := sources.frames(file, part)) > 1:
            return _Piece(row, [Frame(n) for n in parts.chosen(count)])
    except UnreadableImage:
        pass
    return _Piece(row)


def _tiles(row: int, file: str, parts: Parts) -> _Piece:
    try:
        columns, shared = sources.tiles(file, parts)
    except UnreadableImage:  # as an image it may be the slide's label, which names the patient
        return _Piece(row, [_NONE], _COLUMNS_OF_NONE)
    places = zip(*(columns[name].tolist() for name in Tile._fields), strict=True)
    return _Piece(row, [Tile(*place) for place in places], columns, shared)
