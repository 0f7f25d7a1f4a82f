"""What inputs name: files, folders and globs, local or remote -> the files in them, in order."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from medsiglip_jax.data.dicomweb import instances
from medsiglip_jax.files import dicomweb
from medsiglip_jax.files.credentials import without
from medsiglip_jax.files.places import WEB, Failed, Given, at, file_system, in_words, is_remote
from medsiglip_jax.files.threads import Step, stepping
from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess import formats
from medsiglip_jax.preprocess.facts import UnreadableImage, describe
from medsiglip_jax.preprocess.names import Part, Tile, parse

T = TypeVar("T")

# Of images whose content says what they are, so that they can also be members of a shard.
IMAGE_SUFFIXES = frozenset(suffix for f in formats.FORMATS if f.sniff for suffix in f.suffixes)
TABLE_SUFFIXES = frozenset(".csv .tsv .jsonl .parquet".split())

_NO_IMAGES = dict.fromkeys(TABLE_SUFFIXES, "table") | {".txt": "text", ".tar": "tar"}
# Tables are left out: one that lies beside images often lists the same images.
_IN_FOLDERS = {"image", "slide", "text", "tar", "tfrecord"}
_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
# An index of the DICOM files beside it, always of this name (PS3.10 8.6).
_DICOM_INDEX = "DICOMDIR"
# Where gcsfs ends a list of objects, without a word (core.py, `_sequential_list_objects_helper`);
# those that stand for empty folders are among them.
_MOST_OF_GCSFS = 10_000_000
# The last part of a DICOM UID, which is a number, is no suffix.
_SUFFIX = re.compile(r"\.(?!\d+$)\w{1,10}$", re.ASCII)


class File(NamedTuple):
    """One file.

    Attributes:
        format: "image", "slide", "text", "tar", "tfrecord" or "table"; "other" where a folder
            holds it and is not searched for such files.
        root: the folder that was given, with a slash, or the folder of the file that was given.
        name: below `root`.
        searched: a folder was given, and this file was met in it.
    """

    format: str
    root: str
    name: str
    searched: bool = False

    @property
    def path(self) -> str:
        """The local path or URI."""
        return self.root + self.name

    @property
    def suffix(self) -> str:
        """The suffix in lower case, of a compressed tar in full, or "no suffix"."""
        match = _COMPRESSED_TAR.search(self.name) or _SUFFIX.search(self.name)
        return match[0].lower() if match else "no suffix"


def expand(
    inputs: Sequence[Given], all_files: bool = False, on_step: Step = lambda: None
) -> list[Iterable[File]]:
    """Lists the files that each input names: itself, those of a folder, those that a glob matches.

    * Folders are searched recursively, in sorted order, for images, slides, .txt, .tar and
      .tfrecord. Their other files are listed as "other", hidden files not at all. Links to folders
      are followed. Local folders are read when their files are asked for.
    * A local file without a suffix is an image if its content says so, as that of DICOM files does;
      for remote files this would take a request each. With `all_files` so is any file that would
      else be "other", whatever its suffix, local or remote.
    * Globs match files, with `**` at any depth. A file whose own name looks like a glob is that
      file.
    * A part of a file (`preprocess.names`) is listed as it stands.
    * A study or series of a DICOMweb server (`files.dicomweb`) are its instances.

    `on_step` is called again and again, also while the files are taken, as long as disks and
    servers answer.

    Raises:
        FileNotFoundError: all inputs that do not exist, and globs that match nothing.
        Outage: a disk or network fails while the content of a file is looked at.
        ValueError: a bucket holds more objects than can be listed.
    """
    given = list(map(str, inputs))
    listed = [_listed(path, all_files, on_step) for path in given]
    missing = [path for path, files in zip(given, listed, strict=True) if files is None]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(map(describe, missing))}")
    return [each(files, on_step) for files in listed if files is not None]


def each(items: Iterable[T], on_step: Step) -> Iterator[T]:
    """The items, with a call of `on_step` for each, as `threads.watched` wants it."""
    for item in items:
        on_step()
        yield item


def _listed(path: str, all_files: bool, on_step: Step) -> Iterable[File] | None:
    on_step()
    if not is_remote(path):
        return _local(path, all_files, on_step)
    with waiting(path, on_step):
        return _of_dicomweb(path) if dicomweb.is_address(path) else _remote(path, all_files)


def waiting(path: str, on_step: Step) -> AbstractContextManager[None]:
    """A block of one long read, in which `on_step` is called of what is remote; see `stepping`."""
    return stepping(on_step) if is_remote(path) else nullcontext()


def _of_dicomweb(address: str) -> list[File]:
    """The instances of a study or series, which are named below it."""
    uris = instances(address)
    above = f"{dicomweb.over_https(address).rstrip('/')}/"
    root = above if not dicomweb.is_instance(address) else f"{uris[0].rpartition('/')[0]}/"
    return [File("image", root, uri[len(root) :]) for uri in uris]


def walk(
    top: str, below: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """Names below a local folder: sorted, the files of a folder before its folders, none hidden.

    Links to folders are followed, but not to a folder that they lie in.

    Args:
        top: the folder.
        below: the folder in it where to start, with a slash at its end.
        above: the folders that this one lies in: device and inode.

    Raises:
        OSError: a folder that may not be read.
    """
    folder = os.path.join(top, below)
    status = os.stat(folder)
    this = status.st_dev, status.st_ino
    if this in above:
        return
    with os.scandir(folder) as entries:
        is_folder = {e.name: _is_folder(e) for e in entries if not e.name.startswith(".")}
    names = sorted(is_folder)
    yield from (below + name for name in names if not is_folder[name])
    for name in names:
        if is_folder[name]:
            yield from walk(top, f"{below}{name}/", above | {this})


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _local(path: str, all_files: bool, on_step: Step) -> Iterable[File] | None:
    path = str(at(path)) if "://" in path else path  # file:// is local
    if os.path.isdir(path):
        root = "" if Path(path) == Path() else f"{str(Path(path)).rstrip('/')}/"
        return _in_folder(root, walk(path), _is_any_image if all_files else _has_known_content)
    file, part = parse(path)
    if os.path.exists(file):
        return [_named(str(Path(path)), part)]
    if not glob.has_magic(path):
        return None
    root = _fixed_part(path)
    matches = glob.iglob(path[len(root) :], root_dir=root or None, recursive=True)
    names = sorted(each(matches, on_step))
    return _matched(root, (n for n in each(names, on_step) if os.path.isfile(root + n)))


def _remote(uri: str, all_files: bool) -> Iterable[File] | None:
    system, path = file_system(uri)
    try:
        file, part = parse(path)
        if _info(system, file, uri)["type"] != "directory":
            return [_named(uri, part)]
        names = sorted(_visible(path, _found_below(system, path, uri)), key=_order_of_walk)
        is_image = _is_any_image if all_files else lambda path: False
        return _in_folder(f"{uri.rstrip('/')}/", names, is_image)
    except FileNotFoundError:
        if not glob.has_magic(without(uri)):
            return None
    root = _fixed_part(uri)
    entries = system.glob(path, detail=True)
    names = sorted(name for name, info in entries.items() if info["type"] != "directory")
    return _matched(root, _visible(file_system(root)[1], names))


def _found_below(system: Any, folder: str, uri: str) -> list[str]:
    """All files of a remote folder.

    Raises:
        ValueError: the list may lack some.
    """
    if not uri.startswith("gs://"):
        return system.find(folder)
    found = system.find(folder, withdirs=True, detail=True)
    if len(found) >= _MOST_OF_GCSFS:
        raise ValueError(
            f"{uri}: holds about {len(found):,} files and folders or more, and no more can be "
            "listed at once; name the folders in it instead, or a table of its files"
        )
    return [name for name, info in found.items() if info["type"] != "directory"]


def _info(system: Any, file: str, uri: str) -> Mapping[str, Any]:
    """Facts about a remote file. An address whose server refuses or fails counts as a file: reading
    it says so, as in a table, since one of many does not end a run."""
    try:
        with in_words(uri):
            return system.info(file)
    except Failed:
        return {"type": "file"}


def _visible(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Names below a remote folder, without hidden ones."""
    for name in names:
        below = name[len(folder) :].lstrip("/")
        if not below.startswith(".") and "/." not in below:
            yield below


def _order_of_walk(name: str) -> list[tuple[int, str]]:
    *folders, file = name.split("/")
    return [*((1, folder) for folder in folders), (0, file)]


def _fixed_part(pattern: str) -> str:
    """The folder before the first wildcard, with its slash."""
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def _in_folder(root: str, names: Iterable[str], is_image: Callable[[str], bool]) -> Iterator[File]:
    for name in names:
        format = _format(name) or ("image" if is_image(root + name) else "")
        yield File(format if format in _IN_FOLDERS else "other", root, name, True)


def _has_known_content(path: str) -> bool:
    """Whether a local file without a suffix is of a format that says so in its first bytes."""
    if _SUFFIX.search(os.path.basename(path)):
        return False
    return _starts_as(path, lambda start: formats.by_content(start) is not formats.PICTURES)


def _is_any_image(path: str) -> bool:
    """Whether a file, local or remote, is an image by its first bytes, whatever its name."""
    return _starts_as(path, formats.is_image)


def _starts_as(path: str, is_image: Callable[[bytes], bool]) -> bool:
    """Whether a file is an image by its first bytes. One that may not be read counts as an image,
    for it may be one, and reading it says why it cannot be read."""
    if os.path.basename(path) == _DICOM_INDEX or not (is_remote(path) or os.path.isfile(path)):
        return False
    try:
        start = content.looked_at(path, None, lambda stream: stream.read(formats.START))
    except UnreadableImage:
        return True
    return is_image(start)


def _matched(root: str, names: Iterable[str]) -> list[File] | None:
    return [File(_format(name) or "image", root, name) for name in names] or None


def _named(path: str, part: Part | None) -> File:
    # Elsewhere a name may have a "?".
    folder, slash, _ = (path.partition("?")[0] if path.startswith(WEB) else path).rpartition("/")
    name = path[len(folder + slash) :]
    # A compressed tar is not searched for in folders; where it is named, its reader says why.
    format = "tar" if _COMPRESSED_TAR.search(name) else _format(name)
    if part is not None or format is None or format == "slide":
        format = "image"
    return File(format, folder + slash, name)


def _format(name: str) -> str | None:
    if image := formats.by_suffix(name):
        return "slide" if image.part is Tile else "image"
    suffix = name[name.rfind(".") :].lower()
    is_tfrecord = ".tfrecord" in name.rpartition("/")[2]
    return _NO_IMAGES.get(suffix) or ("tfrecord" if is_tfrecord else None)
