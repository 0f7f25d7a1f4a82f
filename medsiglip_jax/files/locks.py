"""One writer at a time: locks that die with their holder."""

import contextlib
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.files.places import Place, check_writable

# Seconds between two heartbeats of a lease, and without one until another run may take over.
HEARTBEAT, LEASE_TIMEOUT = 10.0, 45.0

Check = Callable[[], None]


@contextlib.contextmanager
def lock(path: Place) -> Iterator[Check]:
    """Holds an exclusive lock, which ends with the process; a second holder is refused.

    On a disk the operating system locks a file, and a second holder is refused at once. The folder
    of the lock is created if necessary, and removed again if it stayed empty. Buckets and some
    network disks have no locks. There the lock is a lease: a file that its holder rewrites every
    `HEARTBEAT` seconds. A process that finds one waits up to `LEASE_TIMEOUT` seconds for the next
    heartbeat, and takes over if there is none.

    Yields:
        A function to call before anything is written. It raises FileExistsError if another run has
        taken over, which happens to a process that was suspended for longer than the timeout.

    Raises:
        FileExistsError: another run holds the lock.
    """
    made = isinstance(path, Path) and not path.parent.exists()
    held = _locked(path) if isinstance(path, Path) else None
    if held is None:
        with _lease(path) as check:
            yield check
        return
    try:
        yield lambda: None
    finally:
        with contextlib.suppress(PermissionError):  # Windows cannot remove open files
            path.unlink(missing_ok=True)
        held.release()
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                path.parent.rmdir()


def _locked(path: Path) -> FileLock | None:
    """Locks a file; None if its file system has no locks."""
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():  # no lock of ours; what it leads to is not to be written
        path.unlink()
    held = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise _refusal(path) from None
    except OSError:  # Lustre without -o flock, some of NFS and FUSE
        if path.exists() and not path.stat().st_size:  # else it is a lease
            path.unlink()
        return None
    return held


def _refusal(path: Place) -> FileExistsError:
    return FileExistsError(f"{path.parent}: another run is writing here ({path})")


# -------------------------------------------------------------------------- where nothing locks


@contextlib.contextmanager
def _lease(path: Place) -> Iterator[Check]:
    _wait_until_expired(path)
    owner, done, lost = uuid.uuid4().hex, threading.Event(), threading.Event()
    _create(path, owner)
    time.sleep(min(1.0, HEARTBEAT / 10))
    if _holder(path) != owner:  # two started at the same moment: the last to write holds it
        raise _refusal(path)
    thread = threading.Thread(target=_renew, args=(path, owner, done, lost), daemon=True)
    thread.start()

    def check() -> None:
        if lost.is_set():
            raise FileExistsError(f"{path.parent}: another run has taken over; this one stops")

    try:
        yield check
    finally:
        done.set()
        thread.join()
        # The lease expires anyway, and this must not hide an error.
        with contextlib.suppress(Exception):
            if _holder(path) == owner:
                path.unlink()


def _wait_until_expired(path: Place) -> None:
    """Returns when there is no lease, or its holder has sent no heartbeat for the timeout."""
    first, end = _content(path), time.monotonic() + LEASE_TIMEOUT
    if first:
        warnings.warn(
            f"{path}: another run has written this; waiting up to {LEASE_TIMEOUT:.0f} s for its "
            "heartbeat before taking over",
            stacklevel=4,
        )
    while first and time.monotonic() < end:
        time.sleep(HEARTBEAT / 5)
        now = _content(path)
        if now and now != first:
            raise _refusal(path)
        first = now


def _create(path: Place, owner: str) -> None:
    """Writes the first heartbeat; fails if another run was first, where the store can tell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(path, Path):
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(_heartbeat(owner, 0))
        return
    try:
        path.fs.pipe_file(path.path, _heartbeat(owner, 0).encode(), mode="create")
    except FileExistsError:
        raise _refusal(path) from None
    except (TypeError, ValueError, NotImplementedError):  # the store has no such mode
        path.write_text(_heartbeat(owner, 0))


def _renew(path: Place, owner: str, done: threading.Event, lost: threading.Event) -> None:
    count = 0
    while not done.wait(HEARTBEAT):
        with contextlib.suppress(Exception):  # a network error may be gone at the next one
            if (holder := _holder(path)) and holder != owner:
                lost.set()
                return
            count += 1
            path.write_text(_heartbeat(owner, count))


def _heartbeat(owner: str, count: int) -> str:
    host = socket.gethostname()
    return dumps({"owner": owner, "beat": count, "host": host, "pid": os.getpid()})


def _holder(path: Place) -> str:
    try:
        return str(parse(_content(path) or "{}").get("owner", ""))
    except ValueError:  # a heartbeat that is just being written
        return ""


def _content(path: Place) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
