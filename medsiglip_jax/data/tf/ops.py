"""big_vision's preprocessing strings, "decode|resize(448)|value_range(-1, 1)|…", as a function.

The ops that SigLIP was trained and evaluated with, as pp/ops_image.py, ops_general.py and
ops_text.py of big_vision at 0127fb6 define them. What is random there is a function of the row
here: ops that draw take an example's `key`, so that a run resumes to the bit.
"""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from medsiglip_jax.data.tf.kernels import decode_jpeg
from medsiglip_jax.preprocess.text import Tokenizer

Data = dict[str, Any]
Seed = Callable[[], tf.Tensor]  # int32 [2], of this example and this op
Apply = Callable[[Any, Seed], Any]  # the value of one key -> its new value

KEY = "key"


def pp(string: str, tokenizer: Tokenizer | None = None) -> Callable[[Mapping[str, Any]], Data]:
    """What a string of ops does to an example.

    Args:
        string: ops between "|", with literals as arguments: "decode|resize(448)|flip_lr|
            value_range(-1, 1)|tokenize(max_len=64, eos='sticky', pad_value=1, inkey='text')".
            Every op on a value takes `key`, or `inkey` and `outkey`, as in big_vision. Known are
            the keys of `OPS`.
        tokenizer: the SentencePiece model of `tokenize`, whose argument `model` is ignored.

    Returns:
        A function for `tf.data.Dataset.map`: {"image": encoded bytes, "text": string, …} to what
        the ops make of it. Random ops need "key" in it, int64 [n] (such as seed, source, epoch and
        row), on which alone their draws depend; it is taken out.

    Raises:
        ValueError: an op that is not known, or arguments that it does not take: op, position and
            what is known. Or, when it is called, a value that is not there.
    """
    segments = [text.strip() for text in string.split("|") if text.strip()]
    steps = [_step(text, at, tokenizer) for at, text in enumerate(segments, start=1)]

    @tf.autograph.experimental.do_not_convert
    def run(example: Mapping[str, Any]) -> Data:
        data = dict(example)
        key = data.pop(KEY, None)
        for step in steps:
            data = step(data, key)
        return data

    return run


def _step(
    text: str, position: int, tokenizer: Tokenizer | None
) -> Callable[[Data, tf.Tensor | None], Data]:
    where = f"pp, op {position} {text!r}"
    name, args, kwargs = _parsed(text, where)
    if name not in OPS:
        raise ValueError(f"{where}: unknown op {name!r}; known are {', '.join(sorted(OPS))}")
    if name == "tokenize":
        if tokenizer is None:
            raise ValueError(f"{where}: needs tokenizer=, a medsiglip_jax Tokenizer")
        kwargs["tokenizer"] = tokenizer
    try:
        inspect.signature(OPS[name]).bind(*args, **kwargs)
        op = OPS[name](*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None

    def step(data: Data, key: tf.Tensor | None) -> Data:
        def seed() -> tf.Tensor:
            if key is None:
                raise ValueError(f"{where}: draws, and the example has no {KEY!r}, int64 [n]")
            return _folded(key, position)

        try:
            return op(data, seed)
        except KeyError as error:
            there = ", ".join(data)
            raise ValueError(
                f"{where}: no value {error} in the example; there are {there}"
            ) from None

    return step


def _parsed(text: str, where: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name and arguments of an op; nothing is executed."""
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        args = [ast.literal_eval(argument) for argument in call.args]
        if not all(keyword.arg for keyword in call.keywords):
            raise ValueError("**")
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: expected NAME or NAME(literals) ({error})") from None
    return ast.unparse(call.func), args, kwargs


def _folded(key: tf.Tensor, position: int) -> tf.Tensor:
    seed = tf.constant([0, position], tf.int32)
    for number in tf.unstack(key):
        seed = tf.random.experimental.stateless_fold_in(seed, number)  # pyright: ignore
    return seed


# ---------------------------------------------------------------------------------- of one value


def _on_value(
    factory: Callable[..., Apply], source: str | None = "image", target: str | None = "image"
) -> Callable:
    """An op on the value of a key, with the arguments that say which (big_vision pp/utils.py)."""

    def make(
        *args: Any, key: str | None = None, inkey: str | None = None, outkey: str | None = None,
        **kwargs: Any,
    ) -> Callable[[Data, Seed], Data]:  # fmt: skip
        inspect.signature(factory).bind(*args, **kwargs)
        read, written = key or inkey or source, key or outkey or target
        if read is None or written is None:
            raise ValueError("needs inkey")
        apply = factory(*args, **kwargs)
        return lambda data, seed: {**data, written: apply(data[read], seed)}

    return make


def _decode(channels: int = 3, precise: bool = False) -> Apply:
    def apply(content: tf.Tensor, seed: Seed) -> tf.Tensor:
        if precise:
            return decode_jpeg(content, channels)
        image = tf.io.decode_image(content, channels=channels, expand_animations=False)
        return tf.ensure_shape(image, [None, None, channels])

    return apply


def _resize(size: Any, method: str = "bilinear", antialias: bool = False) -> Apply:
    height, width = _pair(size)

    def apply(image: tf.Tensor, seed: Seed) -> tf.Tensor:
        return _as_before(image, tf.image.resize(image, (height, width), method, False, antialias))

    return apply


def _resize_small(smaller: int, method: str = "area", antialias: bool = False) -> Apply:
    def apply(image: tf.Tensor, seed: Seed) -> tf.Tensor:
        sides = tf.cast(tf.shape(image)[:2], tf.float32)
        factor = tf.cast(smaller, tf.float32) / tf.reduce_min(sides)
        size = tf.cast(tf.round(sides * factor), tf.int32)
        return _as_before(image, tf.image.resize(image, size, method, False, antialias))

    return apply


def _as_before(image: tf.Tensor, resized: tf.Tensor) -> tf.Tensor:
    """The resized image in the dtype of the image: truncated to uint8, not rounded
    (pp/ops_image.py:57-87)."""
    dtype = image.dtype
    return tf.cast(tf.clip_by_value(resized, dtype.min, dtype.max), dtype)


def _central_crop(size: Any = None) -> Apply:
    def apply(image: tf.Tensor, seed: Seed) -> tf.Tensor:
        sides = tf.shape(image)[:2]
        kept = tf.fill([2], tf.reduce_min(sides)) if size is None else tf.constant(_pair(size))
        top, left = tf.unstack((sides - kept) // 2)
        return tf.image.crop_to_bounding_box(image, top, left, kept[0], kept[1])

    return apply


def _random_crop(size: Any) -> Apply:
    def apply(image: tf.Tensor, seed: Seed) -> tf.Tensor:
        return tf.image.stateless_random_crop(image, (*_pair(size), image.shape[-1]), seed())

    return apply


def _inception_crop(
    size: Any = None,
    area_min: int | float = 5,
    area_max: int | float = 100,
    method: str = "bilinear",
    antialias: bool = False,
) -> Apply:
    def apply(image: tf.Tensor, seed: Seed) -> tf.Tensor:
        begin, kept, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.shape(image), tf.zeros([0, 0, 4]), seed(), min_object_covered=0,
            area_range=(area_min / 100, area_max / 100), use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        crop = tf.slice(image, begin, kept)
        crop = tf.ensure_shape(crop, [None, None, image.shape[-1]])
        return crop if size is None else _resize(size, method, antialias)(crop, seed)

    return apply


def _flip_lr() -> Apply:
    return lambda image, seed: tf.image.stateless_random_flip_left_right(image, seed())


def _value_range(
    vmin: int | float = -1,
    vmax: int | float = 1,
    in_min: Any = 0,
    in_max: Any = 255.0,
    clip_values=False,
) -> Apply:
    def apply(image: tf.Tensor, seed: Seed) -> tf.Tensor:
        low, high = tf.constant(in_min, tf.float32), tf.constant(in_max, tf.float32)
        image = (tf.cast(image, tf.float32) - low) / (high - low)
        image = vmin + image * (vmax - vmin)
        return tf.clip_by_value(image, vmin, vmax) if clip_values else image

    return apply


def _lower() -> Apply:
    return lambda text, seed: tf.strings.lower(text)  # of ASCII alone, as in big_vision


def _tokenize(
    max_len: int,
    eos: str,
    model: str = "c4_en",
    lower: bool = True,
    pad_value: int | str = "<pad>",
    *,
    tokenizer: Tokenizer,
) -> Apply:
    if eos not in ("none", "yes", "sticky"):
        raise ValueError(f"eos is {eos!r}; expected 'none', 'yes' or 'sticky'")
    pad = tokenizer.id_of(pad_value) if isinstance(pad_value, str) else pad_value

    def ids(text: Any) -> np.ndarray:
        content = text if isinstance(text, bytes) else text.item()  # an array outside of graphs
        row = tokenizer.plain_ids(content.decode("utf-8", "replace"), end=eos != "none")
        if eos == "sticky" and len(row) >= max_len:
            row = [*row[: max_len - 1], row[-1]]
        return np.array((row + [pad] * max_len)[:max_len], np.int32)

    def apply(text: tf.Tensor, seed: Seed) -> tf.Tensor:
        text = tf.strings.lower(text) if lower else text
        return tf.ensure_shape(tf.numpy_function(ids, [text], tf.int32), [max_len])

    return apply


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


# --------------------------------------------------------------------------------- of the example


def _keep(*keys: str) -> Callable[[Data, Seed], Data]:
    return lambda data, seed: {key: data[key] for key in keys}


def _drop(*keys: str) -> Callable[[Data, Seed], Data]:
    return lambda data, seed: {key: value for key, value in data.items() if key not in keys}


def _copy(inkey: str, outkey: str) -> Callable[[Data, Seed], Data]:
    return lambda data, seed: {**data, outkey: data[inkey]}


def _flatten() -> Callable[[Data, Seed], Data]:
    return lambda data, seed: dict(_leaves(data))


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in data.items():
        nested = isinstance(value, Mapping)
        leaves += _leaves(value, f"{prefix}{name}/") if nested else [(prefix + name, value)]
    return leaves


OPS: dict[str, Callable[..., Callable[[Data, Seed], Data]]] = {
    "central_crop": _on_value(_central_crop),
    "copy": _copy,
    "decode": _on_value(_decode),
    "drop": _drop,
    "flatten": _flatten,
    "flip_lr": _on_value(_flip_lr),
    "inception_crop": _on_value(_inception_crop),
    "keep": _keep,
    "lower": _on_value(_lower, "text", "text"),
    "random_crop": _on_value(_random_crop),
    "resize": _on_value(_resize),
    "resize_small": _on_value(_resize_small),
    "tokenize": _on_value(_tokenize, None, "labels"),
    "value_range": _on_value(_value_range),
}
