"""Batches of pixels, tokens and labels from `Examples` in `Order`; PIL and numpy, threads.

A codec decodes and resizes the images: PIL and numpy here, or TensorFlow (`data.tf`) with the same
pixels. A batch is a function of (input, step) alone, so that a run resumes by starting at a step.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import UInt8

from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.order import Once, Order
from medsiglip_jax.data.read_ahead import ahead
from medsiglip_jax.files.places import check_protocol
from medsiglip_jax.files.threads import Threads
from medsiglip_jax.preprocess import image as presets
from medsiglip_jax.preprocess.augment import Augment
from medsiglip_jax.preprocess.codec import Codec, load_image, pil_codec
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage

Batch = dict[str, np.ndarray]
OnError = Callable[[str, str], None]

_PREFETCH = 2  # batches in preparation beyond the one that is waited for


@dataclass(frozen=True)
class Input:
    """Everything that determines the batches, whatever the codec and the number of hosts.

    Attributes:
        examples: one or more sources; all have texts or none has, and likewise labels.
        order: the order of the rows; its sizes are those of `examples`.
        image_size: height and width of the images, in pixels.
        preprocess: name of a preset of `preprocess.image`.
        augment: augmentation of training images; evaluation ignores it.
        seed: of the augmentation, >= 0.
        tokenize: texts -> int32 [n, l]; None leaves texts out of the batches.
        dicom: how DICOM files become pixels.
    """

    examples: tuple[Examples, ...]
    order: Order | Once
    image_size: int
    preprocess: str = "big_vision"
    augment: Augment = Augment()
    seed: int = 0
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None
    dicom: Rules = Rules()

    def __post_init__(self):
        presets.preset(self.preprocess)
        sizes = tuple(map(len, self.examples))
        if self.order.sizes != sizes:
            raise ValueError(f"order.sizes is {self.order.sizes}, but the examples are {sizes}")
        if self.image_size < 1 or self.seed < 0:
            raise ValueError(f"image_size {self.image_size} is below 1 or seed {self.seed} below 0")
        for name in ("texts", "labels"):
            have = [getattr(source, name) is not None for source in self.examples]
            if any(have) and not all(have):
                raise ValueError(f"only some sources have {name}: {have}; expected all or none")
        if len({source.classes for source in self.examples}) > 1:
            raise ValueError("the sources have different classes; give all the same classes=")

    @functools.cached_property
    def id_offsets(self) -> list[int]:
        """The number to add to the `positives` of each source, so that no two share an id."""
        ids = [source.positives for source in self.examples]
        counts = [0 if i is None else max(0, int(i.max()) + 1) for i in ids]
        return np.cumsum([0, *counts[:-1]]).tolist()


def batches(
    input: Input,
    batch_size: int,
    start_step: int = 0,
    total_steps: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
    on_error: OnError = lambda path, reason: None,
    workers: int | None = None,
    codec: Codec | None = None,
) -> Iterator[Batch]:
    """Yields this host's part of the training batches `start_step` to `total_steps` - 1.

    A batch: `image` uint8 [b,s,s,3], `mask` bool [b] (False where the image could not be read; its
    pixels are then 0), and, if the examples have them, `text` int32 [b,l], `label` int32 [b] or
    float32 [b,C], `positives` int32 [b]. b is batch_size / process_count; host i gets the i-th
    part.

    Args:
        input: what to read.
        batch_size: number of rows of the global batch, over all hosts.
        start_step: the first step; nothing before it is read.
        total_steps: the step to stop before; None never stops.
        process_index: this host.
        process_count: number of hosts.
        on_error: called with path and reason for every masked image, in the order of the rows.
        workers: number of threads; default `threads.workers`.
        codec: how images are decoded and resized; default with PIL and numpy.

    Raises:
        ValueError: at once, not at the first batch: a size that does not fit, or a path such as
            gs:// without the package that reads it.
        OSError: when a batch is taken: the disk or the network fails (`Outage`), or does not answer
            in `Limits.read_timeout` (`Stalled`).
    """
    places = part(input, batch_size, process_index, process_count)
    steps = range(start_step, np.iinfo(np.int64).max if total_steps is None else total_steps)
    load = functools.partial(_load_row, input, codec or pil_codec(input.preprocess, input.dicom))
    pool = Threads("loader", workers)

    def start(step: int) -> Callable[[], Batch]:
        """Starts loading a batch; the function returned waits until it is done."""
        plan = np.stack(input.order.at(step * batch_size + places), axis=1).tolist()
        images = np.zeros((len(plan), input.image_size, input.image_size, 3), np.uint8)
        others = pool.submit(columns, input, plan)  # first: it names what is waited for
        rows = [pool.submit(load, place, out) for place, out in zip(plan, images, strict=True)]

        def finish() -> Batch:
            batch = others.result()
            paths = batch.pop("paths")
            reasons = [pool.result(row, path) for row, path in zip(rows, paths, strict=True)]
            report(paths, reasons, on_error)
            return {"image": images, "mask": np.array([not reason for reason in reasons]), **batch}

        return finish

    def stream() -> Iterator[Batch]:
        try:
            for finish in ahead(map(start, steps), _PREFETCH):
                yield finish()
        finally:
            pool.close()

    return stream()


def epoch_batches(input: Input, batch_size: int, **options: Any) -> Iterator[Batch]:
    """Yields every row once, in order, without augmentation, for evaluation.

    The sources follow each other. All hosts get the same number of batches; the last one is padded
    with zeros and `mask` False. Batches, errors and `options` are those of `batches`.
    """
    once, steps = epoch(input, batch_size)
    return batches(once, batch_size, 0, steps, **options)


def epoch(input: Input, batch_size: int) -> tuple[Input, int]:
    """The input that has every row once, without augmentation, and how many steps that takes."""
    once = replace(input, order=Once(input.order.sizes), augment=Augment())
    return once, -(-sum(input.order.sizes) // max(1, batch_size))


def report(paths: Sequence[str], reasons: Sequence[str], on_error: OnError) -> None:
    """Calls `on_error` for every row of a batch that could not be read; padding has no path."""
    for path, reason in zip(paths, reasons, strict=True):
        if reason and path:
            on_error(path, reason)


def part(input: Input, batch_size: int, index: int, count: int) -> np.ndarray:
    """The places of this host in a global batch; raises the errors of `batches`."""
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"batch_size is {batch_size}, expected a multiple of {count} hosts")
    if not 0 <= index < count:
        raise ValueError(f"process_index is {index}, expected 0 to {count - 1}")
    remote = {p.partition("://")[0]: p for e in input.examples for p in e.images if "://" in p}
    for path in remote.values():
        check_protocol(path)  # later, every image would be masked, one by one
    return np.arange(index * batch_size // count, (index + 1) * batch_size // count)


def columns(input: Input, plan: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A batch without its pixels, but with their `paths`, "" for padding.

    Args:
        input: what to read.
        plan: source, epoch and row of every place in the batch; row -1 is padding.
    """
    picks = [(input.examples[s], s, r) for s, _, r in plan]
    batch: dict[str, Any] = {"paths": [e.images[r] if r >= 0 else "" for e, _, r in picks]}
    first = input.examples[0]
    if input.tokenize and first.texts is not None:
        batch["text"] = input.tokenize([e.texts[r] if r >= 0 else "" for e, _, r in picks])
    if (labels := first.labels) is not None:
        unknown = np.full_like(labels[0], -1 if labels.dtype == np.int32 else np.nan)
        batch["label"] = np.stack([e.labels[r] if r >= 0 else unknown for e, _, r in picks])
    if any(e.positives is not None for e in input.examples):
        ids = [_positive(e, r, input.id_offsets[s]) for e, s, r in picks]
        batch["positives"] = np.array(ids, np.int32)
    return batch


def _positive(examples: Examples, row: int, offset: int) -> int:
    own = -1 if row < 0 or examples.positives is None else int(examples.positives[row])
    return own + offset if own >= 0 else -1


def _load_row(
    input: Input, codec: Codec, place: Sequence[int], out: UInt8[np.ndarray, "s s 3"]
) -> str:
    """Fills `out` and returns "", or returns the reason why it stays blank."""
    source, epoch, row = place
    if row < 0:
        return "padding"
    path, key = input.examples[source].images[row], (input.seed, source, epoch, row)
    try:
        out[...] = load_image(path, input.image_size, codec, input.augment, key)
        return ""
    except UnreadableImage as error:
        return error.reason
