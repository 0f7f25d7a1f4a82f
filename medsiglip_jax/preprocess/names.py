"""How a source names a file, or a part of one.

* FILE#frame=N: frame N of a DICOM file, GIF, APNG, WebP or AVIF, from 0; page N of a TIFF, where
  reduced versions of other pages do not count; axial slice N of a NIfTI volume, from the feet up.
* FILE#tile=X,Y,LEVEL,SIZE: of a slide, SIZE x SIZE pixels of that level whose upper left corner is
  (X, Y) in pixels of level 0. SIZE is 0 where the slide cannot be cut; reading it then says why.
* FILE#OFFSET:LENGTH: bytes of a file, such as an image in a shard.
* FILE#row=N,COLUMN: the picture in row N of a Parquet table, from 0. FILE#frame=N may be a frame of
  either of these, too.

A file that exists under such a name is that file, not a part of another one.
"""

import os
import re
from typing import NamedTuple

# What `escaped` makes of a byte that is not UTF-8, which Python has as half of a surrogate pair.
_ESCAPED_BYTE = re.compile(r"\\u(dc[89a-f][0-9a-f])")

MIDDLE = "middle"


class Frame(NamedTuple):
    """A frame or slice, from 0."""

    number: int

    def __str__(self) -> str:
        return f"frame={self.number}"


class Tile(NamedTuple):
    """A square of a slide: x and y are pixels of level 0, size is in pixels of `level`."""

    x: int
    y: int
    level: int
    size: int

    def __str__(self) -> str:
        return "tile={},{},{},{}".format(*self)


class Range(NamedTuple):
    """Bytes of a file."""

    offset: int
    length: int

    def __str__(self) -> str:
        return "{}:{}".format(*self)


class Cell(NamedTuple):
    """A picture in a table; rows are counted from 0."""

    row: int
    column: str

    def __str__(self) -> str:
        return "row={},{}".format(*self)


Part = Frame | Tile | Range | Cell
# Parts that have bytes of their own: a whole encoded image each.
Whole = Range | Cell
_NUMBER = r"\d{1,18}"  # fits 64 bits; Python refuses to read one of 5,000 digits
_FORMS = {
    Frame: re.compile(rf"(.*)#frame=({_NUMBER})", re.DOTALL),
    Tile: re.compile(rf"(.*)#tile=(-?{_NUMBER}),(-?{_NUMBER}),({_NUMBER}),({_NUMBER})", re.DOTALL),
    Range: re.compile(rf"(.*)#({_NUMBER}):({_NUMBER})", re.DOTALL),
}
_CELL = re.compile(rf"(.*?)#row=({_NUMBER}),(.+)", re.DOTALL)


def escaped(path: str) -> str:
    """A path in which bytes that are not UTF-8 are escaped, since neither Arrow nor JSON can hold
    them: "\\udcff" is the byte 255. `parse` finds the file."""
    return path.encode("utf-8", "backslashreplace").decode()


def parse(source: str) -> tuple[str, Part | None]:
    """The file that a source names, and which part of it; None is the whole file."""
    if not ("#" in source or r"\udc" in source) or os.path.exists(source):
        return source, None
    file, part = _parse(source)
    if r"\udc" in file and not os.path.exists(file):
        file = _ESCAPED_BYTE.sub(lambda byte: chr(int(byte[1], 16)), file)
    return file, part


def _parse(source: str) -> tuple[str, Part | None]:
    for kind, form in _FORMS.items():
        if match := form.fullmatch(source):
            file, *numbers = match.groups()
            return file, kind(*map(int, numbers))
    if match := _CELL.fullmatch(source):
        return match[1], Cell(int(match[2]), match[3])
    return source, None


def part_of(file: str, part: Part) -> str:
    """The source that names a part of a file; `parse` takes it apart again."""
    return f"{file}#{part}"


def frame_number(wanted: int | str, count: int) -> int:
    """Which of `count` frames is wanted: a number, which may be too large, or "middle"."""
    return count // 2 if wanted == MIDDLE else int(wanted)
