"""Rows of many requests -> batches on the device -> one answer for each row.

Whoever waits for the device waits here: a queue for each kind of row, and one thread that takes
from them what is there, up to the largest batch. Batches are padded to powers of two, for which
programs are compiled before the first request, so that no request waits for a compiler.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from medsiglip_jax.model.api import Model
from medsiglip_jax.serve.errors import INTERNAL, InstanceError, note_bug
from medsiglip_jax.serve.measures import Measures

# A device that has worked on one batch for so long is taken for dead.
STUCK_SECONDS = 300.0
# Rows of one call on CPUs: larger batches are slower there, and need a program each.
_ON_CPU = 8


@dataclass
class _Row:
    """One row of the input of a tower, and who waits for its vector."""

    values: np.ndarray
    future: Future
    since: float = field(default_factory=time.perf_counter)


Encode = Callable[[np.ndarray], jax.Array]


class Batcher:
    """Embeds rows as they come.

    An idle device takes the first row at once. While further rows are announced (`coming`), which
    are being read and decoded, or are likely to come, it waits for them, but for no longer than
    `max_wait` seconds.
    """

    def __init__(
        self, model: Model, max_batch: int, max_wait: float, measures: Measures | None = None
    ):
        self._max_batch, self._max_wait = max_batch, max_wait
        self._measures = measures or Measures()
        self._encoders = dict(_encoders(model, max_batch))
        self._queues: Mapping[str, deque[_Row]] = {kind: deque() for kind in self._encoders}
        self._coming = dict.fromkeys(self._encoders, 0)
        self._changed = threading.Condition()
        self._closed, self._last_rows, self._done_at = False, 0, 0.0
        self._started: dict[int, float] = {}  # batches on the device, by the id of their rows
        # One batch computes while the next is copied to the device; a CPU does both itself.
        deep = 1 if jax.default_backend() == "cpu" else 2
        self._running = threading.Semaphore(deep)
        self._fetcher = ThreadPoolExecutor(deep, thread_name_prefix="results")
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Compiles the programs of all batch sizes, and starts the thread of the device."""
        for encode, empty in self._encoders.values():
            for power in range(_rows_per_call(self._max_batch).bit_length()):
                np.asarray(encode(np.zeros((1 << power, *empty.shape), empty.dtype)))
        self._thread.start()

    def close(self) -> None:
        """Ends the thread once its queues are empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        self._fetcher.shutdown()

    @property
    def kinds(self) -> frozenset[str]:
        """What can be embedded: "image", "text", and "features" if a classifier reads others."""
        return frozenset(self._encoders)

    @property
    def alive(self) -> bool:
        """Whether the device answers: its thread runs, and no batch takes forever."""
        oldest = min([*self._started.values()], default=None)
        stuck = oldest is not None and time.perf_counter() - oldest > STUCK_SECONDS
        return self._thread.is_alive() and not stuck

    def coming(self, kind: str, change: int) -> None:
        """Announces rows that are being read (+n), or says that they will not come after all."""
        with self._changed:
            self._coming[kind] += change
            self._changed.notify_all()

    def submit(self, kind: str, values: np.ndarray) -> "Future[Float32[np.ndarray, ' d']]":
        """Queues one row that was announced; the future has its vector, which is not normalised.

        Raises (in the future):
            InstanceError: the device failed, or gave numbers that are not finite.
        """
        row = _Row(values, Future())
        with self._changed:
            self._coming[kind] -= 1
            self._queues[kind].append(row)
            self._changed.notify_all()
        return row.future

    def waiting(self) -> int:
        """How many rows wait for the device."""
        return sum(map(len, self._queues.values()))

    # ------------------------------------------------------------------ the thread of the device

    def _run(self) -> None:
        while True:
            self._running.acquire()
            taken = self._take()
            if taken is None:
                return
            kind, rows = taken
            if not rows:  # those who asked have gone
                self._running.release()
                continue
            start = self._started[id(rows)] = time.perf_counter()
            try:
                vectors = self._dispatch(kind, rows)
            except Exception as error:
                self._fail(rows, error)
            else:
                self._fetcher.submit(self._fetch, rows, vectors, start)

    def _take(self) -> tuple[str, list[_Row]] | None:
        """The next batch, of the kind whose first row waits longest; None at the end."""
        with self._changed:
            while not any(self._queues.values()):
                if self._closed:
                    return None
                self._changed.wait()
            heads = {kind: queue[0].since for kind, queue in self._queues.items() if queue}
            kind = min(heads, key=heads.__getitem__)
            queue, end = self._queues[kind], time.perf_counter() + self._max_wait
            while len(queue) < self._max_batch and self._expects_more(kind):
                if (left := end - time.perf_counter()) <= 0:
                    break
                self._changed.wait(left)
            taken = [queue.popleft() for _ in range(min(len(queue), self._max_batch))]
        rows = [row for row in taken if row.future.set_running_or_notify_cancel()]
        self._last_rows, now = len(rows), time.perf_counter()
        self._measures.batch(kind, len(rows), [now - row.since for row in rows])
        return kind, rows

    def _expects_more(self, kind: str) -> bool:
        """Whether rows are being read, or those who were just answered are likely to ask again:
        else a batch of 1 and one of 15 would take turns where 16 clients ask without a pause."""
        just_answered = time.perf_counter() - self._done_at < self._max_wait
        fewer = len(self._queues[kind]) < self._last_rows
        return self._coming[kind] > 0 or (just_answered and fewer)

    def _dispatch(self, kind: str, rows: list[_Row]) -> jax.Array:
        encode, empty = self._encoders[kind]
        size = 1 << (len(rows) - 1).bit_length()
        values = np.zeros((size, *empty.shape), empty.dtype)
        for out, row in zip(values, rows, strict=False):
            out[...] = row.values
        return encode(values)

    def _fetch(self, rows: list[_Row], vectors: jax.Array, start: float) -> None:
        try:
            values = np.asarray(vectors)[: len(rows)]
        except Exception as error:
            self._fail(rows, error)
            return
        # Time shared with another batch counts once; that one may have ended since.
        busy = time.perf_counter() - max(start, self._done_at)
        self._measures.device(max(0.0, busy))
        self._done(rows)
        for row, vector in zip(rows, values, strict=True):
            if np.isfinite(vector).all():
                row.future.set_result(vector)
            else:
                problem = "the model gave numbers that are not finite"
                row.future.set_exception(InstanceError(INTERNAL, problem))

    def _fail(self, rows: list[_Row], error: Exception) -> None:
        """The rows of one batch have no answer; the next batch may have one."""
        self._done(rows)
        self._measures.device_failed(error)
        note_bug(error)
        for row in rows:
            row.future.set_exception(InstanceError(INTERNAL, "the device failed on this batch"))

    def _done(self, rows: list[_Row]) -> None:
        self._started.pop(id(rows), None)
        self._done_at = time.perf_counter()
        self._running.release()


def _encoders(model: Model, max_batch: int) -> Iterator[tuple[str, tuple[Encode, np.ndarray]]]:
    """Kind -> its tower, and an empty row of what that takes."""
    size, config = _rows_per_call(max_batch), model.config

    def of(encode: Callable[..., Any]) -> Encode:
        return lambda values: encode(values, normalize=False, batch_size=size)

    if config.vision is not None:
        black = np.zeros((config.vision.image_size,) * 2 + (3,), np.uint8)
        yield "image", (of(model.encode_image), black)
        if config.classifier is not None and config.classifier.pool != config.vision.pool:
            yield "features", (of(model.features.encode_image), black)
    if config.text is not None:
        yield "text", (of(model.encode_text), np.zeros(config.text.context_length, np.int32))


def _rows_per_call(max_batch: int) -> int:
    """Batches of more rows are several calls of the same program."""
    return min(max_batch, _ON_CPU) if jax.default_backend() == "cpu" else max_batch
