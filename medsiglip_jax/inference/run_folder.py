"""The folder of an embedding run: one run at a time, resumed by the same command, never mixed.

Every process of a run holds a lock of its own in it. Process 0 writes the manifest once all shards
are there; the others wait for it, and all of them stop when one leaves a note that it has failed.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from medsiglip_jax.files import json as json_files
from medsiglip_jax.files.failures import shortened
from medsiglip_jax.files.locks import Check, lock
from medsiglip_jax.files.places import Place, visible
from medsiglip_jax.inference.manifest import MANIFEST, RUN, Manifest, RunRecord, parse_manifest

_COMMIT = ".lock-commit"  # held while the manifest is written by one of several parts
_POLL_SECONDS = 1.0  # between two looks at what the other processes have written


@contextmanager
def hold(folder: Place, run: RunRecord, index: int = 0) -> Iterator[Check]:
    """Holds the folder for one process of a run, the `index`-th, and writes `run.json` if it is
    new.

    Yields:
        A function that raises FileExistsError if another run has taken over.

    Raises:
        FileExistsError: it holds another run or something else, or another process is writing.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; --output wants a folder")
    with lock(folder / (f".lock-{index}" if index else ".lock")) as check:
        _failure(folder, index).unlink(missing_ok=True)
        _write_or_compare(folder, run)
        yield check


def _write_or_compare(folder: Place, run: RunRecord) -> None:
    """Writes `run.json`; where another process was first, it is held against what that wrote."""
    names = visible(folder)
    if RUN not in names:
        if names:
            raise FileExistsError(
                f"{folder}: not empty, and not an embedding run; choose a new folder"
            )
        with suppress(FileExistsError):
            return json_files.write(folder / RUN, run.to_dict(), exclusive=True)
    if differ := run.differences(read_run(folder)):
        raise FileExistsError(
            f"{folder}: holds another run ({', '.join(differ)} differ); repeat that command "
            "to finish it, or choose a new folder"
        )


def read_run(folder: Place) -> dict[str, Any]:
    """The content of `run.json`."""
    return _read_json(folder / RUN)


def once(folder: Place, commit: Callable[[Check], Manifest]) -> Manifest:
    """Has one of several processes write the manifest, and returns it in all of them.

    Where one ends before it has written it, another does.
    """
    while not (folder / MANIFEST).is_file():
        with ExitStack() as stack:
            try:
                check = stack.enter_context(lock(folder / _COMMIT))
            except FileExistsError:  # another part is at it
                time.sleep(_POLL_SECONDS)
                continue
            if not (folder / MANIFEST).is_file():
                return commit(check)
    return finished_manifest(folder)


def recorded_dtype(folder: Place) -> str | None:
    """The dtype of the run that a folder holds; None if it holds none that can be read.

    Raises:
        OSError: the disk or the network fails.
    """
    try:
        dtype = _read_json(folder / RUN).get("dtype")
        return dtype if isinstance(dtype, str) else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


@contextmanager
def report_failure(folder: Place) -> Iterator[None]:
    """Tells the other processes, which may be waiting, when this one fails."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            path = _failure(folder, jax.process_index())
            try:
                json_files.write(path, {"error": str(error)[:1000]})
            except Exception as second:  # the first error says what has happened
                why = shortened(str(second))
                warnings.warn(f"{path}: other processes cannot be told: {why}", stacklevel=3)
        raise


def wait_for(folder: Place, wanted: set[str]) -> None:
    """Polls a folder until all files of these names are there.

    Raises:
        ValueError: another process has failed.
    """
    while not wanted <= (names := {p.name for p in folder.iterdir()}):
        if failed := sorted(name for name in names if name.startswith(".failed-")):
            error = _read_json(folder / failed[0]).get("error")
            raise ValueError(f"process {failed[0].rpartition('-')[2]} has stopped: {error}")
        time.sleep(_POLL_SECONDS)


def finished_manifest(folder: Place) -> Manifest:
    """The manifest that is there, or that process 0 is about to write, checked against the files.

    Raises:
        ValueError: a file is missing or has another size than it had.
    """
    wait_for(folder, {MANIFEST})
    name = folder / _COMMIT
    if isinstance(name, Path) and name.is_file():  # left by a part that was killed right afterwards
        with suppress(FileExistsError), lock(name):
            pass  # which removes it
    path = folder / MANIFEST
    manifest = parse_manifest(path.read_bytes(), path)
    for part in manifest.parts:
        file = folder / part.file
        if not file.is_file() or file.stat().st_size != part.bytes:
            raise ValueError(
                f"{file}: missing or damaged; remove it and {MANIFEST}, and the same "
                "command makes it again"
            )
    return manifest


def _failure(folder: Place, index: int) -> Place:
    return folder / f".failed-{index}"


def _read_json(path: Place) -> dict[str, Any]:
    return json_files.read(path, "not what embed writes", "choose a new folder")
