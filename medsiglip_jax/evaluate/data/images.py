"""Which image files the rows of a table name, and which of those are there."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medsiglip_jax.data.listing import IMAGE_SUFFIXES
from medsiglip_jax.evaluate.data.dataset import check_settings, where_to_get
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files.places import Place
from medsiglip_jax.preprocess.names import parse

SETTINGS = "path each find name on parse known_missing"

Row = Mapping[str, str]


@dataclass
class Images:
    """Pairs of the number of a row and the path of an image, below the folder.

    Attributes:
        found: may hold several images of a row, and a row of several images.
        missing: expected and not there.
        counts: of what is neither.
    """

    found: list[tuple[int, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def find(task: Task, root: Place, rows: Sequence[Row]) -> Images:
    """Finds the images of rows.

    `data.images` of the task holds one of:

    * `path`: templates with {column}; the first file that exists is the image of the row.
    * `each`: templates; all that are not empty are images of the row.
    * `find`: a glob; with `name`, a template of a file name whose suffix and case do not matter,
      or with `parse`, a regular expression over the path whose named groups are what the row has
      in the columns `on`; then a row may have several images.

    and may hold `known_missing`, files that the data set itself lacks.

    Raises:
        FileNotFoundError: none is there.
    """
    settings = task.data["images"]
    needed = "parse on" if "find" in settings and "name" not in settings else ""
    check_settings(task, settings, SETTINGS, "data.images", needed)
    placed = _searched(root, rows, settings) if "find" in settings else Images()
    if "find" not in settings:
        _at_their_paths(root, rows, settings, placed)
    if not placed.found:
        raise FileNotFoundError(
            f"{root}: none of the {len(placed.missing)} images of {task.title} is there; expected "
            f"{', '.join(placed.missing[:3])}, …{where_to_get(task)}"
        )
    return placed


def templates(settings: Mapping[str, Any]) -> list[str]:
    """All templates in `data.images`."""
    name = [settings["name"]] if "name" in settings else []
    return [*settings.get("path", ()), *settings.get("each", ()), *name]


def stem(name: str) -> str:
    """A file name without folder, case and, if it is that of an image, suffix."""
    path = PurePosixPath(name)
    return (path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name).lower()


def below(root: Place, path: Place) -> str:
    """The path below a folder, with slashes."""
    if isinstance(path, Path):
        return path.relative_to(str(root)).as_posix()
    return str(path).removeprefix(str(root)).lstrip("/")


def _at_their_paths(root: Place, rows: Sequence[Row], settings: Mapping[str, Any], placed: Images):
    known, absent = set(settings.get("known_missing", ())), 0
    for i, row in enumerate(rows):
        for names in _wanted(row, settings):
            there = [name for name in names if _is_there(root, name)]
            if there:
                placed.found.append((i, there[0]))
            elif known.isdisjoint(names):
                placed.missing.append(" or ".join(names))
            else:
                absent += 1
    if known:
        placed.counts["missing in the data set itself"] = absent


def _wanted(row: Row, settings: Mapping[str, Any]) -> Iterator[list[str]]:
    """Of every image of a row, the paths where it may be."""
    if "path" in settings:
        yield [template.format_map(row) for template in settings["path"]]
    for template in settings.get("each", ()):
        if name := template.format_map(row):
            yield [name]


def _is_there(root: Place, name: str) -> bool:
    """Remote files are taken to be: the engine will say, where this were a request for each."""
    return not isinstance(root, Path) or Path(parse(str(root / name))[0]).is_file()


def _searched(root: Place, rows: Sequence[Row], settings: Mapping[str, Any]) -> Images:
    files, unread = _index(root, settings)
    placed, used = Images(), set()
    for i, row in enumerate(rows):
        key = _key(row, settings)
        used.add(key)
        placed.found += [(i, name) for name in files.get(key, ())]
        if key not in files:
            placed.missing.append(f"{settings['find']} for {'/'.join(key)}")
    left = sum(len(names) for key, names in files.items() if key not in used)
    placed.counts = {"images without a label": left + unread}
    return placed


def _index(root: Place, settings: Mapping[str, Any]) -> tuple[dict[tuple, list[str]], int]:
    """Files by key, and how many the pattern does not fit."""
    pattern = re.compile(settings["parse"]) if "parse" in settings else None
    files, unread = defaultdict(list), 0
    for path in sorted(root.glob(settings["find"]), key=str):
        name = below(root, path)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        match = pattern.search(name) if pattern else None
        if pattern and not match:
            unread += 1
            continue
        key = tuple(match[n] for n in settings["on"]) if match else (stem(name),)
        files[key].append(name)
    return files, unread


def _key(row: Row, settings: Mapping[str, Any]) -> tuple[str, ...]:
    if "name" in settings:
        return (stem(settings["name"].format_map(row)),)
    return tuple(row[name] for name in settings["on"])
