"""One writer at a time: locks that die with their holder."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from medsiglip_jax.files.places import Place, check_writable

# Seconds between two signs of life of a lock in a bucket, and without any until it is taken over.
BEAT, PATIENCE = 10.0, 45.0


Check = Callable[[], None]


@contextlib.contextmanager
def lock(path: Place) -> Iterator[Check]:
    """Holds an exclusive lock that dies with the process; a second holder is refused.

    On a disk it is a lock of the operating system: refused at once. The lock's folder is made if
    need be, and removed again if nothing was put into it. Buckets, and some network disks, have no
    locks: there it is a file that its holder rewrites every `BEAT` seconds, and whoever finds one
    waits for the next beat, at most `PATIENCE` seconds.

    Yields:
        A function to call before anything is written: it raises FileExistsError if another run has
        taken over, which happens to a process that slept through its beats.

    Raises:
        FileExistsError: another run holds it.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(path, Path):
            try:
                stack.enter_context(_lock_file(path))
                yield lambda: None
                return
            except _NoLocksHere:
                pass
        yield stack.enter_context(_lease(path))


class _NoLocksHere(Exception):
    """This file system cannot lock."""


# ------------------------------------------------------------------------------------- on a disk


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    check_writable(path)
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(path)
    while not _is_at(path, file):  # its last holder removed it after we had opened it
        file.close()
        file = _locked(path)
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made and not any(path.parent.iterdir()):
                path.parent.rmdir()


def _locked(path: Path) -> IO:
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise _refusal(path) from None
    except OSError as error:  # Lustre without -o flock, some of NFS and FUSE
        if not os.fstat(file.fileno()).st_size:  # or it is somebody's sign of life
            path.unlink(missing_ok=True)
        file.close()
        raise _NoLocksHere from error
    return file


def _is_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _refusal(path: Place) -> FileExistsError:
    return FileExistsError(f"{path.parent}: another run is writing here ({path})")


# -------------------------------------------------------------------------- where nothing locks


@contextlib.contextmanager
def _lease(path: Place) -> Iterator[Check]:
    _wait_for_silence(path)
    owner, done, lost = uuid.uuid4().hex, threading.Event(), threading.Event()
    _create(path, owner)
    time.sleep(min(1.0, BEAT / 10))
    if _holder(path) != owner:  # two came at the same moment; the last to write has it
        raise _refusal(path)
    thread = threading.Thread(target=_keep, args=(path, owner, done, lost), daemon=True)
    thread.start()

    def check() -> None:
        if lost.is_set():
            raise FileExistsError(f"{path.parent}: another run has taken over; this one ends")

    try:
        yield check
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(Exception):  # it dies by itself, and must not hide an error
            if _holder(path) == owner:
                path.unlink()


def _wait_for_silence(path: Place) -> None:
    """Returns when there is no lock, or a dead one."""
    first, end = _content(path), time.monotonic() + PATIENCE
    if first:
        warnings.warn(
            f"{path}: waiting up to {PATIENCE:.0f} s to see whether the run that wrote it is alive",
            stacklevel=5,
        )
    while first and time.monotonic() < end:
        time.sleep(BEAT / 5)
        now = _content(path)
        if now and now != first:
            raise _refusal(path)
        first = now


def _create(path: Place, owner: str) -> None:
    """Writes the first beat; where the store can tell, only if no one else has done so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(path, Path):
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(_beat(owner, 0))
        return
    try:
        path.fs.pipe_file(path.path, _beat(owner, 0).encode(), mode="create")
    except FileExistsError:
        raise _refusal(path) from None
    except (TypeError, ValueError, NotImplementedError):  # it has no such mode
        path.write_text(_beat(owner, 0))


def _keep(path: Place, owner: str, done: threading.Event, lost: threading.Event) -> None:
    count = 0
    while not done.wait(BEAT):
        with contextlib.suppress(Exception):  # a network that fails now may work at the next beat
            if (holder := _holder(path)) and holder != owner:
                lost.set()
                return
            count += 1
            path.write_text(_beat(owner, count))


def _beat(owner: str, count: int) -> str:
    return json.dumps(
        {"owner": owner, "beat": count, "host": socket.gethostname(), "pid": os.getpid()}
    )


def _holder(path: Place) -> str:
    try:
        return json.loads(_content(path) or "{}").get("owner", "")
    except ValueError:  # a beat that is being written
        return ""


def _content(path: Place) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
