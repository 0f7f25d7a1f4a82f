"""The bytes of local and remote files, or of ranges of them; a network that fails is asked again.

What is wrong with a file is `UnreadableImage`, what is wrong with its disk or network `Outage`. Of
an answer such as "403 Forbidden" nobody can say which it is: that is `Refused`.
"""

import errno
import io
import os
import socket
import stat
import time
from collections.abc import Callable
from http.client import responses
from typing import Any, TypeVar

from medsiglip_jax.files import places
from medsiglip_jax.preprocess.facts import NoSuchFile, Refused, UnreadableImage, describe
from medsiglip_jax.preprocess.names import Range, part_of

T = TypeVar("T")

# What the operating system says of one file, and not of the disk that it lies on.
_OF_THE_FILE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
)
# Seconds between tries of a network that fails.
_PAUSES = (0.5, 2.0, 8.0)
# Answers that are about who asks, and not about the file.
_UNAUTHORIZED = frozenset((401, 407))
# Those that may differ the next time, beside 500 and more: a timeout, too early, too many requests.
_PASSING = frozenset((408, 425, 429))


class Outage(OSError):
    """Reading failed for a reason that does not lie in the file; it may work later."""


class _Failing(Outage):
    """What becomes `Refused` if it lasts."""


def read_bytes(file: str, span: Range | None = None) -> bytes:
    """The content of a file, or a range of it.

    Raises:
        UnreadableImage: there is no such file, or it may not be read; the reason, without the path.
            `Refused` if its server says so, or fails again and again.
        Outage: the disk or the network fails, which says nothing about the file.
    """
    remote = "://" in file

    def read_once() -> bytes:
        try:
            return (_read_remote if remote else _read)(file, span)
        except Exception as error:
            raise _translated(file, span, error) from error

    data = _with_retries(read_once, remote)
    if span is not None and len(data) < span.length:
        raise UnreadableImage(f"the file ends before byte {span.offset + span.length}")
    return data


def open_binary(file: str, span: Range | None = None) -> Any:
    """A stream of what `read_bytes` reads; raises as it does, also when it is closed."""
    if span is not None:
        return io.BytesIO(read_bytes(file, span))
    try:
        if "://" not in file:
            check_regular(file)
        return _Stream(file, places.open_binary(file))
    except Exception as error:
        raise _translated(file, span, error) from error


def looked_at(file: str, span: Range | None, look: Callable[[Any], T]) -> T:
    """What `look` makes of a stream of the bytes; where the network fails, it is called again."""

    def look_once() -> T:
        with open_binary(file, span) as stream:
            return look(stream)

    return _with_retries(look_once, "://" in file and span is None)


class _Stream:
    """A stream that raises its failure once more when it is closed.

    Parsers take whatever is raised for damage, and some say nothing at all.
    """

    def __init__(self, file: str, stream: Any):
        self._file, self._stream = file, stream
        self._failure: Exception | None = None
        self.tell = stream.tell
        self.closed = False  # which Arrow asks

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stream.close()
        if self._failure is not None:
            raise self._failure

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except MemoryError:  # a damaged header asked for more than there is
            raise
        except Exception as error:
            self._failure = _translated(self._file, None, error)
            raise self._failure from error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._stream.seek(offset, whence)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a place before the start
                raise
            self._failure = _translated(self._file, None, error)
            raise self._failure from error


def check_regular(file: str | os.PathLike) -> None:
    """Raises UnreadableImage for a folder, pipe or device; OSError if there is none of them."""
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):  # a pipe or device may never end
        raise UnreadableImage("a folder" if stat.S_ISDIR(mode) else "not a file")


def _read(file: str, span: Range | None) -> bytes:
    check_regular(file)
    with open(file, "rb") as stream:
        if span is None:
            return stream.read()
        stream.seek(span.offset)
        return stream.read(span.length)


def _read_remote(file: str, span: Range | None) -> bytes:
    system, name = places.file_system(file)
    if span is None:
        return system.cat_file(name)
    return system.cat_file(name, start=span.offset, end=span.offset + span.length)  # one request


def _translated(file: str, span: Range | None, error: Exception) -> Exception:
    """`UnreadableImage` or `Outage`; remote file systems raise types of their own."""
    if isinstance(error, UnreadableImage):
        return type(error)(error.reason)
    if isinstance(error, FileNotFoundError):
        return NoSuchFile("no such file")
    if isinstance(error, IsADirectoryError):
        return UnreadableImage("a folder")
    if isinstance(error, PermissionError) and "://" in file:
        return Refused("permission denied")
    status = _http_status(error)
    if status is not None and status not in _UNAUTHORIZED:
        reason = f"HTTP {status} {responses.get(status, '')}".strip()
        return _Failing(reason) if status >= 500 or status in _PASSING else Refused(reason)
    message = getattr(error, "strerror", None)
    if "://" not in file and getattr(error, "errno", None) in _OF_THE_FILE:
        return UnreadableImage(message or str(error))
    reason = message or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    on_web = file.startswith(("http://", "https://"))
    if on_web and status is None and _is_of_one_host(error):
        return _Failing(reason)
    source = file if span is None else part_of(file, span)
    return Outage(f"{describe(source)}: cannot be read: {reason}")


def _http_status(error: Exception) -> int | None:
    """The status of an answer that is an error: aiohttp's `status`, gcsfs' `code`."""
    if str(error).startswith("Forbidden: "):  # gcsfs.retry.validate_response
        return 403
    codes = (getattr(error, name, None) for name in ("status", "code"))
    return next((code for code in codes if isinstance(code, int) and 400 <= code < 600), None)


def _is_of_one_host(error: Exception) -> bool:
    """Whether a failure without an answer says something of one host alone: of lists of addresses
    on the web each has its own. That no name can be looked up is an outage."""
    of_names = isinstance(getattr(error, "os_error", error), socket.gaierror)
    of_names = of_names or "DNS" in type(error).__name__
    return not of_names and (
        isinstance(error, OSError) or type(error).__module__.startswith("aiohttp")
    )


def _with_retries(make: Callable[[], T], remote: bool) -> T:
    for pause in _PAUSES if remote else ():
        try:
            return make()
        except Outage:
            time.sleep(pause)
    try:
        return make()
    except _Failing as error:
        raise Refused(f"{error}, at each of {1 + len(_PAUSES)} tries") from error
