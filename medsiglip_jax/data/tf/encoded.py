"""Examples as big_vision's data sets have them, encoded images and texts, through its ops."""
# TensorFlow's stubs take no functions of several arguments.
# pyright: reportArgumentType=false

import functools
import os
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from medsiglip_jax.data import loader
from medsiglip_jax.data.loader import Input, OnError
from medsiglip_jax.data.tf.ops import KEY, pp
from medsiglip_jax.data.tf.pixels import as_it_is, ordered, range_of
from medsiglip_jax.data.tf.reading import Reader
from medsiglip_jax.data.tf.rows import PADDING
from medsiglip_jax.files import threads
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.facts import UnreadableImage, describe
from medsiglip_jax.preprocess.text import Tokenizer

_REFUSED = b"the ops of pp refuse it"


def pp_dataset(
    input: Input,
    string: str,
    batch_size: int,
    start_step: int = 0,
    total_steps: int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
    on_error: OnError = lambda path, reason: None,
    workers: int | None = None,
) -> tf.data.Dataset:
    """The rows of `dataset`, in its order, as a preprocessing string of big_vision makes them.

    An example is {"image": encoded bytes} with "text" (string), "label" and "positives" if the
    examples have them, and "key" for ops that draw. A batch holds what the string leaves of it,
    and `mask`: False where the image could not be read or the ops fail; its values are then 0.

    Args:
        input: what to read; what it says about pixels and tokens is ignored.
        string: see `ops.pp`.
        batch_size: number of rows of the global batch, over all hosts.
        start_step: the first step; nothing before it is read.
        total_steps: the step to stop before; None never stops.
        tokenizer: of the op `tokenize`.
        process_index: this host.
        process_count: number of hosts.
        on_error: called with path and reason for every masked image, when a batch is made.
        workers: number of threads; default `threads.workers`.

    Raises:
        ValueError: a string or a size that does not fit, or a value without a fixed shape, so that
            no batch can be made of it.
        tf.errors.OpError: when a batch is taken: the disk or the network fails, or does not answer
            in `Limits.read_timeout`.
    """
    make = pp(string, tokenizer)
    places = loader.part(input, batch_size, process_index, process_count)
    steps = range(start_step, np.iinfo(np.int64).max if total_steps is None else total_steps)
    input = replace(input, tokenize=lambda texts: np.array([t.encode() for t in texts], object))
    plan = functools.partial(_plan, input, batch_size, places)
    workers = workers or threads.workers()
    fetch = functools.partial(_fetch, Reader(workers))
    first = plan(np.int64(start_step))
    types = [tf.as_dtype(column.dtype) for column in first.values()]

    @as_it_is
    def planned(step: tf.Tensor) -> dict[str, tf.Tensor]:
        tensors = tf.numpy_function(lambda step: list(plan(step).values()), [step], types)
        pairs = zip(tensors, first.values(), strict=True)
        return dict(zip(first, [tf.ensure_shape(t, c.shape) for t, c in pairs], strict=True))

    @as_it_is
    def fetched(row: dict[str, tf.Tensor]) -> tuple[dict[str, tf.Tensor], ...]:
        content, reason = tf.numpy_function(fetch, [row["paths"]], [tf.string, tf.string])
        outcome = {"path": row.pop("paths"), "reason": tf.ensure_shape(reason, [])}
        return {"image": tf.ensure_shape(content, []), **row}, outcome

    @as_it_is
    def made(row: dict[str, tf.Tensor], outcome: dict[str, tf.Tensor]) -> Any:
        with tf.control_dependencies([tf.debugging.assert_equal(outcome["reason"], "")]):
            row = tf.nest.map_structure(tf.identity, row)
        return make(row), outcome

    rows = range_of(steps).map(planned).unbatch().map(fetched, tf.data.AUTOTUNE)
    specs: Any = rows.map(made).element_spec
    specs = specs[0]
    _check_shapes(specs, string)
    blank = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), specs)

    @as_it_is
    def masked(row: dict[str, tf.Tensor], outcome: dict[str, tf.Tensor]) -> Any:
        reason = tf.where(outcome["reason"] == "", _REFUSED, outcome["reason"])
        return blank, {**outcome, "reason": reason}

    @as_it_is
    def single(row: dict[str, tf.Tensor], outcome: dict[str, tf.Tensor]) -> tf.data.Dataset:
        alone = tf.data.Dataset.from_tensors((row, outcome))
        return alone.map(made).ignore_errors().concatenate(alone.map(masked)).take(1)

    @as_it_is
    def reported(batch: dict[str, Any], outcome: dict[str, tf.Tensor]) -> dict[str, Any]:
        def report(paths: np.ndarray, reasons: np.ndarray) -> np.ndarray:
            names = [os.fsdecode(path) for path in paths.tolist()]
            loader.report(names, [reason.decode() for reason in reasons.tolist()], on_error)
            return reasons == b""

        call = tf.numpy_function(report, [outcome["path"], outcome["reason"]], tf.bool)
        return {**batch, "mask": tf.ensure_shape(call, [len(places)])}

    batches = rows.interleave(single, 2 * workers, num_parallel_calls=tf.data.AUTOTUNE)
    batches = batches.batch(len(places), drop_remainder=True).map(reported)
    return batches.with_options(ordered(workers)).prefetch(2)


def _plan(
    input: Input, batch_size: int, places: np.ndarray, step: np.integer
) -> dict[str, np.ndarray]:
    """The columns of a step, and the keys of its rows."""
    rows = np.stack(input.order.at(int(step) * batch_size + places), axis=1)
    columns = loader.columns(input, rows.tolist())
    paths = np.array([os.fsencode(path) for path in columns.pop("paths")], object)
    keys = np.insert(rows, 0, input.seed, axis=1)
    return {"paths": paths, KEY: keys, **columns}


def _fetch(reader: Reader, path: bytes) -> tuple[bytes, bytes]:
    """The bytes of an image, or why there are none."""
    if not path:
        return b"", PADDING.encode()
    source = os.fsdecode(path)
    try:
        return reader(describe(source), functools.partial(sources.read_bytes, source)), b""
    except UnreadableImage as error:
        return b"", error.reason.encode()


def _check_shapes(specs: Any, string: str) -> None:
    for name, spec in specs.items():
        if not spec.shape.is_fully_defined():
            raise ValueError(
                f"pp {string!r}: leaves {name!r} with the shape {spec.shape}, of which no batch "
                "can be made; add an op such as resize(448), or drop it"
            )
