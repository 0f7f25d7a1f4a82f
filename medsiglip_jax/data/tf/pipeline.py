"""The batches of `loader` from a tf.data pipeline, to the bit."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from medsiglip_jax.data import loader
from medsiglip_jax.data.loader import Batch, Input, OnError
from medsiglip_jax.data.tf.pixels import (
    as_it_is,
    kept_by,
    local_call,
    ordered,
    pixel_batches,
    range_of,
)
from medsiglip_jax.data.tf.rows import PixelRows
from medsiglip_jax.data.tf.service import served_batches
from medsiglip_jax.files import threads

_PREFETCH = 2  # batches in preparation beyond the one that is waited for, as in `loader`


def dataset(
    input: Input,
    batch_size: int,
    start_step: int = 0,
    total_steps: int | None = None,
    *,
    on_error: OnError = lambda path, reason: None,
    **options: Any,
) -> tf.data.Dataset:
    """This host's part of the training batches `start_step` to `total_steps` - 1, as tensors.

    Batches, arguments and errors are those of `loader.batches`, to the bit and in the same order,
    however many threads and services make them.

    Args:
        input: what to read.
        batch_size: number of rows of the global batch, over all hosts.
        start_step: the first step; nothing before it is read.
        total_steps: the step to stop before; None never stops.
        on_error: called with path and reason for every masked image, in the order of the rows,
            when a batch is made, which is up to two batches before it is taken.
        **options: `process_index`, `process_count`, `workers`, `resample` and `data_service` of
            `batches`.
    """
    rows = _Source(input, batch_size, start_step, total_steps, **options)

    @as_it_is
    def report(batch: dict[str, Any]) -> dict[str, Any]:
        def call(paths: np.ndarray, reasons: np.ndarray) -> np.ndarray:
            _report(paths, reasons, on_error)
            return np.array(True)

        paths, reasons = batch.pop("paths"), batch.pop("reasons")
        with tf.control_dependencies([tf.numpy_function(call, [paths, reasons], tf.bool)]):
            return {name: tf.identity(tensor) for name, tensor in batch.items()}

    return rows.dataset.map(report).prefetch(_PREFETCH)


def epoch_dataset(input: Input, batch_size: int, **options: Any) -> tf.data.Dataset:
    """Every row once, in order, without augmentation: the batches of `loader.epoch_batches`."""
    once, steps = loader.epoch(input, batch_size)
    return dataset(once, batch_size, 0, steps, **options)


def batches(
    input: Input,
    batch_size: int,
    start_step: int = 0,
    total_steps: int | None = None,
    *,
    on_error: OnError = lambda path, reason: None,
    **options: Any,
) -> Iterator[Batch]:
    """Yields the batches of `dataset` as numpy arrays: `loader.batches` by other means.

    Args:
        input: what to read.
        batch_size: number of rows of the global batch, over all hosts.
        start_step: the first step.
        total_steps: the step to stop before; None never stops.
        on_error: called when the batch of the image is yielded.
        **options:
            process_index: this host; default 0.
            process_count: number of hosts; default 1.
            workers: number of threads; default `threads.workers`.
            resample: how the model's own processor resizes, see `preprocess.image.preset`.
            data_service: the dispatcher of a tf.data service, "grpc://HOST:PORT", whose workers
                read and decode the images; see `service`.

    Raises:
        ValueError, OSError: as `loader.batches` does.
    """
    source = _Source(input, batch_size, start_step, total_steps, **options)

    def stream() -> Iterator[Batch]:
        arriving = source.dataset.prefetch(_PREFETCH).as_numpy_iterator()
        while (batch := source.next_of(arriving)) is not None:
            _report(batch.pop("paths"), batch.pop("reasons"), on_error)
            yield batch

    return stream()


def epoch_batches(input: Input, batch_size: int, **options: Any) -> Iterator[Batch]:
    """Yields every row once, as `loader.epoch_batches` does; options are those of `batches`."""
    once, steps = loader.epoch(input, batch_size)
    return batches(once, batch_size, 0, steps, **options)


def _report(paths: np.ndarray, reasons: np.ndarray, on_error: OnError) -> None:
    names = [os.fsdecode(path) for path in paths.tolist()]
    loader.report(names, [reason.decode() for reason in reasons.tolist()], on_error)


class _Source:
    """Batches with the `paths` and `reasons` of their rows, and what Python raised meanwhile."""

    def __init__(
        self,
        input: Input,
        batch_size: int,
        start_step: int,
        total_steps: int | None,
        *,
        process_index: int = 0,
        process_count: int = 1,
        workers: int | None = None,
        resample: str = "bicubic",
        data_service: str | None = None,
    ):
        tf.config.set_visible_devices([], "GPU")  # or it takes the memory that JAX needs
        places = loader.part(input, batch_size, process_index, process_count)
        workers = workers or threads.workers()
        steps = range(start_step, np.iinfo(np.int64).max if total_steps is None else total_steps)
        self._rows = PixelRows.of(input, batch_size, places, resample, workers)
        if data_service is None:
            call = local_call(self._rows)
            images = pixel_batches(self._rows, steps, call, workers)
        else:
            images = served_batches(self._rows, steps, data_service, workers)
        self.dataset = tf.data.Dataset.zip(images, self._columns(input, steps)).map(_merged)
        self.dataset = self.dataset.with_options(ordered(workers))

    def next_of(self, arriving: Iterator[Any]) -> Batch | None:
        """The next batch, or None at the end; raises what Python raised inside the graph."""
        try:
            return next(arriving, None)
        except tf.errors.OpError:
            if self._rows.failures:
                raise self._rows.failures[0] from None
            raise

    def _columns(self, input: Input, steps: range) -> tf.data.Dataset:
        """The columns of batches beside their pixels."""

        def columns(step: int) -> dict[str, np.ndarray]:
            batch = loader.columns(input, self._rows.places(step).tolist())
            return {**batch, "paths": np.array([os.fsencode(p) for p in batch["paths"]], object)}

        first = columns(steps.start)
        types = [tf.as_dtype(column.dtype) for column in first.values()]
        call = kept_by(lambda step: list(columns(int(step)).values()), self._rows.failures)

        @as_it_is
        def in_graph(step: tf.Tensor) -> dict[str, tf.Tensor]:
            tensors = tf.numpy_function(call, [step], types)
            for tensor, column in zip(tensors, first.values(), strict=True):
                tensor.set_shape(column.shape)
            return dict(zip(first, tensors, strict=True))

        return range_of(steps).map(in_graph)


@as_it_is
def _merged(images: dict[str, tf.Tensor], columns: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    reasons = images["reason"]
    return {"image": images["image"], "mask": reasons == "", "reasons": reasons, **columns}
