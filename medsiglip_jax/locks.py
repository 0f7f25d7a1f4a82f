"""One writer at a time: locks that die with their holder."""

import _thread
import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from upath import UPath

from medsiglip_jax.places import Place, check_writable

# Seconds between two signs of life of a lock in a bucket, and without any until it is taken over.
BEAT, PATIENCE = 10.0, 45.0


@contextlib.contextmanager
def lock(path: Place) -> Iterator[None]:
    """Holds an exclusive lock that dies with the process; a second holder is refused.

    On a disk it is a lock of the operating system: refused at once. The lock's folder is made if
    need be, and removed again if nothing was put into it. A bucket has no locks: there it is a file
    that its holder rewrites every `BEAT` seconds, and whoever finds one waits for the next beat, at
    most `PATIENCE` seconds.

    Raises:
        FileExistsError: another run holds it.
    """
    with _lock_file(path) if isinstance(path, Path) else _lease(path):
        yield


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
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise _refusal(path) from None
    return file


def _is_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _refusal(path: Place) -> FileExistsError:
    return FileExistsError(f"{path.parent}: another run is writing here ({path})")


# ------------------------------------------------------------------------------------ in a bucket


@contextlib.contextmanager
def _lease(path: UPath) -> Iterator[None]:
    _wait_for_silence(path)
    owner, done = uuid.uuid4().hex, threading.Event()
    path.parent.mkdir(parents=True, exist_ok=True)
    _beat(path, owner, 0)
    time.sleep(min(1.0, BEAT / 10))
    if _holder(path) != owner:  # two came at the same moment; the last to write has it
        raise _refusal(path)
    thread = threading.Thread(target=_keep, args=(path, owner, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if _holder(path) == owner:
            path.unlink(missing_ok=True)


def _wait_for_silence(path: UPath) -> None:
    """Returns when there is no lock, or a dead one."""
    first, end = _content(path), time.monotonic() + PATIENCE
    if first:
        warnings.warn(
            f"{path}: waiting up to {PATIENCE:.0f} s to see whether the run that wrote it is alive",
            stacklevel=4,
        )
    while first and time.monotonic() < end:
        time.sleep(BEAT / 5)
        now = _content(path)
        if now and now != first:
            raise _refusal(path)
        first = now


def _keep(path: UPath, owner: str, done: threading.Event) -> None:
    count = 0
    while not done.wait(BEAT):
        with contextlib.suppress(Exception):  # a network that fails now may work at the next beat
            if (holder := _holder(path)) != owner and holder:
                warnings.warn(f"{path}: another run has taken over; stopping", stacklevel=1)
                _thread.interrupt_main()
                return
            count += 1
            _beat(path, owner, count)


def _beat(path: UPath, owner: str, count: int) -> None:
    content = {"owner": owner, "beat": count, "host": socket.gethostname(), "pid": os.getpid()}
    path.write_text(json.dumps(content))


def _holder(path: UPath) -> str:
    content = _content(path)
    return json.loads(content)["owner"] if content else ""


def _content(path: UPath) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
