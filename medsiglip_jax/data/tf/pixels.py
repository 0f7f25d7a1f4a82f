"""The pixels of batches as a tf.data graph.

In the graph: JPEG is decoded, and the default preset resizes. Python is asked for what a graph
cannot do: the bytes, from wherever sources lie; whether PIL accepts a header, so that verdicts are
those of the threads; everything that is no plain JPEG; and augmentation.

An image that TensorFlow refuses must keep its place. Each is a data set of one element, decoded in
the graph without its errors, and followed by what Python makes of it; the first one is taken.

Beside the threads of `loader` this makes 0.47 (DICOM) to 0.97 (JPEG) times as many images per
second on one core, and 0.74 (JPEG) to 0.84 (DICOM) times on two (`bench.py input`).
"""
# TensorFlow's stubs take no functions of several arguments.
# pyright: reportArgumentType=false

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from medsiglip_jax.data.tf.kernels import bilinear, decode_jpeg
from medsiglip_jax.data.tf.rows import PixelRows
from medsiglip_jax.files import threads

# name of a method of `PixelRows`, arguments, types of what it returns -> tensors
Call = Callable[[str, list[Any], list[tf.DType]], list[tf.Tensor]]

# Of a function of a graph: TensorFlow would rewrite its source first, which takes half of the time
# that a graph takes to be made.
as_it_is = tf.autograph.experimental.do_not_convert


def pixel_batches(
    rows: PixelRows, steps: range, call: Call, workers: int | None = None
) -> tf.data.Dataset:
    """The pixels of every step in order.

    An element has `image` uint8 [b, s, s, 3], `reason` string [b], "" where the image was read, and
    `step` int64 [b].

    Args:
        rows: what determines them.
        steps: which.
        call: how the graph calls a method of `rows`.
        workers: number of threads; default `threads.workers`.
    """
    count, size = rows.part[1] - rows.part[0], rows.image_size

    @as_it_is
    def plan(step: tf.Tensor) -> tuple[tf.Tensor, ...]:
        paths, places = call("plan", [step], [tf.string, tf.int64])
        numbers = tf.fill([count], step)
        return numbers, tf.ensure_shape(paths, [count]), tf.ensure_shape(places, [count, 3])

    @as_it_is
    def fetch(step: tf.Tensor, path: tf.Tensor, place: tf.Tensor) -> tuple[tf.Tensor, ...]:
        types = [tf.string, tf.uint8, tf.int32, tf.string]
        data, pixels, kept, reason = call("fetch", [path, place], types)
        shapes = [], [None, None, 3], [4], []
        tensors = zip((data, pixels, kept, reason), shapes, strict=True)
        return step, place, *(tf.ensure_shape(tensor, shape) for tensor, shape in tensors)

    @as_it_is
    def in_graph(step, place, data, pixels, kept, reason):
        is_jpeg = tf.strings.length(data) > 0
        pixels = tf.cond(is_jpeg, lambda: _jpeg(data, kept), lambda: pixels)
        return step, place, *resized(pixels, reason)

    @as_it_is
    def in_python(step, place, data, pixels, kept, reason):
        pixels, reason = call("decode", [data, kept], [tf.uint8, tf.string])
        return step, place, *resized(pixels, reason)

    def resized(pixels: tf.Tensor, reason: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if rows.preprocess == "big_vision":
            return _resized(pixels, size), reason
        pixels, refusal = call("resize", [pixels], [tf.uint8, tf.string])
        return pixels, tf.where(reason == "", refusal, reason)

    @as_it_is
    def decoded(*row: tf.Tensor) -> tf.data.Dataset:
        alone = tf.data.Dataset.from_tensors(row)
        return alone.map(in_graph).ignore_errors().concatenate(alone.map(in_python)).take(1)

    @as_it_is
    def finished(step, place, image, reason) -> dict[str, tf.Tensor]:
        if rows.augment.flip or rows.augment.colour:
            (image,) = call("recolour", [image, place], [tf.uint8])
        image = tf.where(reason == "", image, tf.zeros_like(image))
        return {
            "step": step,
            "image": tf.ensure_shape(image, [size] * 2 + [3]),
            "reason": tf.ensure_shape(reason, []),
        }

    count_of_threads = workers or threads.workers()
    images = (
        range_of(steps)
        .map(plan)
        .unbatch()
        .map(fetch, tf.data.AUTOTUNE)
        .interleave(decoded, cycle_length=2 * count_of_threads, num_parallel_calls=tf.data.AUTOTUNE)
        .map(finished, tf.data.AUTOTUNE)
        .batch(count, drop_remainder=True)
    )
    return images.with_options(ordered(workers))


def range_of(steps: range) -> tf.data.Dataset:
    """The numbers of steps, int64 []."""
    return tf.data.Dataset.range(steps.start, steps.stop)


def _jpeg(data: tf.Tensor, kept: tf.Tensor) -> tf.Tensor:
    return tf.slice(decode_jpeg(data), [kept[0], kept[1], 0], [kept[2], kept[3], 3])


def _resized(image: tf.Tensor, size: int) -> tf.Tensor:
    """The preset "big_vision", by the kernel that defines it; the cast truncates."""
    return tf.cast(bilinear(image, size)[0], tf.uint8)


def ordered(workers: int | None) -> tf.data.Options:
    """Options of a pipeline that keeps its order, with `workers` threads; None takes those of
    TensorFlow."""
    options = tf.data.Options()
    options.deterministic = True
    options.threading.max_intra_op_parallelism = 1  # a core per image, not several
    if workers is not None:
        options.threading.private_threadpool_size = workers
    return options


def local_call(rows: PixelRows) -> Call:
    """Calls the methods of `rows` in this process."""

    def call(name: str, arguments: list[Any], types: list[tf.DType]) -> list[tf.Tensor]:
        method = kept_by(getattr(rows, name), rows.failures)
        return tf.numpy_function(method, arguments, types, stateful=False)

    return call


def kept_by(function: Callable, failures: list[Exception]) -> Callable:
    """The function, which also puts what it raises on a list."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            failures.append(error)
            raise

    return call
