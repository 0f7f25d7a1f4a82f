"""Files that stay open between their parts: a volume of 300 slices is inflated once, not 300 times.

What is open is found by path, size and time of change, so that a file that was replaced is read
again. Of threads that ask for the same file, one opens it and the others wait.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from medsiglip_jax.preprocess.facts import UnreadableImage

T = TypeVar("T")

# Rows come in the order of files, and so many threads are rarely at more files than this.
MAX_OPEN = 8
# Bytes in memory, of all but the last: what is open says in `nbytes` how much it holds.
MAX_BYTES = 2 << 30

_open: OrderedDict[tuple, Future] = OrderedDict()
_lock = threading.Lock()


def opened(path: str, opener: Callable[[str], T]) -> T:
    """What `opener(path)` gives, from the last time if that is not long ago.

    Several threads use it at once: it must allow that.

    Args:
        path: of a file; a local one is looked at each time, whether it has changed.
        opener: opens it; a function of a module, for it is part of the name.

    Raises:
        UnreadableImage: as the opener did, which is not tried again for a file that is the same.
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
    except UnreadableImage as error:  # an exception of its own: threads write their traces into it
        raise error.of(error.source) from None


def _state(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # remote, or not there, which the opener says
        return None
    return found.st_size, found.st_mtime_ns


def _fill(future: Future, key: tuple, path: str, opener: Callable[[str], Any]) -> None:
    try:
        future.set_result(opener(path))
    except BaseException as error:
        if not isinstance(error, UnreadableImage):
            with _lock:
                _open.pop(key, None)
        future.set_exception(error)
    with _lock:
        _forget_the_oldest()


def _forget_the_oldest() -> None:
    while len(_open) > MAX_OPEN or (len(_open) > 1 and sum(map(_size, _open.values())) > MAX_BYTES):
        _open.popitem(last=False)


def _size(future: Future) -> int:
    if not future.done() or future.exception() is not None:
        return 0
    return getattr(future.result(), "nbytes", 0)
