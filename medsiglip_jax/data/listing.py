"""What inputs name: files, folders and globs, local or remote -> the files in them, in order."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from medsiglip_jax.files.opener import file_system
from medsiglip_jax.files.places import Given, at, is_remote
from medsiglip_jax.preprocess import formats
from medsiglip_jax.preprocess.names import Tile, parse

# Of images that are recognised by their content, so that they may lie in a shard, too.
IMAGE_SUFFIXES = frozenset(
    suffix for format in formats.FORMATS if format.sniff for suffix in format.suffixes
)
MANIFEST_SUFFIXES = frozenset(".csv .tsv .jsonl .parquet".split())

_OTHERS = {suffix: "manifest" for suffix in MANIFEST_SUFFIXES} | {".txt": "text", ".tar": "tar"}
# A table beside images need not list them.
_IN_FOLDERS = {"image", "slide", "text", "tar", "tfrecord"}
_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
# An index of the DICOM files beside it, always of this name (PS3.10 8.6).
_DICOM_INDEX = "DICOMDIR"
# The last part of a DICOM UID is none.
_SUFFIX = re.compile(r"\.(?!\d+$)\w{1,10}$", re.ASCII)


class File(NamedTuple):
    """One file.

    Attributes:
        format: "image", "slide", "text", "tar", "tfrecord" or "manifest"; "other" of those in a
            folder that are none of what it is searched for.
        root: the folder that was given, with a slash, or that of the file that was given.
        name: below `root`.
    """

    format: str
    root: str
    name: str

    @property
    def path(self) -> str:
        return self.root + self.name

    @property
    def suffix(self) -> str:
        """In lower case, that of a compressed tar in full; "no suffix" if there is none."""
        found = _COMPRESSED_TAR.search(self.name) or _SUFFIX.search(self.name)
        return found[0].lower() if found else "no suffix"


def expand(inputs: Sequence[Given]) -> list[Iterable[File]]:
    """Lists the files that each input names: itself, those of a folder, those that a glob matches.

    Folders are searched recursively, in sorted order, for images, slides, .txt, .tar and
    .tfrecord; their other files are listed as such, hidden ones not at all. A local file without a
    suffix is an image if it starts as DICOM does; of remote ones, each would be a request. Links to
    folders are followed. Globs match files, with `**` in any depth. What exists under a name that
    looks like a glob is that file. A part of a file (`preprocess.sources`) is listed as it stands.
    Local folders are read when their files are asked for.

    Raises:
        FileNotFoundError: all inputs that do not exist, and globs that match nothing.
    """
    found = [_remote(p) if is_remote(p) else _local(_plain(p)) for p in map(str, inputs)]
    missing = [str(p) for p, files in zip(inputs, found, strict=True) if files is None]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")
    return [files for files in found if files is not None]


def walk(folder: str) -> Iterator[str]:
    """Names below a local folder, in sorted order, in every folder first its files; none hidden.

    Links to folders are followed, but not to one that they lie in.

    Raises:
        OSError: a folder that may not be read.
    """
    yield from _walk(folder, "", frozenset())


def _walk(top: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    folder = os.path.join(top, below)
    status = os.stat(folder)
    this = status.st_dev, status.st_ino
    if this in above:
        return
    with os.scandir(folder) as entries:
        kinds = {e.name: _is_folder(e) for e in entries if not e.name.startswith(".")}
    names = sorted(kinds)
    yield from (below + name for name in names if not kinds[name])
    for name in names:
        if kinds[name]:
            yield from _walk(top, f"{below}{name}/", above | {this})


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _plain(path: str) -> str:
    return str(at(path)) if "://" in path else path  # file:// is local


def _local(path: str) -> Iterable[File] | None:
    if os.path.isdir(path):
        root = "" if Path(path) == Path() else f"{str(Path(path)).rstrip('/')}/"
        return _in_folder(root, walk(path), _is_known)
    if os.path.exists(parse(path)[0]):
        return [_named(str(Path(path)))]
    if not glob.has_magic(path):
        return None
    root = _fixed_part(path)
    names = sorted(glob.glob(path[len(root) :], root_dir=root or None, recursive=True))
    return _matched(root, (name for name in names if os.path.isfile(root + name)))


def _remote(uri: str) -> Iterable[File] | None:
    system, path = file_system(uri)
    try:
        if system.info(parse(path)[0])["type"] != "directory":
            return [_named(uri)]
        names = sorted(_visible(path, system.find(path)), key=_walked)
        return _in_folder(f"{uri.rstrip('/')}/", names)
    except FileNotFoundError:
        if not glob.has_magic(uri):
            return None
    root = _fixed_part(uri)
    found = system.glob(path, detail=True)
    names = sorted(name for name, info in found.items() if info["type"] != "directory")
    return _matched(root, _visible(file_system(root)[1], names))


def _visible(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Names below a remote folder."""
    for name in names:
        below = name[len(folder) :].lstrip("/")
        if not below.startswith(".") and "/." not in below:
            yield below


def _walked(name: str) -> str:
    """Sorts as `walk` does: in every folder first its files."""
    folder, slash, file = name.rpartition("/")
    below = "\0".join(f"1{part}" for part in folder.split("/")) + "\0" if slash else ""
    return f"{below}0{file}"


def _fixed_part(pattern: str) -> str:
    """The folder before the first wildcard, with its slash."""
    fixed = pattern[: re.search(r"[*?[]", pattern).start()]  # pyright: ignore[reportOptionalMemberAccess]
    return fixed[: fixed.rfind("/") + 1]


def _in_folder(
    root: str, names: Iterable[str], is_image: Callable[[str], bool] = lambda path: False
) -> Iterator[File]:
    for name in names:
        format = _format(name) or ("image" if is_image(root + name) else "")
        yield File(format if format in _IN_FOLDERS else "other", root, name)


def _is_known(path: str) -> bool:
    """Whether a local file without a suffix has the content of an image, as DICOM files have."""
    name = os.path.basename(path)
    if _SUFFIX.search(name) or name == _DICOM_INDEX or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return formats.by_content(file.read(formats.START)) is not formats.PICTURES
    except OSError:
        return False


def _matched(root: str, names: Iterable[str]) -> list[File] | None:
    return [File(_format(name) or "image", root, name) for name in names] or None


def _named(path: str) -> File:
    folder, slash, name = path.rpartition("/")
    # A compressed tar has no place in a folder; where it is named, its reader says why.
    format = "tar" if _COMPRESSED_TAR.search(name) else _format(name)
    if parse(path)[1] is not None:  # a part of a shard, too, is an image
        format = "image"
    return File("image" if format in (None, "slide") else format, folder + slash, name)


def _format(name: str) -> str | None:
    if image := formats.by_suffix(name):
        return "slide" if image.part is Tile else "image"
    other = _OTHERS.get(name[name.rfind(".") :].lower())
    return other or ("tfrecord" if ".tfrecord" in name.rpartition("/")[2] else None)
