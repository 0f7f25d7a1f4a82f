"""Files that stay open between reads of their parts: a volume is inflated once, not per slice.

Open files are looked up by path, size and time of change, so that a file that was replaced is read
anew. When several threads ask for the same file, one opens it and the others wait.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from medsiglip_jax.preprocess.facts import UnreadableImage

T = TypeVar("T")

# Rows come in the order of files, so that threads rarely work on more files than this at once.
MAX_OPEN = 8
# Bytes in memory, as the `nbytes` of open files say; the latest file may exceed it alone.
MAX_BYTES = 2 << 30

_open: OrderedDict[tuple, Future] = OrderedDict()
_lock = threading.Lock()


def opened(path: str, opener: Callable[[str], T]) -> T:
    """What `opener(path)` returns, cached. Several threads may use it at once.

    Args:
        path: of a file; a local file that has changed since is opened anew.
        opener: opens it; a function of a module, since it is part of the cache's key.

    Raises:
        UnreadableImage: raised by the opener, which is not called again for an unchanged file.
        Exception: whatever else the opener raises; the next call tries again.
    """
    key = (opener, path, _state(path))
    with _lock:
        first = key not in _open
        future = _open.setdefault(key, Future())
        _open.move_to_end(key)
    if first:
        _fill(future, key, path, opener)
    try:
        return future.result()
    except UnreadableImage as error:  # a new exception each: raising writes a traceback into it
        raise error.of(error.source) from None


def forget(folder: str) -> None:
    """Lets go of the files of a folder that is about to be deleted, which else stay open.

    They are closed once no thread reads them any more.
    """
    start = os.path.join(folder, "")
    with _lock:
        for key in [key for key in _open if key[1].startswith(start)]:
            del _open[key]


def _state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # remote, or missing, which the opener reports
        return None
    return status.st_size, status.st_mtime_ns


def _fill(future: Future, key: tuple, path: str, opener: Callable[[str], Any]) -> None:
    try:
        future.set_result(opener(path))
    except BaseException as error:
        if not isinstance(error, UnreadableImage):
            with _lock:
                _open.pop(key, None)
        future.set_exception(error)
    with _lock:
        while len(_open) > MAX_OPEN or (len(_open) > 1 and _open_bytes() > MAX_BYTES):
            _open.popitem(last=False)  # the oldest


def _open_bytes() -> int:
    ready = (f.result() for f in _open.values() if f.done() and f.exception() is None)
    return sum(getattr(opened, "nbytes", 0) for opened in ready)
