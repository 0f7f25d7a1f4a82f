"""Instances in, vectors out: what every contract asks, and the limits that all of them share."""

import asyncio
import functools
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64

from medsiglip_jax.inference.reader import Reader
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import too_long
from medsiglip_jax.serve import images
from medsiglip_jax.serve.admission import Admission
from medsiglip_jax.serve.batching import Batcher
from medsiglip_jax.serve.errors import (
    BUSY,
    INTERNAL,
    INVALID_FIELD,
    NOT_ALLOWED,
    InstanceError,
    RequestError,
    note_bug,
)
from medsiglip_jax.serve.held import Held
from medsiglip_jax.serve.instances import Instance, Picture, Pixels, Reading, Text, decoded
from medsiglip_jax.serve.measures import Measures
from medsiglip_jax.serve.settings import Settings

Vector = Float32[np.ndarray, " d"]
# Vectors of one instance: of a text and of an image one, of an image in patches one for each.
Vectors = list[Vector]


@dataclass
class TextCounts:
    """What became of the texts of one request.

    Attributes:
        tokens: that they have, end tokens included.
        cut: texts that were longer than the model's context; it does not see their ends.
    """

    tokens: int = 0
    cut: int = 0


# Of the request that is being answered: `embed` adds to it, and a header tells of it on every
# route. The tasks of a request share it.
COUNTS: ContextVar[TextCounts] = ContextVar("text counts")


@dataclass(frozen=True)
class _KnownText:
    vector: Vector
    tokens: int
    cut: bool


@runtime_checkable
class Fetches(Protocol):
    """What gets the content of an address, or raises InstanceError."""

    def fetch(self, address: str) -> Awaitable[bytes]: ...

    def close(self) -> Awaitable[None]: ...


# Characters of a text whose vector is kept; more than 64 tokens have.
_LONGEST_KEPT = 4096


class Service:
    """A model that answers several requests at a time.

    Attributes:
        model: whose embeddings they are.
        settings: of the server.
        measures: what /metrics tells.
        queue: places for the rows of requests.
        scale: log temperature t and bias b: the logit is exp(t) * cosine + b; None of a
            tower alone.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        measures: Measures | None = None,
        fetcher: Fetches | None = None,
        held: Held | None = None,
    ):
        self.model, self.settings, self.measures = model, settings, measures or Measures()
        # Read once: on an accelerator it would wait for the batches that are on their way.
        scale = [np.asarray(model.params[k], np.float32).item() for k in "tb" if k in model.params]
        self.scale = (scale[0], scale[1]) if scale else None
        self._fetcher, self._held = fetcher, held or Held(settings.max_held)
        wait = settings.max_wait_ms / 1000
        self._batcher = Batcher(model, settings.max_batch, wait, self.measures)
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="reader")
        self.queue = Admission(settings.queue)
        self._texts: OrderedDict[str, _KnownText] = OrderedDict()
        # A request may bring rules of its own, such as a window.
        self._reader = functools.lru_cache(64)(functools.partial(Reader, model.config.vision))
        self._ready = False
        self.measures.watch(self._batcher.waiting, lambda: self.queue.pending)

    def start(self) -> None:
        """Compiles all programs; minutes for a large model."""
        self._batcher.start()
        self._ready = True

    def close(self) -> None:
        """Ends the threads; what was accepted is answered."""
        self._ready = False
        self._batcher.close()
        self._pool.shutdown()

    @property
    def alive(self) -> bool:
        """Whether the device answers."""
        return self._batcher.alive

    @property
    def ready(self) -> bool:
        """Whether a request would be accepted now."""
        return self._ready and self.alive and self.queue.pending < self.queue.most

    @property
    def default_reading(self) -> Reading:
        """How an image becomes pixels where its contract does not say otherwise."""
        preparation = self.settings.prepared(self.model.config)
        return Reading(preparation.preprocess, preparation.dicom)

    def bounded(self, rules: Rules) -> Rules:
        """Rules of something else, such as a probe's, with this server's limits of sizes."""
        ours = self.settings.rules
        return replace(rules, max_pixels=ours.max_pixels, max_side=ours.max_side)

    async def embed(
        self, instances: Sequence[Instance | InstanceError]
    ) -> list[Vectors | InstanceError]:
        """Embeds each instance on its own: one that is wrong does not harm the others.

        Args:
            instances: of a request; errors of those that were wrong before stay in their places.

        Returns:
            In the order given, the vectors of each, float32 and not normalised, or what is wrong.

        Raises:
            RequestError: 429 if the queue is full, 413 if it can never hold so many.
        """
        rows = sum(map(_rows, instances))
        with self.queue.admitted(rows):
            try:
                return await asyncio.gather(*map(self._embed, instances))
            finally:
                self.queue.answered(rows)

    def similarity(
        self, zimg: Float32[np.ndarray, "i d"], ztxt: Float32[np.ndarray, "t d"]
    ) -> Float64[np.ndarray, "i t"]:
        """`Model.similarity` of normalised vectors, which waits for neither device nor compiler.

        Raises:
            RequestError: 400, the model holds only one tower.
        """
        if self.scale is None:
            raise RequestError(400, "this model has no temperature: it holds only one tower")
        t, b = self.scale
        return (np.exp(np.float32(t)) * (zimg @ ztxt.T) + np.float32(b)).astype(np.float64)

    async def run(self, function: Callable, *args):
        """Runs what takes long, such as parsing a large request, in a thread of the pool.

        Raises:
            RequestError: as `Admission.admitted`, of a request that has no place yet.
        """
        with self.queue.admitted():
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    # -------------------------------------------------------------------------------- one instance

    async def _embed(self, instance: Instance | InstanceError) -> Vectors | InstanceError:
        try:
            if isinstance(instance, InstanceError):
                raise instance
            if isinstance(instance, Text):
                return [await self._embed_text(instance.text)]
            if isinstance(instance, Pixels):
                self._check_kind("image")
                read = functools.partial(list, [instance.values])
                return await self._encode("image", await self._read("image", 1, read))
            return await self._embed_picture(instance)
        except InstanceError as error:
            wrong = error
        except Exception as error:  # a fault of ours in one instance, which harms no other
            note_bug(error)
            wrong = InstanceError(INTERNAL, "internal error")
        self.measures.instance_error(wrong.code)
        return wrong

    async def _embed_text(self, text: str) -> Vector:
        known = self._texts.get(text)
        self.measures.text(known is not None)
        if known is None:
            known = await self._embed_new_text(text)
            if len(text) <= _LONGEST_KEPT:
                self._texts[text] = known
            while len(self._texts) > self.settings.cached_texts:
                self._texts.popitem(last=False)
        else:
            self._texts.move_to_end(text)
        if counts := COUNTS.get(None):
            counts.tokens += known.tokens
            counts.cut += known.cut
        return known.vector

    async def _embed_new_text(self, text: str) -> _KnownText:
        if reason := too_long(text):
            raise InstanceError(INVALID_FIELD, reason)
        self._check_kind("text")
        tokens, is_cut = 0, False

        def read() -> list[np.ndarray]:
            nonlocal tokens, is_cut
            tokenizer = self.model.processor.tokenizer
            try:
                ids, cut = tokenizer.ids_and_cut([text])
            except ValueError:
                problem = "the text cannot be written as UTF-8: it holds a lone surrogate"
                raise InstanceError(INVALID_FIELD, problem) from None
            tokens, is_cut = int(tokenizer.lengths(ids)[0]), bool(cut[0])
            return list(ids)

        [vector] = await self._encode("text", await self._read("text", 1, read))
        return _KnownText(vector.copy(), tokens, is_cut)

    async def _embed_picture(self, picture: Picture) -> Vectors:
        reading = picture.reading or self.default_reading
        self._check_kind(reading.kind)
        return await self._encode(reading.kind, await self._read_picture(picture, reading))

    async def _read_picture(self, picture: Picture, reading: Reading) -> list[np.ndarray]:
        """The rows of a picture; what was fetched for it is counted until it is decoded."""
        with self._held.counting() as hold:
            data = await self._fetch(picture.address) if picture.address is not None else b""
            if not hold(len(data)):
                problem = f"requests of {self._held.most:,} bytes are being answered; try again"
                raise InstanceError(BUSY, problem)

            def read() -> list[np.ndarray]:
                content = data or decoded(picture.content or "")
                return images.squares(content, picture, self._reader(reading.preset, reading.rules))

            return await self._read(reading.kind, picture.rows, read)

    async def _fetch(self, address: str) -> bytes:
        if self._fetcher is None:
            raise InstanceError(NOT_ALLOWED, "this server fetches no addresses (--allow-host)")
        return await self._fetcher.fetch(address)

    def _check_kind(self, kind: str) -> None:
        if kind not in self._batcher.kinds:
            tower = "text" if kind == "text" else "image"
            raise InstanceError(INVALID_FIELD, f"this model has no {tower} tower")

    async def _read(
        self, kind: str, count: int, read: Callable[[], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """Announces rows, and reads them in the pool."""
        self._batcher.coming(kind, count)
        try:
            return await self.run(read)
        except BaseException:
            self._batcher.coming(kind, -count)
            raise

    async def _encode(self, kind: str, rows: list[np.ndarray]) -> Vectors:
        """The vectors of rows that were announced."""
        futures = [asyncio.wrap_future(self._batcher.submit(kind, row)) for row in rows]
        return await asyncio.gather(*futures)


def _rows(instance: Instance | InstanceError) -> int:
    """How many vectors it gets."""
    if isinstance(instance, InstanceError):
        return 0
    return instance.rows if isinstance(instance, Picture) else 1


def unit(vectors: Vectors) -> Vectors:
    """The vectors divided by their norms, as `Model.encode_image` does it."""
    return [v / (np.linalg.norm(v) + np.float32(1e-8)) for v in vectors]


async def embed_all(
    service: Service, given: Mapping[str, Instance | InstanceError]
) -> list[Vector]:
    """One vector for each instance, where a contract has no error of a single one.

    Args:
        service: that embeds them.
        given: by their places in the request, such as "input[3]"; none of them in patches.

    Raises:
        RequestError: with the place of the first that cannot be answered; 500 if that is our fault,
            429 if it would be answered later.
    """
    answers = await service.embed(list(given.values()))
    for place, answer in zip(given, answers, strict=True):
        if isinstance(answer, InstanceError):
            status = {INTERNAL: 500, BUSY: 429}.get(answer.code, 400)
            headers = {"Retry-After": "1"} if answer.code == BUSY else {}
            raise RequestError(status, f"{place}: {answer.description}", headers)
    return [vector for answer in answers if not isinstance(answer, InstanceError)
            for vector in answer]  # fmt: skip
