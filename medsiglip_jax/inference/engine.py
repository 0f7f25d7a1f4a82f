"""Rows -> embeddings: reading, decoding, the device and the way back, all at the same time."""

import itertools
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32

from medsiglip_jax.data.rows import Rows
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess import sources, xla
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import Facts, Subject, UnreadableImage

_RUNNING = 2  # batches on the device: one computes while the next is copied to it


@dataclass(frozen=True)
class Embedded:
    """A batch, done.

    Attributes:
        rows: as they were given.
        readable: which of them have a vector.
        vectors: of the readable ones, in order.
        errors: (source, reason) of the others.
        turned: images among them whose EXIF orientation was not applied.
        burned_in: DICOM files that say that annotation is in their pixels.
        multi_frame: files of several frames or slices, of which one was taken.
        subjects: whose image each of the readable rows is, where the file says so.
        cut: texts that were longer than the model reads.
    """

    rows: Rows
    readable: Bool[np.ndarray, " n"]
    vectors: Float32[np.ndarray, "k d"]
    errors: list[tuple[str, str]]
    turned: int
    burned_in: int
    multi_frame: int
    subjects: list[Subject | None]
    cut: int


@dataclass(frozen=True)
class _Loaded:
    inputs: np.ndarray
    reasons: list[str | None]
    facts: list[Facts]
    cut: int = 0


class Engine:
    """Embeds batches of one kind of row; every batch of a kind has the same shape on the device.

    Images are read and decoded by threads that keep ahead of the device. A batch is padded to
    `batch_size`; rows that cannot be read are zeros in it, and left out of the result.
    """

    def __init__(
        self,
        model: Model,
        preprocess: str,
        normalize: bool,
        batch_size: int,
        dicom: Rules = Rules(),
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self._model, self._normalize, self._size = model, normalize, batch_size
        self._to_array, self._resize = xla.preset(preprocess)
        self._dicom = dicom
        self._image_size = model.config.vision.image_size if model.config.vision else 0
        self._workers = os.cpu_count() or 1
        self._start = self._idle_since = time.perf_counter()
        self._busy = 0.0

    def busy(self) -> float:
        """The share of the time so far in which the device had something to do."""
        return self._busy / max(time.perf_counter() - self._start, 1e-9)

    def run(self, batches: Iterable[Rows]) -> Generator[Embedded]:
        """Yields the batches in order; each has rows of one kind, at most `batch_size`."""
        ahead = 2 + self._workers // self._size
        self._start = self._idle_since = time.perf_counter()
        loader = ThreadPoolExecutor(self._workers, thread_name_prefix="loader")
        fetcher = ThreadPoolExecutor(1, thread_name_prefix="fetcher")
        running: deque[Future[Embedded]] = deque()
        try:
            for batch, loading in _ahead(batches, ahead, lambda b: self._load(b, loader)):
                if len(running) >= _RUNNING:
                    yield running.popleft().result()
                try:
                    loaded = loading()
                except Exception:  # what came before it is not lost
                    while running:
                        yield running.popleft().result()
                    raise
                running.append(self._dispatch(batch, loaded, fetcher))
            while running:
                yield running.popleft().result()
        finally:
            for pool in (loader, fetcher):
                pool.shutdown(cancel_futures=True)

    def _load(self, batch: Rows, pool: ThreadPoolExecutor) -> Any:
        """Starts loading, and returns what waits for it."""
        if batch[0].kind == "text":
            return pool.submit(self._tokens, batch).result
        size = self._image_size
        pixels = np.zeros((self._size, size, size, 3), np.uint8)
        named = batch.table.column("source").to_pylist()
        parts = [pool.submit(self._image, s, pixels[i]) for i, s in enumerate(named)]
        return lambda: _joined(pixels, [part.result() for part in parts])

    def _tokens(self, batch: Rows) -> _Loaded:
        texts = batch.table.column("text").to_pylist()
        tokens, cut = self._model.processor.tokenizer.ids_and_cut(texts)
        missing = self._size - len(tokens)
        inputs = np.pad(tokens, ((0, missing), (0, 0)))
        return _Loaded(inputs, [None] * len(batch), [], int(cut.sum()))

    def _image(self, source: str, out: np.ndarray) -> tuple[str | None, Facts]:
        """Fills `out`; why it could not, and what to tell about the image."""
        try:
            pixels, facts = sources.read(source, self._to_array, self._dicom)
            out[...] = self._resize(pixels, len(out))
            return None, facts
        except UnreadableImage as error:
            return error.reason, Facts()

    def _dispatch(self, batch: Rows, loaded: _Loaded, fetcher: ThreadPoolExecutor) -> Future:
        model, image = self._model, batch[0].kind == "image"
        encode = model.encode_image if image else model.encode_text
        anything = any(reason is None for reason in loaded.reasons)
        start = time.perf_counter()
        vectors = encode(loaded.inputs, self._normalize, self._size) if anything else None
        return fetcher.submit(self._fetch, batch, loaded, vectors, start)

    def _fetch(
        self, batch: Rows, loaded: _Loaded, vectors: jax.Array | None, start: float
    ) -> Embedded:
        dim = self._model.config.embed_dim
        values = np.zeros((0, dim), np.float32) if vectors is None else np.asarray(vectors)
        end = time.perf_counter()
        self._busy += end - max(start, self._idle_since)
        self._idle_since = end
        reasons = [
            reason or (None if finite else "the model gave numbers that are not finite")
            for reason, finite in zip(
                loaded.reasons, _finite(values, len(batch)).tolist(), strict=True
            )
        ]
        readable = np.array([reason is None for reason in reasons])
        named = batch.table.column("source").to_pylist()
        errors = [(s, r) for s, r in zip(named, reasons, strict=True) if r is not None]
        kept = values[: len(batch)][readable] if len(values) else values
        subjects = [facts.subject for facts in loaded.facts] or [None] * len(batch)
        return Embedded(
            batch, readable, kept, errors,
            turned=sum(facts.orientation != 1 for facts in loaded.facts),
            burned_in=sum(facts.burned_in for facts in loaded.facts),
            multi_frame=sum(map(_left_some_out, loaded.facts, named)),
            subjects=list(itertools.compress(subjects, readable)),
            cut=loaded.cut,
        )  # fmt: skip


def _left_some_out(facts: Facts, source: str) -> bool:
    """Whether the image is one of several frames, and nobody has asked for that one."""
    return facts.frames > 1 and not source.endswith(f"#frame={facts.frame}")


def _finite(values: np.ndarray, rows: int) -> np.ndarray:
    if not len(values):
        return np.ones(rows, bool)
    return np.array([np.isfinite(row).all() for row in values[:rows]], bool)


def _joined(pixels: np.ndarray, results: list[tuple[str | None, Facts]]) -> _Loaded:
    return _Loaded(pixels, [reason for reason, _ in results], [facts for _, facts in results])


def _ahead(items: Iterable[Any], count: int, start: Any) -> Iterator[tuple[Any, Any]]:
    """(item, start(item)) in order, started `count` items before they are asked for."""
    waiting: deque[tuple[Any, Any]] = deque()
    for item in items:
        waiting.append((item, start(item)))
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
