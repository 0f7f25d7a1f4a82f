"""What inputs name: files, folders and globs, local or remote -> the files in them, in order."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import fsspec.core

from medsiglip_jax.places import Given, check_protocol, is_remote

# What a folder is searched for; a file that is named is tried whatever its name.
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .png .ppm .pgm .tif .tiff .webp".split()
)
MANIFEST_SUFFIXES = frozenset(".csv .tsv .jsonl .parquet".split())

_FORMATS = (
    {suffix: "image" for suffix in IMAGE_SUFFIXES}
    | {suffix: "manifest" for suffix in MANIFEST_SUFFIXES}
    | {".txt": "text", ".tar": "tar"}
)
_IN_FOLDERS = {"image", "text", "tar", "tfrecord"}  # a table beside images need not list them
_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)


class File(NamedTuple):
    """One file.

    Attributes:
        format: "image", "text", "tar", "tfrecord" or "manifest".
        root: the folder that was given, with a slash, or that of the file that was given.
        name: below `root`.
    """

    format: str
    root: str
    name: str

    @property
    def path(self) -> str:
        return self.root + self.name


def expand(inputs: Sequence[Given]) -> list[Iterable[File]]:
    """Lists the files that each input names: itself, those of a folder, those that a glob matches.

    Folders are searched recursively, in sorted order, for images, .txt, .tar and .tfrecord; hidden
    files are passed over. Globs match files, with `**` in any depth. What exists under a name
    that looks like a glob is that file. Local folders are read when their files are asked for.

    Raises:
        FileNotFoundError: all inputs that do not exist, and globs that match nothing.
    """
    found = [_remote(p) if is_remote(p) else _local(p) for p in map(str, inputs)]
    missing = [str(p) for p, files in zip(inputs, found, strict=True) if files is None]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")
    return [files for files in found if files is not None]


def _local(path: str) -> Iterable[File] | None:
    if os.path.isdir(path):
        root = "" if Path(path) == Path() else f"{str(Path(path)).rstrip('/')}/"
        return _in_folder(root, _walk(path))
    if os.path.exists(path):
        return [_named(str(Path(path)))]
    if not glob.has_magic(path):
        return None
    root = _fixed_part(path)
    names = sorted(glob.glob(path[len(root) :], root_dir=root or None, recursive=True))
    return _matched(root, (name for name in names if os.path.isfile(root + name)))


def _remote(uri: str) -> Iterable[File] | None:
    check_protocol(uri)
    system, path = fsspec.core.url_to_fs(uri)
    try:
        if system.info(path)["type"] != "directory":
            return [_named(uri)]
        names = sorted(_visible(path, system.find(path)), key=_walked)
        return _in_folder(f"{uri.rstrip('/')}/", names)
    except FileNotFoundError:
        if not glob.has_magic(uri):
            return None
    root = _fixed_part(uri)
    found = system.glob(path, detail=True)
    names = sorted(name for name, info in found.items() if info["type"] != "directory")
    return _matched(root, _visible(fsspec.core.url_to_fs(root)[1], names))


def _walk(path: str) -> Iterator[str]:
    for folder, folders, files in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(folder, path)
        prefix = "" if below == "." else f"{below}/"
        for name in sorted(files):
            if not name.startswith("."):
                yield prefix + name


def _raise(error: OSError) -> NoReturn:
    raise error  # os.walk would pass over a folder that may not be read


def _visible(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Names below a remote folder."""
    for name in names:
        below = name[len(folder) :].lstrip("/")
        if not below.startswith(".") and "/." not in below:
            yield below


def _walked(name: str) -> str:
    """Sorts as `_walk` does: in every folder first its files."""
    folder, slash, file = name.rpartition("/")
    below = "\0".join(f"1{part}" for part in folder.split("/")) + "\0" if slash else ""
    return f"{below}0{file}"


def _fixed_part(pattern: str) -> str:
    """The folder before the first wildcard, with its slash."""
    fixed = pattern[: re.search(r"[*?[]", pattern).start()]  # pyright: ignore[reportOptionalMemberAccess]
    return fixed[: fixed.rfind("/") + 1]


def _in_folder(root: str, names: Iterable[str]) -> Iterator[File]:
    for name in names:
        format = _format(name)
        if format in _IN_FOLDERS:
            yield File(format, root, name)


def _matched(root: str, names: Iterable[str]) -> list[File] | None:
    return [File(_format(name) or "image", root, name) for name in names] or None


def _named(path: str) -> File:
    folder, slash, name = path.rpartition("/")
    # A compressed tar has no place in a folder; where it is named, its reader says why.
    format = "tar" if _COMPRESSED_TAR.search(name) else _format(name) or "image"
    return File(format, folder + slash, name)


def _format(name: str) -> str | None:
    found = _FORMATS.get(name[name.rfind(".") :].lower())
    return found or ("tfrecord" if ".tfrecord" in name.rpartition("/")[2] else None)
