"""What to embed: files and folders -> rows."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# What a folder is searched for; a file named on the command line is tried whatever its name.
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .png .ppm .pgm .tif .tiff .webp".split()
)


@dataclass(frozen=True)
class Row:
    """One thing to embed.

    Attributes:
        id: unique in its run: the path below the folder given, or FILE:LINE for a text.
        source: the file.
        kind: "image" or "text".
        text: the text itself where kind is "text".
    """

    id: str
    source: str
    kind: str
    text: str | None = None


def rows(inputs: Sequence[str | os.PathLike]) -> list[Row]:
    """Lists images (files, and folders searched recursively) and texts (.txt, one per line).

    Folders are walked in sorted order; hidden files and other kinds of file in them are passed
    over. Where two inputs give the same id, all ids become paths as given.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: nothing to embed, or an input is listed twice.
    """
    if missing := [str(p) for p in inputs if not Path(p).exists()]:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")
    found = [row for path in inputs for row in _rows_of(Path(path))]
    if not found:
        names = ", ".join(map(str, inputs)) or "no input"
        raise ValueError(
            f"nothing to embed in {names}; expected images "
            f"({' '.join(sorted(s[1:] for s in IMAGE_SUFFIXES))}) or .txt files, one text a line"
        )
    if len({row.id for row in found}) < len(found):
        found = [Row(_full_id(row), row.source, row.kind, row.text) for row in found]
    seen: set[str] = set()
    for row in found:
        if row.id in seen:
            raise ValueError(f"{row.id} is given twice; name each input once")
        seen.add(row.id)
    return found


def _rows_of(path: Path) -> Iterator[Row]:
    if not path.is_dir():
        yield from _file_rows(path, path.name)
        return
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            file = Path(folder, name)
            if not name.startswith(".") and file.suffix.lower() in IMAGE_SUFFIXES | {".txt"}:
                yield from _file_rows(file, file.relative_to(path).as_posix())


def _file_rows(path: Path, name: str) -> Iterator[Row]:
    if path.suffix.lower() != ".txt":
        yield Row(name, str(path), "image")
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Row(f"{name}:{number}", str(path), "text", line.strip())


def _full_id(row: Row) -> str:
    line = row.id[row.id.rindex(":") :] if row.kind == "text" else ""
    return Path(row.source).as_posix() + line
