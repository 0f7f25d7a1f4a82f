"""How many rows a server accepts at a time: every request asks for places in one queue."""

import contextlib
import math
import time
from collections.abc import Iterator
from contextvars import ContextVar

from medsiglip_jax.serve.errors import RequestError

# Places in the queue that the request that is being answered has.
_PLACES: ContextVar[int] = ContextVar("places", default=0)


class Admission:
    """Counts the rows (images, patches and texts) of the requests that are being answered.

    Attributes:
        most: rows at a time.
        pending: rows now.
    """

    def __init__(self, most: int):
        self.most, self.pending, self._pace = most, 0, _Pace()

    def check_count(self, rows: int) -> None:
        """Raises RequestError 413 if the queue can never hold so many rows."""
        if rows > self.most:
            problem = (
                f"{rows} images, patches and texts in one request; expected at most {self.most}"
            )
            raise RequestError(413, problem)

    @contextlib.contextmanager
    def admitted(self, rows: int = 1) -> Iterator[None]:
        """Keeps so many places in the queue for the request that is being answered, with those
        that it has already.

        Every route asks for one before any of its work waits for a thread, so that a full queue is
        told at once, however busy the threads are.

        Raises:
            RequestError: 429 if the queue is full, 413 if it can never hold so many.
        """
        self.check_count(rows)
        held = _PLACES.get()
        more = max(0, rows - held)
        if self.pending + more > self.most:
            seconds = self._pace.seconds(self.pending)
            problem = f"the queue of {self.most} is full; try again in {seconds} s"
            raise RequestError(429, problem, {"Retry-After": str(seconds)})
        self.pending += more
        token = _PLACES.set(held + more)
        try:
            yield
        finally:
            _PLACES.reset(token)
            self.pending -= more

    def answered(self, rows: int) -> None:
        """Notes that so many rows have been answered, of which the time to wait is made."""
        self._pace.add(rows)


class _Pace:
    """How fast rows are answered, over the last ones."""

    _KEPT, _RECENT = 32, 60.0  # answers, and seconds

    def __init__(self) -> None:
        self._done: list[tuple[float, int]] = []

    def add(self, rows: int) -> None:
        if rows:
            self._done = [*self._done[1 - self._KEPT :], (time.monotonic(), rows)]

    def seconds(self, rows: int) -> int:
        """In how many seconds so many rows will be answered, 1 to 600."""
        now = time.monotonic()
        recent = [(when, count) for when, count in self._done if now - when < self._RECENT]
        if len(recent) < 2:
            return 1
        rate = sum(count for _, count in recent[1:]) / max(now - recent[0][0], 1e-3)
        return min(600, max(1, math.ceil(rows / max(rate, 1e-3))))
