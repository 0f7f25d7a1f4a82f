"""Local paths and remote places (gs:// and whatever else fsspec reaches), used alike."""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

import fsspec
import fsspec.core
from upath import UPath

# A local path, or a remote place with the same methods.
Place = Path | UPath
# What callers may pass for a place.
Given = str | os.PathLike | UPath


def is_remote(path: Given) -> bool:
    """Whether this is gs:// or another remote protocol, even if `Path` has made it "gs:/"."""
    return _protocol(path) not in ("", "file", "local")


def _protocol(path: Given) -> str:
    match = re.match(r"([a-z][a-z0-9+]+):/", str(path))
    return match[1] if match else ""


def at(path: Given) -> Place:
    """The place that a path or URI names.

    Raises:
        ValueError: nothing that is installed supports its protocol.
    """
    uri = re.sub(":/(?!/)", "://", str(path), count=1) if _protocol(path) else str(path)
    if not is_remote(path):
        return Path(fsspec.core.url_to_fs(uri)[1] if _protocol(path) else uri)
    check_protocol(uri)
    return UPath(uri, use_listings_cache=False)  # other machines write there too


def cache() -> Path:
    """The folder for local copies: `medsiglip_jax/` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "medsiglip_jax")


def configuration() -> Path:
    """The folder for settings: `medsiglip_jax/` in $XDG_CONFIG_HOME or ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "medsiglip_jax")


def check_protocol(path: str) -> None:
    """Raises a ValueError, saying what to install, if nothing here can reach `path`."""
    protocol = path.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path}: {protocol}:// cannot be reached here: {error}") from error


def refuse_remote(path: Given) -> None:
    """Raises a ValueError for a URI such as gs://…, which `Path` would take for a folder "gs:"."""
    if is_remote(path):
        raise ValueError(f"{path}: only a local folder can be used here")


def check_suffix(path: Given, *suffixes: str) -> str:
    """The suffix of a name in lower case, a ValueError unless it is one of these."""
    if (suffix := Path(str(path)).suffix.lower()) not in suffixes:
        raise ValueError(f"{path}: expected a name ending in {' or '.join(suffixes)}")
    return suffix


# Names that Windows keeps for devices, whatever their suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)
PLAIN_NAME = "a plain file name of letters, digits, spaces, '.', '-', '_' and '+'"


def is_plain_name(name: Any) -> bool:
    """Whether a name that a file holds may become part of a path, and leads nowhere else.

    Every name that someone else has written and that ends in a path is held to this: parts of a
    manifest, shards of an index, readings of a task.
    """
    return (
        isinstance(name, str)
        and re.fullmatch(r"[\w+-][\w .+-]*", name) is not None
        and len(name.encode()) <= 200  # file systems take 255, and some of ours add to a name
        and name[-1] not in " ."
        and not _DEVICES.fullmatch(name)
    )


def stays_below(path: str) -> bool:
    """Whether a path is relative and leads to nothing above where it starts."""
    up = posixpath.normpath(path.replace("\\", "/")).split("/")[0] == ".."
    return not (up or Path(path).anchor or is_remote(path))


def below(folder: Place, name: str) -> Place:
    """The place in a folder, or below it, that a name leads to; links in there are followed.

    Raises:
        ValueError: the name leads out of the folder, or might.
    """
    path = Path(name)
    if isinstance(folder, Path) and path.is_relative_to(folder.absolute()):
        path = path.relative_to(folder.absolute())
    if not stays_below(str(path)):
        raise ValueError(f"{name!r} leads out of {folder}; expected a path below it")
    return folder / path.as_posix()


def check_writable(path: Place) -> None:
    """Raises an error before any work is done, if a local `path` cannot be created."""
    if not isinstance(path, Path):
        return
    refuse_remote(path)
    if not _is_utf8(str(path)):
        raise ValueError(f"{path}: names of outputs must be UTF-8; choose another name")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{path}: cannot be written, {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: cannot be written, no permission in {parent}")


def _is_utf8(name: str) -> bool:
    """Whether a name can be written into files and passed to libraries in C++."""
    try:
        name.encode()
    except UnicodeEncodeError:  # a byte of a file name that Python could not decode
        return False
    return True


def check_new(path: Place) -> None:
    """Raises unless `path` can be created and does not exist yet, or is an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path}: already exists; choose another name or remove it first")
    check_writable(path)


# fsspec.open would take "::" in a name for a chain of file systems; these take names literally.


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a remote URI, and the name of the file there.

    Raises:
        ValueError: nothing that is installed supports its protocol.
    """
    check_protocol(uri)
    protocol = uri.partition("://")[0]
    kind = fsspec.get_filesystem_class(protocol)
    return fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)


def open_binary(path: str) -> Any:
    """Opens a file, local or remote, for reading bytes."""
    if not is_remote(path):
        return at(path).open("rb")
    system, name = file_system(path)
    return system.open(name, "rb")


def read_bytes(path: str) -> bytes:
    """The content of a file, local or remote (in a single request)."""
    if not is_remote(path):
        return at(path).read_bytes()
    system, name = file_system(path)
    return system.cat_file(name)
