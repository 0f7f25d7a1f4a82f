"""Writes files and folders that appear complete or not at all, on disks and in buckets."""

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from upath import UPath

from medsiglip_jax.files import places
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import shortened, writing
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.files.locks import lock
from medsiglip_jax.files.places import Place, check_writable

# Seconds between two uploads of a growing file.
UPLOAD_SECONDS = 10.0
# The suffix of temporary files and folders.
PARTIAL = ".partial"
# That of a folder which is being replaced, where that takes two steps.
_BEFORE = ".before"


@contextlib.contextmanager
def temporary(path: Path, folder: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """Yields a new empty file or folder beside `path`, to be renamed, which is removed afterwards
    if it is still there; and removes those of processes that were killed. Of the `mode` a file has
    no right to execute it, and neither has what the umask forbids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    partial = _temporary(path, folder, mode)
    try:
        with _in_use(partial):
            yield partial
    finally:
        _remove(partial)


@contextlib.contextmanager
def new_file(path: Place, exclusive: bool = False) -> Iterator[Path]:
    """Yields a temporary local path, whose content appears at `path` in one step on success.

    On a disk the temporary file lies beside `path`, is synced and renamed; in a bucket it is
    uploaded at once. A file that exists is replaced, a link by the file itself. Of several writers
    the last wins, whole; with `exclusive` the first does, and the others get a FileExistsError, as
    far as the file system can tell. On any error the temporary file is removed, and what a killed
    writer left by the next one.
    """
    if isinstance(path, Path):
        check_writable(path)
        with temporary(path) as partial, writing(path):
            yield partial
            _sync(partial)
            _rename_to_new(partial, path) if exclusive else os.replace(partial, path)
            _sync(path.parent)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield (partial := Path(folder, path.name))
            _upload(partial, path, exclusive)


def replace(path: Path, data: bytes) -> None:
    """Writes a file on a disk in one step, without waiting for the disk: a crash of the machine may
    leave an empty file, as only what is checked when it is read, and can be made again, may be."""
    partial = _temporary(path)
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _rename_to_new(file: Path, path: Path) -> None:
    """Renames a file, to a name that must be new."""
    number = _renameat2(file, path, _NO_REPLACE)
    if number == errno.EEXIST:
        raise FileExistsError(number, os.strerror(number), str(path))
    if number:  # the system or the file system has no such call
        _link(file, path)


def _link(file: Path, path: Path) -> None:
    """Gives a file another name, which must be new."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links: exFAT, some network disks
        os.replace(file, path)


# Of linux/fs.h: fail where the new name exists, and swap both names.
_NO_REPLACE, _EXCHANGE = 1, 2


def _renameat2(first: Path, second: Path, flag: int) -> int:
    """Renames a file or folder by renameat2 of Linux; 0, or the number of the error."""
    if sys.platform != "linux":
        return errno.ENOSYS
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # of glibc 2.28
    if call is None:
        return errno.ENOSYS
    here = -100  # AT_FDCWD of linux/fcntl.h: names are relative to the working directory
    failed = call(here, os.fsencode(first), here, os.fsencode(second), flag)
    return ctypes.get_errno() if failed else 0


def remove(path: Place) -> None:
    """Removes a file, if it is there, and what killed writers of it have left."""
    if isinstance(path, Path):
        remove_leftovers(path)
    path.unlink(missing_ok=True)


_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
# Tells this process from an earlier one with its number: in a container that is started again all
# numbers come again.
_PROCESS = secrets.token_hex(2)


def _temporary(path: Path, folder: bool = False, mode: int = 0o777) -> Path:
    """A new empty file or folder beside `path` whose name no other writer has, never one through a
    link; it names the host and the process that write it."""
    while True:
        partial = _unused(path)
        with contextlib.suppress(FileExistsError):
            if folder:
                partial.mkdir(mode)
            else:
                os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode & 0o666))
            return partial


def _unused(path: Path, end: str = PARTIAL) -> Path:
    token = _PROCESS + secrets.token_hex(2)
    return path.with_name(f".{path.name[:200]}.{_HOST}-{os.getpid()}-{token}{end}")


def remove_leftovers(path: Path) -> None:
    """Removes temporary files and folders of `path` whose process on this host is no more, and puts
    back a folder that such a process was about to replace.

    Containers may have the name of their host and the numbers of their processes in common. There
    the lock of `_in_use` tells who is alive, where Linux has such locks: also on network disks, if
    those share them between machines. Where a lock cannot be asked for, all stays. Not covered is
    a writer in another container in the moment between making its temporary file and locking it.
    """
    start = re.escape(path.name[:200])
    name = re.compile(rf"\.{start}\.{_HOST}-(\d+)-([0-9a-f]{{4}})[0-9a-f]{{4}}\.(partial|before)")
    with contextlib.suppress(OSError):  # a folder that cannot be listed can be written to
        for entry in os.scandir(path.parent):
            found = name.fullmatch(entry.name)
            if not found or _alive(int(found[1]), found[2]) or _is_in_use(entry.path):
                continue
            if f".{found[3]}" == _BEFORE and not os.path.lexists(path):
                os.replace(entry.path, path)
            else:
                _remove(Path(entry.path))


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int, token: str) -> bool:
    """Whether a process runs; where that cannot be known, as on Windows, it is taken to."""
    if pid == os.getpid():
        return token == _PROCESS
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


# A byte that no file has: on SMB nobody else can write to what is locked.
_LOCKED_BYTE = 1 << 62
_FLOCK = "hhqqi"  # type, whence, start, length and process of struct flock in 64 bits


@contextlib.contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """Holds a lock on a file or folder, which ends with the process, where there are such locks.

    It is one of an open file description (fcntl(2)): those of processes would end whenever the
    file is closed, wherever in the process.
    """
    with contextlib.ExitStack() as stack:
        if sys.platform == "linux":
            import fcntl

            with contextlib.suppress(OSError):
                stack.callback(os.close, descriptor := os.open(path, os.O_RDONLY))
                _lock(descriptor, fcntl.F_OFD_SETLK, fcntl.F_RDLCK)
        yield


def _is_in_use(path: str) -> bool:
    """Whether a process holds the lock of `_in_use`; where that cannot be known, one does."""
    if sys.platform != "linux":  # there no two processes have one number
        return False
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        return _lock(descriptor, fcntl.F_OFD_GETLK, fcntl.F_WRLCK) != fcntl.F_UNLCK
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, command: int, kind: int) -> int:
    """Sets a lock on `_LOCKED_BYTE`, or asks for it -> the kind of lock that is in the way."""
    import fcntl

    asked = struct.pack(_FLOCK, kind, os.SEEK_SET, _LOCKED_BYTE, 1, 0)
    return struct.unpack(_FLOCK, fcntl.fcntl(descriptor, command, asked))[0]


@contextlib.contextmanager
def new_folder(path: Place, overwrite: bool = False, marker: str = "") -> Iterator[Path]:
    """Yields an empty temporary local folder; on success it becomes `path`.

    A killed run leaves only the temporary folder, which the next run removes. Of several writers at
    once one is refused.

    Args:
        path: of the new folder.
        overwrite: replace a folder that exists.
        marker: name of the file that marks the folder as complete. A bucket cannot rename folders:
            there the files are uploaded one by one, the marker last; of a folder that is replaced
            it is removed first.

    Raises:
        FileExistsError: `path` exists and is not empty, unless `overwrite`.
    """
    if not isinstance(path, Path):
        check_writable(path) if overwrite else places.check_new(path)
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            _replace_remote_folder(path, Path(folder), marker)
        return
    check_writable(path)
    path = path.absolute()
    with _folder_lock(path), temporary(path, folder=True) as partial:
        if not overwrite:
            places.check_new(path)
        with writing(path):
            yield partial
        for file in sorted(partial.rglob("*"), reverse=True):
            _sync(file)
        _replace_folder(partial, path, overwrite)
        _sync(path.parent)


def _folder_lock(path: Path) -> contextlib.AbstractContextManager[Any]:
    return lock(path.with_name(f".{path.name}.lock"))


def check_new(path: Place) -> None:
    """Raises unless `path` can become a new file or folder; as a writer does, this removes what
    killed writers of it have left.

    Raises:
        FileExistsError: it exists and is not an empty folder, or another run is writing it.
    """
    if isinstance(path, Path) and path.absolute().parent.is_dir():
        check_writable(path)
        with _folder_lock(path.absolute()):
            remove_leftovers(path.absolute())
    places.check_new(path)


def _replace_folder(new: Path, path: Path, overwrite: bool) -> None:
    """Renames a folder; with `overwrite` also to the name of one that exists, or of a link, which
    then has the name of the new one or is removed."""
    if not (overwrite and (path.is_dir() or path.is_symlink())):
        os.replace(new, path)
    elif _renameat2(new, path, _EXCHANGE):  # it fails where the file system has no such call
        before = _unused(path, _BEFORE)
        os.replace(path, before)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(before, path)
            raise
        _remove(before)


def _replace_remote_folder(path: UPath, folder: Path, marker: str) -> None:
    if marker:
        (path / marker).unlink(missing_ok=True)
    if path.exists():
        path.rmdir(recursive=True)
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name == marker)
    for file in files:
        _upload(file, path / file.relative_to(folder).as_posix())


# File systems on which a file appears only when its upload is complete.
_BUCKETS = frozenset("gs gcs s3 s3a az abfs abfss adl hf oci memory".split())


def _upload(file: Path, path: UPath, exclusive: bool = False) -> None:
    if exclusive:
        with contextlib.suppress(TypeError, ValueError, NotImplementedError):  # has no such mode
            path.fs.pipe_file(path.path, file.read_bytes(), mode="create")
            return
    if path.protocol in _BUCKETS:
        path.fs.put_file(str(file), path.path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    path.fs.put_file(str(file), partial.path)
    path.fs.mv(partial.path, path.path)


# Errors of systems that cannot open or sync a folder: Windows, some network disks.
_CANNOT_SYNC_FOLDERS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EISDIR)
)


def _sync(path: Path) -> None:
    folder = path.is_dir()
    try:
        # Windows syncs only writable ones.
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (folder and error.errno in _CANNOT_SYNC_FOLDERS):
            raise


class Lines:
    """A growing file of JSON objects, one per line.

    A bucket cannot append: there the whole file is uploaded again every `UPLOAD_SECONDS` and by
    `flush`.
    """

    def __init__(
        self,
        path: Place,
        keep: Callable[[dict[str, Any]], bool] = lambda line: True,
        **required: type,
    ):
        """Opens or creates a file, and drops the lines that `keep` does not want; `required` is as
        `read_lines` has it."""
        self.path, self._uploaded = path, time.monotonic()
        self._lines = [line for line in read_lines(path, **required) if keep(line)]
        self._waiting = 0
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != self._text():
            self._write()  # drops a last line that a kill cut short, too

    def append(self, line: dict[str, Any]) -> None:
        if isinstance(self.path, Path):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(dumps(line) + "\n")
            return
        self._lines.append(line)
        self._waiting += 1
        if time.monotonic() > self._uploaded + UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Uploads the lines that are still waiting."""
        if self._waiting:
            self._write()

    def _text(self) -> str:
        return "".join(dumps(line) + "\n" for line in self._lines)

    def _write(self) -> None:
        with new_file(self.path) as partial:
            partial.write_text(self._text(), encoding="utf-8")
        self._waiting, self._uploaded = 0, time.monotonic()


def read_lines(path: Place, **required: type) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without a last one that a kill cut short.

    Args:
        path: of the file; there are no lines where it does not exist.
        **required: name -> type of what every object has.

    Raises:
        ValueError: another line than the last is none, which the message says.
    """
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = parse(text)
            for name, kind in required.items():
                if not isinstance(value := line.get(name), kind) or isinstance(value, bool):
                    raise ValueError(f"{name} is {value!r}; expected {kind.__name__}")
            lines.append(line)
        except ValueError as error:
            if number < len(texts):
                raise ValueError(
                    f"{path}, line {number}: {shortened(str(error))}; remove that line"
                ) from None
    return lines
