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

from medsiglip_jax.listing import expand
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.decode import UnreadableImage, needing
from medsiglip_jax.preprocess.dicom import series
from medsiglip_jax.preprocess.parts import Parts
from medsiglip_jax.preprocess.sources import Frame, Part, Tile, part_of
from medsiglip_jax.rows import EXTRA

OnFile = Callable[[int], Any]
# Headers are small, and a network disk gives each after a while.
_WORKERS = 16
_BLOCK = 4096  # files that wait for them


class _Piece(NamedTuple):
    """What becomes of a source: itself, or parts of it and what they have in `EXTRA`."""

    row: int
    parts: Sequence[Part] | None = None
    columns: Mapping[str, np.ndarray] = {}

    def __len__(self) -> int:
        return 1 if self.parts is None else len(self.parts)

    @property
    def suffixes(self) -> list[str]:
        return [""] if self.parts is None else [part_of("", part) for part in self.parts]


def names(given: Sequence[str], parts: Parts, on_file: OnFile = int) -> list[str]:
    """Sources, or the parts of them that are asked for, see `table`; of local folders, those of
    their images."""
    found = [source for name in given for source in _images(name)]
    if not _asked(parts):
        return found
    pieces = _pieces(found, parts, on_file)
    return [found[piece.row] + suffix for piece in pieces for suffix in piece.suffixes]


def _images(name: str) -> list[str]:
    if not os.path.isdir(name):
        return [name]
    found = [file.path for files in expand([name]) for file in files if file.format == "image"]
    if not found:
        raise ValueError(f"{name}: no images in this folder")
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
    suffixes = pa.chunked_array([pa.array(p.suffixes, strings) for p in pieces], strings)
    for name in ("id", "source"):
        joined = pc.binary_join_element_wise(taken[name], suffixes, pa.scalar("", strings))
        taken = taken.set_column(taken.column_names.index(name), taken.field(name), joined)
    for field in EXTRA:
        if any(field.name in piece.columns for piece in pieces):
            taken = taken.append_column(field, _column(field, pieces))
    return taken


def _column(field: pa.Field, pieces: Sequence[_Piece]) -> pa.ChunkedArray:
    chunks = [
        pa.array(piece.columns[field.name], field.type)
        if field.name in piece.columns
        else pa.nulls(len(piece), field.type)
        for piece in pieces
    ]
    return pa.chunked_array(chunks, field.type)


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
    return pieces


def _expanded(found: Sequence[str], parts: Parts, on_file: OnFile) -> Iterator[_Piece]:
    if parts.series:
        yield from _slices(found, parts, on_file)
        return

    def make(row: int) -> _Piece:
        return _Piece(row, *_parts_of(found[row], parts))

    pieces = _in_threads(make, len(found), on_file)
    yield from pieces if parts.mpp is None else _once(pieces, found)


def _once(pieces: Iterator[_Piece], found: Sequence[str]) -> Iterator[_Piece]:
    """Without slides that were there before: in DICOM each level of one is a file."""
    with needing("slides", "slides"):
        from medsiglip_jax.preprocess import slides
    seen = set()
    for piece in pieces:
        name = slides.shared_by(found[piece.row]) if piece.columns else None
        yield piece if name is None or name not in seen else _Piece(piece.row, ())
        seen.add(name)


def _slices(found: Sequence[str], parts: Parts, on_file: OnFile) -> Iterator[_Piece]:
    """Of each stack those that are asked for; other files as they would be without series."""
    planes = list(_in_threads(lambda row: _planes(found[row]), len(found), on_file))
    stacks = series.stacks(planes)
    _warn(stacks, parts)
    places: list[tuple[int, series.Stack | None]] = [
        *((min(stack.slots).file, stack) for stack in stacks.found),
        *((row, None) for row, of_file in enumerate(planes) if not of_file),
    ]
    for row, stack in sorted(places, key=lambda place: place[0]):
        if stack is None:
            yield _Piece(row, *_parts_of(found[row], parts))
            continue
        for number in parts.chosen(len(stack.slots)):
            file, frame = stack.slots[number]
            yield _Piece(file, [Frame(frame)] if len(planes[file]) > 1 else None)


def _planes(source: str) -> list[series.Plane]:
    file, part = sources.parse(source)
    if not file or isinstance(part, (Frame, Tile)):
        return []
    try:
        return sources.planes(source)
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


def _in_threads(make: Callable[[int], Any], count: int, on_file: OnFile) -> Iterator[Any]:
    with ThreadPoolExecutor(_WORKERS) as pool:
        for start in range(0, count, _BLOCK):
            for result in pool.map(make, range(start, min(start + _BLOCK, count))):
                on_file(1)
                yield result


def _parts_of(source: str, parts: Parts) -> tuple[Sequence[Part] | None, Mapping[str, np.ndarray]]:
    file, part = sources.parse(source)
    if not file or isinstance(part, (Frame, Tile)):
        return None, {}
    try:
        if parts.mpp is not None and part is None and (tiles := _tiles(file, parts)) is not None:
            places = zip(*(tiles[name].tolist() for name in Tile._fields), strict=True)
            return [Tile(*place) for place in places], tiles
        if parts.step is not None and (count := sources.frames(source)) > 1:
            return [Frame(n) for n in parts.chosen(count)], {}
    except UnreadableImage:
        pass
    return None, {}


def _tiles(file: str, parts: Parts) -> Mapping[str, np.ndarray] | None:
    if not os.path.isfile(file):
        return None
    with needing("slides", "slides"):
        from medsiglip_jax.preprocess import slides
    return slides.tiles(file, parts) if slides.is_slide(file) else None
