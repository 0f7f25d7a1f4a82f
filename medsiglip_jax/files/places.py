"""Local paths and remote places (gs:// and whatever else fsspec reaches), used alike."""

import contextlib
import io
import os
import posixpath
import re
from collections.abc import Collection, Iterator
from http.client import responses
from pathlib import Path
from typing import Any

import fsspec
import fsspec.core
from upath import UPath

from medsiglip_jax.files import dicomweb, limits
from medsiglip_jax.files.credentials import without

# A local path, or a remote place with the same methods.
Place = Path | UPath
WEB = ("http://", "https://")
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
    options = _options(uri)
    return UPath(uri, use_listings_cache=False, **options)  # other machines write there too


def cache() -> Path:
    """The folder for local copies: `medsiglip_jax/` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "medsiglip_jax")


def configuration() -> Path:
    """The folder for settings: `medsiglip_jax/` in $XDG_CONFIG_HOME or ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "medsiglip_jax")


class NotReachable(ValueError):
    """Nothing that is installed supports the protocol of an address."""


class NotAllowed(NotReachable):
    """The protocol of an address is not among those of `limits`."""


def check_protocol(path: str) -> None:
    """Raises `NotReachable` or `NotAllowed`, saying what to do, if nothing here reaches `path`."""
    protocol = path.partition("://")[0]
    reached = f"{without(path)}: {protocol}:// cannot be reached here"
    if protocol not in limits.current().protocols:
        raise NotAllowed(
            f"{reached}: only local files, gs://, https://, http:// and hf:// are; --protocols "
            f"{protocol} allows it"
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise NotReachable(f"{reached}: {error}") from error


# Protocols whose answers `web` counts and times.
_COUNTED = ("gs", "http", "https")


def _options(uri: str) -> dict[str, Any]:
    """The arguments of the file system of a URI.

    Raises:
        ValueError: as `check_protocol` does.
    """
    check_protocol(uri)
    protocol = uri.partition("://")[0]
    if protocol not in _COUNTED:
        return {}
    from medsiglip_jax.files import web  # aiohttp comes with gcsfs

    headers = dicomweb.headers(uri)
    return {**web.options(protocol), **({"headers": headers} if headers else {})}


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


def visible(folder: Place) -> set[str]:
    """The names in a folder that are not hidden, as locks and temporary files are."""
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")}


def foreign(folder: Place, own: Collection[str] = ()) -> set[str]:
    """The names in a folder, hidden ones too, that would be lost if it were replaced, besides those
    of `own` and what macOS leaves in each folder that somebody looks at."""
    return {p.name for p in folder.iterdir()} - {*own, ".DS_Store"}


def check_new(path: Place) -> None:
    """Raises unless `path` can be created and does not exist yet, or is an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path}: already exists; choose another name or remove it first")
    check_writable(path)


# fsspec.open would take "::" in a name for a chain of file systems; these take names literally.


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a remote URI, and the name of the file there.

    Raises:
        ValueError: its protocol is not allowed, or nothing that is installed supports it.
    """
    options, protocol = _options(uri), uri.partition("://")[0]
    kind = fsspec.get_filesystem_class(protocol)
    system = fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(uri), **options)
    return system, kind._strip_protocol(uri)


class Failed(ConnectionError):
    """A server does not give a file; one line, with the address and the reason."""


@contextlib.contextmanager
def in_words(uri: str) -> Iterator[None]:
    """Raises what goes wrong with an address of http(s) as errors of files, in one line.

    Raises:
        FileNotFoundError: its server says that there is no such file.
        Failed: anything else that servers and networks do.
        TooLarge: as `read_bytes`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Failed) or isinstance(error.__cause__, limits.TooLarge):
            raise  # of a block within this one
        if isinstance(error, limits.TooLarge):
            raise limits.TooLarge(f"{without(uri)}: {error}") from error
        # fsspec takes every failure for a missing file.
        cause = (error.__cause__ if isinstance(error, FileNotFoundError) else None) or error
        if isinstance(cause, FileNotFoundError) or not uri.startswith(WEB):
            raise
        from medsiglip_jax.files import web

        status = getattr(cause, "status", None)
        if status == 404:
            raise FileNotFoundError(f"{without(uri)}: no such file") from None
        reason, _ = web.explained(cause) or (status and http_status(status), False)
        if not reason:
            raise
        raise Failed(f"{without(uri)}: {reason}") from cause


def http_status(code: int) -> str:
    """The status of an answer in words, such as "HTTP 403 Forbidden"."""
    return f"HTTP {code} {responses.get(code, '')}".strip()


def open_binary(path: str) -> Any:
    """Opens a file, local or remote, for reading bytes; raises as `read_bytes` does.

    What comes from a server that sends no parts of files is read as a whole.
    """
    if not is_remote(path):
        return at(path).open("rb")
    if dicomweb.is_instance(path):
        return io.BytesIO(read_bytes(path))
    system, name = file_system(path)
    with in_words(path):
        stream = system.open(name, "rb")
    if not path.startswith(WEB) or stream.size is not None:
        return stream
    stream.close()
    return io.BytesIO(read_bytes(path))


def read_bytes(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """The content of a file, local or remote (in a single request), or the bytes from `start` up to
    `end` of a remote one.

    Raises:
        TooLarge: it has more than `limits.Limits.max_bytes`, and is remote.
        TooSlow: the server of a bucket does not answer in time.
        Failed: that of an address does not, or refuses.
    """
    if not is_remote(path):
        return at(path).read_bytes()
    system, name = file_system(path)
    with in_words(path):
        if dicomweb.is_instance(path):
            return dicomweb.unpacked(system.cat_file(name))[start:end]
        if start is not None or path.partition("://")[0] in _COUNTED:
            return system.cat_file(name, start=start, end=end)
        with system.open(name, "rb") as file:
            data = file.read((most := limits.current().max_bytes) + 1)
        if len(data) > most:
            raise limits.TooLarge(f"more than {most:,} bytes (--max-bytes)")
        return data
