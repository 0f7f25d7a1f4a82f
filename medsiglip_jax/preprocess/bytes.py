"""The bytes of local and remote files, or of ranges of them; a network that fails is asked again.

What is wrong with a file is `UnreadableImage`, what is wrong with its disk or network `Outage`. Of
an answer such as "403 Forbidden" nobody can say which it is: that is `Refused`.
"""

import errno
import io
import os
import stat
import time
from collections.abc import Callable
from typing import Any, TypeVar

from medsiglip_jax.files import dicomweb, limits, places
from medsiglip_jax.files.credentials import without_in_text
from medsiglip_jax.preprocess.facts import (
    NO_MEMORY,
    NoSuchFile,
    Refused,
    UnreadableImage,
    describe,
)
from medsiglip_jax.preprocess.names import Range, part_of

T = TypeVar("T")

# Bytes of a local file, or of a range of one, that are read at once: the most that an element of
# DICOM has. Volumes that are not compressed, and slides, are read in parts.
MAX_BYTES = 1 << 32
# What the operating system says of one file, and not of the disk that it lies on.
_OF_THE_FILE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
)
# Seconds between tries of a network that fails.
_PAUSES = (0.5, 2.0, 8.0)
# Answers that may differ the next time, beside 500 and more: a timeout, too early, too many
# requests.
_PASSING = frozenset((408, 425, 429))


class Outage(OSError):
    """Reading failed for a reason that does not lie in the file; it may work later."""


class _Failing(Outage):
    """An outage that becomes `Refused` if it lasts; the message is the reason alone."""


def read_bytes(file: str, span: Range | None = None) -> bytes:
    """The content of a file, or a range of it.

    Raises:
        UnreadableImage: there is no such file, it may not be read, or it is remote and too large;
            the reason, without the path. `Refused` if its server says so, or fails again and again.
        Outage: the disk or the network fails, which says nothing about the file.
        dicomweb.NotSet: the token of a server is not set as it has to be.
    """
    file = _without_scheme(file)
    remote = "://" in file
    most = limits.current().max_bytes
    if remote and span is not None and span.length > most:
        raise UnreadableImage(f"{span.length:,} bytes, more than {most:,} (--max-bytes)")

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
    file = _without_scheme(file)
    try:
        if "://" not in file:
            check_regular(file)
        return _Stream(file, places.open_binary(file))
    except Exception as error:
        raise _translated(file, span, error) from error


def looked_at(file: str, span: Range | None, look: Callable[[Any], T]) -> T:
    """The result of `look` for a stream of the bytes; where the network fails, it is called again.

    Raises:
        UnreadableImage, Outage: as `read_bytes` does, and whatever `look` raises.
    """

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


def _without_scheme(file: str) -> str:
    """The path of file:///a/b, which may be a pipe or a device as any other path; dicomweb:// is
    https://."""
    if file.startswith(dicomweb.SCHEME):
        return dicomweb.over_https(file)
    return str(places.at(file)) if file.startswith(("file://", "local://")) else file


def check_regular(file: str | os.PathLike) -> None:
    """Raises UnreadableImage for a folder, pipe or device; OSError if there is none of them."""
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):  # a pipe or device may never end
        raise UnreadableImage("a folder" if stat.S_ISDIR(mode) else "not a file")


def _read(file: str, span: Range | None) -> bytes:
    check_regular(file)
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if span is not None and span.offset + span.length > size:  # Python would allocate it first
            raise UnreadableImage(f"the file ends before byte {span.offset + span.length}")
        most = max(MAX_BYTES, limits.current().max_bytes)
        if (count := size if span is None else span.length) > most:
            raise UnreadableImage(
                f"{count} bytes, more than the limit of {most} for one image; is it a slide? Then "
                "use --mpp, else raise --max-bytes"
            )
        if span is None:  # those of /proc/self, which have no size, cannot be read as files can
            return stream.read() if size else b""
        stream.seek(span.offset)
        return stream.read(span.length)


def _read_remote(file: str, span: Range | None) -> bytes:
    if span is None:
        return places.read_bytes(file)
    data = places.read_bytes(file, span.offset, span.offset + span.length)  # one request
    if len(data) > span.length:
        raise UnreadableImage("its server sends no parts of files")
    return data


def _translated(file: str, span: Range | None, error: BaseException) -> Exception:
    """`UnreadableImage` or `Outage`; remote file systems raise types of their own."""
    if isinstance(error, UnreadableImage):
        return type(error)(error.reason)
    if isinstance(error, dicomweb.NotSet):
        return dicomweb.NotSet(str(error))
    if "://" in file and (of_object := _of_object(file, error)):
        return of_object
    if isinstance(error, FileNotFoundError):
        return NoSuchFile("no such file")
    if isinstance(error, MemoryError):
        return UnreadableImage(NO_MEMORY)
    if isinstance(error, ValueError) and "://" not in file:  # a null byte, half a surrogate pair
        return NoSuchFile("no such file; no file can have such a name")
    if isinstance(error, IsADirectoryError):
        return UnreadableImage("a folder")
    message = getattr(error, "strerror", None)
    if "://" not in file and getattr(error, "errno", None) in _OF_THE_FILE:
        return UnreadableImage(message or str(error))
    words = without_in_text(" ".join(str(error).split()))[:200]
    source = file if span is None else part_of(file, span)
    reason = message or f"{type(error).__name__}: {words}"
    return Outage(f"{describe(source)}: cannot be read: {reason}")


def _of_object(file: str, error: BaseException) -> Exception | None:
    """What an error says of one remote object or its server, and of no other; None if nothing."""
    if isinstance(error, limits.TooLarge):
        return UnreadableImage(str(error.__cause__ or error))
    if isinstance(error, FileNotFoundError | places.Failed):
        return _of_object(file, error.__cause__) if error.__cause__ else None
    if isinstance(error, places.NotReachable):
        reason = f"{file.partition('://')[0]}:// is not read here (--protocols)"
        return UnreadableImage(reason) if isinstance(error, places.NotAllowed) else None
    if isinstance(error, PermissionError):
        return Refused("permission denied")
    reason, passing = _of_web(file, error)
    if not reason and isinstance(error, ValueError | NotImplementedError):
        return UnreadableImage("not a valid address")
    if not reason and (status := _http_status(error)):
        reason, passing = places.http_status(status), status >= 500 or status in _PASSING
        if status == 404:
            return NoSuchFile("no such file")
    return (_Failing if passing else Refused)(reason) if reason else None


def _of_web(file: str, error: BaseException) -> tuple[str, bool]:
    """What an error without an answer says of one server of the web, and whether it may pass.

    Of lists of addresses on the web each has its own server; that of a bucket has all its files.
    """
    if not file.startswith(places.WEB):
        return "", False
    from medsiglip_jax.files import web  # aiohttp

    return web.explained(error) or ("", False)


def _http_status(error: BaseException) -> int | None:
    """The status of an answer: aiohttp's `status`, gcsfs' `code`, huggingface_hub's `response`."""
    if str(error).startswith("Forbidden: "):  # gcsfs.retry.validate_response
        return 403
    codes = (
        getattr(error, "status", None),
        getattr(getattr(error, "response", None), "status_code", None),
        # aiohttp has this, too, and warns of it.
        None if hasattr(error, "status") else getattr(error, "code", None),
    )
    return next((code for code in codes if isinstance(code, int) and 400 <= code < 600), None)


def _with_retries(make: Callable[[], T], remote: bool) -> T:
    """The result of `make`, which is called again where a network fails.

    One server is asked again only within the time that it may take to answer, so that one that is
    silent costs that time once.
    """
    end = time.monotonic() + limits.current().timeout
    for tries, pause in enumerate((*(_PAUSES if remote else ()), None), start=1):
        try:
            return make()
        except Outage as error:
            if isinstance(error, _Failing) and (pause is None or time.monotonic() + pause > end):
                raise Refused(f"{error}{f', at each of {tries} tries' * (tries > 1)}") from error
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
