"""Files and folders that appear whole or not at all, and one writer at a time."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def refuse_remote(path: str | os.PathLike) -> None:
    """Raises for gs:// and its like, which `Path` would take for a local folder "gs:"."""
    if match := re.match(r"[a-z][a-z0-9]+:/", str(path)):
        raise ValueError(
            f"{path}: {match[0]}/ is not supported yet; copy it to or from a local folder "
            "(gcloud storage cp -r)"
        )


def check_writable(path: Path) -> None:
    """Raises one clear error, before any work is done, if `path` cannot be created."""
    refuse_remote(path)
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{path}: cannot be written, {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: cannot be written, no permission in {parent}")


def check_new(path: Path) -> None:
    """Raises unless `path` is free, or an empty folder, and can be created."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path}: already exists; choose another name or remove it first")
    check_writable(path)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed to `path`.

    An existing file is replaced in one step. On any error the temporary file is removed.
    """
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; on success it becomes `path`.

    A killed run leaves only the temporary folder, which the next run removes.

    Raises:
        FileExistsError: `path` is there and not empty, unless `overwrite`.
    """
    path = path.absolute()
    check_writable(path) if overwrite else check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with lock(path.with_name(f".{path.name}.lock")):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for file in sorted(partial.rglob("*"), reverse=True):
                _sync(file)
            if path.is_dir() and overwrite:
                shutil.rmtree(path)
            os.replace(partial, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that dies with the process; a second holder is refused at once.

    The lock's folder is made if need be, and removed again if nothing was put into it.
    """
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
        raise FileExistsError(f"{path.parent}: another run is writing here ({path})") from None
    return file


def _is_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
