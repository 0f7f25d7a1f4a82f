"""Zero-shot classification of image files against texts."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Shaped

from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage


def classify(
    model: Model,
    images: Sequence[Any],
    texts: Sequence[str],
    preprocess: str = "big_vision",
    batch_size: int = 8,
    progress: Callable[[Iterable], Iterable] = iter,
    dicom: Rules = Rules(),
) -> list[dict[str, Any]]:
    """Scores every image against every text.

    Args:
        model: with both towers and a tokenizer.
        images: sources, or anything else `model.processor.images` takes.
        texts: at least one.
        preprocess: pixel preset.
        batch_size: images per call of the encoder.
        progress: wraps the iteration over batches.
        dicom: how DICOM files become pixels.

    Returns:
        Per image `{"image": …, "scores": [{"text", "logit", "sigmoid", "softmax"}, …]}` with
        scores in the order of `texts`, or `{"image": …, "error": reason}` if it is unreadable.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    ztxt = encode_texts(model, texts)
    starts = range(0, len(images), batch_size)
    results: list[dict[str, Any]] = []
    for start in progress(starts):
        results += _classify_batch(
            model, images[start : start + batch_size], texts, ztxt, preprocess, dicom
        )
    return results


def _classify_batch(model: Model, items, texts, ztxt, preprocess, dicom) -> list[dict[str, Any]]:
    pixels, results, readable = [], [], []
    for item in items:
        result = {"image": str(item)}
        results.append(result)
        try:
            pixels.append(model.processor.images([item], preprocess, dicom))
            readable.append(result)
        except UnreadableImage as error:
            result["error"] = error.reason
    if pixels:
        zimg = model.encode_image(np.concatenate(pixels))
        for result, logits in zip(readable, model.similarity(zimg, ztxt), strict=True):
            result["scores"] = _scores(texts, logits)
    return results


def _scores(texts: Sequence[str], logits: jax.Array) -> list[dict[str, Any]]:
    x = np.asarray(logits, np.float64)
    columns = zip(texts, *(values.tolist() for values in (x, *probabilities(x))), strict=True)
    return [dict(zip(("text", "logit", "sigmoid", "softmax"), row, strict=True)) for row in columns]


def encode_texts(model: Model, texts: Sequence[str]) -> jax.Array:
    """Unit vectors of texts, float32 [texts, D].

    Raises:
        ValueError: there is none, or one is empty.
    """
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("texts: expected at least one, none of them empty")
    return model.encode_text(model.processor.texts(list(texts)))


def probabilities(
    logits: Shaped[np.ndarray, "*images texts"],
) -> tuple[Float64[np.ndarray, "*images texts"], Float64[np.ndarray, "*images texts"]]:
    """Sigmoid of each logit, and softmax over the texts; in float64 from the float32 logits on, so
    that small sigmoids keep their digits."""
    x = np.asarray(logits, np.float64)
    softmax = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.exp(-np.logaddexp(0.0, -x)), softmax / softmax.sum(axis=-1, keepdims=True)
