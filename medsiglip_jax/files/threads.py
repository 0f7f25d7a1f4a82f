"""Threads that read files: how many there are, and what happens when a disk never answers.

A read of a network disk that is gone does not fail, it hangs, and nothing in the process can end
it. Whoever waits for a thread therefore waits for `limits.Limits.read_timeout` at most, and a
thread that hangs does not keep the process from ending.
"""

import contextlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from medsiglip_jax.files import limits

T = TypeVar("T")
Item = TypeVar("Item")
Step = Callable[[], Any]  # says that a file was listed

# Seconds for which the end of other work waits for files that are being read. A machine that is
# taken away gives about 30 seconds after SIGTERM, in which the rows so far are to be saved.
_GRACE = 5.0
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Stalled(OSError):
    """A file was not read in time, which says more about its disk than about the file."""

    def __init__(self, name: str, seconds: float):
        self._given = name, seconds
        super().__init__(
            f"{name}: not read within {seconds:g} s; is its disk or network mount gone? What is "
            "finished is kept, and the same command starts over or resumes. If the file only takes "
            "long, raise --read-timeout (0 waits for ever); if it never ends, leave it out"
        )

    def __reduce__(self) -> tuple[Any, ...]:  # it comes from other processes, too
        return type(self), self._given


class Threads:
    """A pool of daemon threads, which begin their work in the order in which it is submitted.

    The process does not wait for them when it ends, as it does for a `ThreadPoolExecutor`.
    """

    def __init__(self, name: str, count: int | None = None, grace: float = _GRACE):
        """Threads start with the work; at most `count` of them, by default `workers()`. `close`
        waits `grace` seconds for what has begun."""
        self._name, self._count, self._grace = name, count or workers(), grace
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Starts `function(*args)` once a thread is free."""
        future: Future[T] = Future()
        self._tasks.put((future, function, args))
        if (number := len(self._threads)) < self._count:
            name = f"{self._name}_{number}"
            thread = threading.Thread(target=_work, args=(self._tasks,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def result(self, future: Future[T], name: str) -> T:
        """What a future returns or raises. Futures are waited for in the order of `submit`, so
        that the one that is waited for has been started.

        Args:
            future: of this pool.
            name: of what is being read, for the message.

        Raises:
            Stalled: it takes more than `limits.Limits.read_timeout` seconds.
        """
        seconds = limits.current().read_timeout
        try:
            return future.result(seconds or None)
        except TimeoutError:
            if future.done():  # the function's own
                raise
            self._grace = 0.0
            raise Stalled(name, seconds) from None

    def map(
        self, function: Callable[[Item], T], items: Iterable[Item], name: Callable[[Item], str]
    ) -> Iterator[T]:
        """The results of a function for all items, in order; `name` is that of an item."""
        started = [(self.submit(function, item), item) for item in items]
        return (self.result(future, name(item)) for future, item in started)

    def close(self) -> None:
        """Cancels what has not begun, and waits a moment for what has."""
        with contextlib.suppress(queue.Empty):
            while True:
                if task := self._tasks.get_nowait():
                    task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + self._grace
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        _left.extend(thread for thread in self._threads if thread.is_alive())


_left: list[threading.Thread] = []  # behind by pools that have been closed


def watched(make: Callable[[Step], T], name: str) -> T:
    """What `make` returns, which a thread calls with a function that it has to call again and
    again.

    Raises:
        Stalled: it has not done so, nor returned, for `limits.Limits.read_timeout` seconds.
    """
    seconds, last = limits.current().read_timeout, time.monotonic()

    def step() -> None:
        nonlocal last
        last = time.monotonic()

    with Threads("watched", 1, grace=0.0) as pool:
        future = pool.submit(make, step)
        while True:
            left = last + seconds - time.monotonic()
            if seconds and left <= 0:
                raise Stalled(name, seconds)
            with contextlib.suppress(TimeoutError):
                return future.result(left if seconds else None)
            if future.done():
                return future.result()


@contextlib.contextmanager
def stepping(step: Step) -> Iterator[None]:
    """Calls the function that `watched` gives again and again until the end of the block: of
    requests, which have limits of their own on time, and of which one call may make thousands."""
    seconds, ended = limits.current().read_timeout, threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds / 4 or None):
            step()

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def are_left() -> bool:
    """Whether threads of closed pools are still at work, or hang."""
    return any(thread.is_alive() for thread in _left)


def _work(tasks: "queue.SimpleQueue[Any]") -> None:
    while (task := tasks.get()) is not None:
        future, function, args = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
        del task, future, function, args  # which hold pixels while this waits for the next


# --------------------------------------------------------------------------------- how many

# One value for the process, as `limits` has: images are read in many places.
_workers: int | None = None


def workers() -> int:
    """How many threads read and decode images: what `use` was given, else `processors()`."""
    return _workers or processors()


@contextlib.contextmanager
def use(count: int | None) -> Iterator[None]:
    """Sets `workers` of this process until the end of the block; None leaves it as it is."""
    global _workers
    if count is not None and count < 1:
        raise ValueError(f"--workers {count}: expected at least 1")
    before, _workers = _workers, count or _workers
    try:
        yield
    finally:
        _workers = before


def processors(mounted: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """How many cores this process may use, at least 1: those it is bound to, and no more than the
    quota of its container, rounded up.

    Args:
        mounted: where Linux shows its control groups.
        own: the file that says in which of them this process is.
    """
    count = getattr(os, "process_cpu_count", None)  # of Python 3.13
    affinity = getattr(os, "sched_getaffinity", None)
    cores = count() if count else len(affinity(0)) if affinity else os.cpu_count()
    return max(1, math.ceil(min(cores or 1, _quota(mounted, own))))


def _quota(mounted: Path, own: Path) -> float:
    """CPUs per second of the strictest control group above this process; infinite without one."""
    return min((_limit(folder) for folder in _groups(mounted, own)), default=math.inf)


def _groups(mounted: Path, own: Path) -> Iterator[Path]:
    """The folders of the control groups of this process, and of those above them.

    A container sees its own group as the root, while `own` may name it as the host does: folders
    that do not exist have no limits.
    """
    try:
        lines = own.read_text().splitlines()
    except (OSError, UnicodeDecodeError):  # no Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
        for folder in (group, *group.parents):
            yield mounted / controllers / folder


def _limit(folder: Path) -> float:
    """CPUs per second that a control group may use, of version 2 (`cpu.max`) or 1."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((folder / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf
