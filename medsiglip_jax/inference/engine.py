"""Rows in, embeddings out: reading, decoding, computing and fetching results all overlap.

Every command that runs the model over files does so here; `encode` has the function calls.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Float32

from medsiglip_jax.data.read_ahead import ahead
from medsiglip_jax.data.rows import Rows
from medsiglip_jax.files.threads import Threads, workers
from medsiglip_jax.inference.reader import Reader
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.bytes import Outage
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import (
    Facts,
    Refused,
    Subject,
    UnreadableImage,
    describe,
    too_long,
)

_RUNNING = 2  # batches on the device: one computes while the next is copied to it
REFUSED_IN_ROW = 50  # this many addresses that are dead one after the other mean an outage


@dataclass(frozen=True)
class Embedded:
    """A batch of rows and their embeddings.

    Attributes:
        rows: the batch, as it was given.
        reasons: for each row why it has no embedding, or None.
        vectors: embeddings of the readable rows, in order.
        turned: number of images whose EXIF orientation was not applied.
        burned_in: number of DICOM files that declare annotation burned into their pixels.
        multi_frame: number of files with several frames, slices or pages, of which one was taken.
        unusual: number of DICOM files with something unusual, `Facts.unusual`.
        dark: number of images of 16 bits that come out dark (`Facts.dark`).
        subjects: patient, study and series of each readable row, where the file names them.
        cut: number of texts that were longer than the model's context and were cut.
        formats: names of the formats (`preprocess.formats`) whose readers were asked.
    """

    rows: Rows
    reasons: list[str | None]
    vectors: Float32[np.ndarray, "k d"]
    turned: int
    burned_in: int
    multi_frame: int
    unusual: int
    dark: int
    subjects: list[Subject | None]
    cut: int
    formats: frozenset[str]

    @property
    def readable(self) -> Bool[np.ndarray, " n"]:
        """Which rows have an embedding."""
        return np.array([reason is None for reason in self.reasons])

    @property
    def errors(self) -> list[tuple[str, str]]:
        """(source without credentials, reason) of the rows without an embedding."""
        names = self.rows.shown.to_pylist()
        return [(n, r) for n, r in zip(names, self.reasons, strict=True) if r is not None]


@dataclass(frozen=True)
class _Loaded:
    """Inputs of the encoder, padded to the batch size; images have facts, texts have none."""

    inputs: np.ndarray
    reasons: list[str | None]
    facts: list[Facts]
    cut: int = 0
    refused: tuple[bool, ...] = ()
    formats: frozenset[str] = frozenset()


class Engine:
    """Embeds batches; every batch of a kind (image or text) has the same shape on the device.

    Threads read and decode images ahead of the device. A batch is padded to `batch_size`, so that
    one compiled program serves all of them; rows that cannot be read are zeros in it, and are left
    out of the result, as are those whose embeddings are not finite in the type to be `stored`.
    Where `REFUSED_IN_ROW` of them are `Refused` in a row, that is an `Outage`, unless `any_refused`
    says that it is not. `threads` read and decode, by default `workers()`. An image that takes
    longer than `Limits.read_timeout` ends the run with `Stalled`, an OSError: it is no damaged
    file, since on a mount that is gone each further one would hang, too, until no thread is left.
    """

    def __init__(
        self,
        model: Model,
        preset: str,
        normalize: bool,
        batch_size: int,
        dicom: Rules = Rules(),
        stored: str = "float32",
        any_refused: bool = False,
        threads: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self._model, self._normalize, self._size = model, normalize, batch_size
        self._reader, self._stored = Reader(model.config.vision, preset, dicom), stored
        self._any_refused, self._refused = any_refused, 0
        self._workers = threads or workers()
        self._start = self._idle_since = time.perf_counter()
        self._busy = 0.0

    def busy(self) -> float:
        """The share of the time so far in which the device was working, 0 to 1."""
        return self._busy / max(time.perf_counter() - self._start, 1e-9)

    def run(self, batches: Iterable[Rows]) -> Generator[Embedded]:
        """Yields the batches in order; each has rows of one kind, at most `batch_size`."""
        self._start = self._idle_since = time.perf_counter()
        loader = Threads("loader", self._workers)
        fetcher = ThreadPoolExecutor(1, thread_name_prefix="fetcher")
        running: deque[Future[Embedded]] = deque()
        try:
            started = ((batch, self._load(batch, loader)) for batch in batches)
            for batch, loading in ahead(started, 2 + self._workers // self._size):
                if len(running) >= _RUNNING:
                    yield running.popleft().result()
                try:
                    loaded = loading()
                    self._check_refused(batch, loaded)
                except Exception:  # the batches before this one are not lost
                    while running:
                        yield running.popleft().result()
                    raise
                running.append(self._dispatch(batch, loaded, fetcher))
            while running:
                yield running.popleft().result()
        finally:
            loader.close()
            fetcher.shutdown(cancel_futures=True)

    def _load(self, batch: Rows, pool: Threads) -> Callable[[], _Loaded]:
        """Starts loading a batch; the function returned waits until it is done."""
        if batch[0].kind == "text":
            return pool.submit(self._tokens, batch).result
        size = self._reader.size
        pixels = np.zeros((self._size, size, size, 3), np.uint8)
        names, known = batch.table.column("source").to_pylist(), batch.reasons
        images = [pool.submit(self._image, *row) for row in zip(names, pixels, known, strict=False)]

        def wait() -> _Loaded:
            waited = zip(images, names, strict=True)
            results = (pool.result(image, describe(name)) for image, name in waited)
            reasons, refused, facts, asked = zip(*results, strict=True)
            formats = frozenset(itertools.chain(*asked))
            return _Loaded(pixels, list(reasons), list(facts), 0, refused, formats)

        return wait

    def _tokens(self, batch: Rows) -> _Loaded:
        texts = [text or "" for text in batch.table.column("text").to_pylist()]
        reasons = [
            known or too_long(text) for known, text in zip(batch.reasons, texts, strict=True)
        ]
        texts = [
            text if reason is None else "" for text, reason in zip(texts, reasons, strict=True)
        ]
        tokens, cut = self._model.processor.tokenizer.ids_and_cut(texts)
        inputs = np.pad(tokens, ((0, self._size - len(tokens)), (0, 0)))
        return _Loaded(inputs, reasons, [], int(cut.sum()))

    def _image(
        self, source: str, out: np.ndarray, known: str | None = None
    ) -> tuple[str | None, bool, Facts, Sequence[str]]:
        """Fills `out`, or returns why the image cannot be read, which may be known already, and
        whether it was refused; and the formats whose readers were asked.

        Not the error itself: its traceback holds all that was read, 256 MiB of a deflated bomb.
        """
        if known is not None:
            return known, False, Facts(), ()
        asked: list[str] = []
        try:
            pixels, facts = self._reader.decode(source, lambda format: asked.append(format.name))
            out[...] = self._reader.square(pixels)
            return None, False, facts, asked
        except UnreadableImage as error:
            return error.reason, isinstance(error, Refused), Facts(), asked

    def _check_refused(self, batch: Rows, loaded: _Loaded) -> None:
        """Raises an Outage when too many images in a row are refused."""
        for number, refused in enumerate(loaded.refused):
            self._refused = self._refused + 1 if refused else 0
            if self._refused >= REFUSED_IN_ROW and not self._any_refused:
                last = f"{describe(batch[number].source)}: {loaded.reasons[number]}"
                raise Outage(
                    f"{self._refused} inputs in a row cannot be fetched, the last {last}; is the "
                    "network or a server down, or the permission gone? The same command starts "
                    "over or resumes; if the addresses really are dead, leave them out, or embed "
                    "them with --max-errors"
                )

    def _dispatch(self, batch: Rows, loaded: _Loaded, fetcher: ThreadPoolExecutor) -> Future:
        """Sends a batch to the device without waiting for its embeddings."""
        model = self._model
        encode = model.encode_image if batch[0].kind == "image" else model.encode_text
        start, vectors = time.perf_counter(), None
        if None in loaded.reasons:
            vectors = encode(loaded.inputs, self._normalize, self._size)
        return fetcher.submit(self._fetch, batch, loaded, vectors, start)

    def _fetch(
        self, batch: Rows, loaded: _Loaded, vectors: jax.Array | None, start: float
    ) -> Embedded:
        values = np.zeros((len(batch), self._model.config.embed_dim), np.float32)
        if vectors is not None:
            values = np.asarray(vectors)[: len(batch)]
        end = time.perf_counter()
        self._busy += end - max(start, self._idle_since)  # time shared with the one before: once
        self._idle_since = end
        wrong = map(self._not_finite, values)
        reasons = [given or own for given, own in zip(loaded.reasons, wrong, strict=True)]
        readable = [reason is None for reason in reasons]
        names = batch.table.column("source").to_pylist()
        subjects = [facts.subject for facts in loaded.facts] or [None] * len(batch)
        return Embedded(
            batch, reasons, values[readable],
            turned=sum(facts.orientation != 1 for facts in loaded.facts),
            burned_in=sum(facts.burned_in for facts in loaded.facts),
            multi_frame=sum(map(_has_other_frames, loaded.facts, names)),
            unusual=sum(facts.unusual for facts in loaded.facts),
            dark=sum(facts.dark for facts in loaded.facts),
            subjects=list(itertools.compress(subjects, readable)),
            cut=loaded.cut,
            formats=loaded.formats,
        )  # fmt: skip

    def _not_finite(self, vector: np.ndarray) -> str | None:
        """Why an embedding cannot be stored, or None."""
        if not np.isfinite(vector).all():
            return "the model gave numbers that are not finite"
        with np.errstate(over="ignore"):
            fits = np.isfinite(vector.astype(self._stored)).all()
        return None if fits else f"its embedding has numbers that {self._stored} cannot hold"


def _has_other_frames(facts: Facts, source: str) -> bool:
    """Whether the image is one of several frames, and not one that was asked for by number."""
    return facts.frames > 1 and not source.endswith(f"#frame={facts.frame}")
