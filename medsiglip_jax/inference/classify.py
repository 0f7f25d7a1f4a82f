"""Zero-shot classification of image files against texts."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Shaped

from medsiglip_jax.inference.abstain import Abstention
from medsiglip_jax.inference.encode import encode_rows, image_rows, score_rows
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules


def classify(
    model: Model,
    images: Sequence[str | os.PathLike],
    texts: Sequence[str],
    preprocess: str | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int], Any] = int,
    dicom: Rules | None = None,
    abstention: Abstention | None = None,
) -> list[dict[str, Any]]:
    """Scores every image against every text.

    Args:
        model: with both towers and a tokenizer.
        images: paths, URIs or parts of files, see `preprocess.sources`.
        texts: at least one.
        preprocess: pixel preset; by default as `encode_files`.
        batch_size: images per call of the encoder.
        on_batch: called with the number of images just done, for progress.
        dicom: how DICOM files become pixels; default likewise.
        abstention: when there is no answer; see `trust.known`.

    Returns:
        For each image `{"image": path, "scores": [{"text", "logit", "sigmoid", "softmax"}, …]}`
        with scores in the order of `texts`, or `{"image": path, "error": reason}` if it is
        unreadable; with `abstention` as `score_rows` has it.

    Raises:
        ValueError: as `encode_texts` and `probabilities`.
    """
    ztxt = encode_texts(model, texts)
    rows, preparation = image_rows(images), model.config.prepared(preprocess, dicom)
    batches = encode_rows(
        model, rows, preparation.preprocess, True, batch_size, preparation.dicom, on_batch
    )

    def score(zimg: np.ndarray) -> list[np.ndarray]:
        logits = np.asarray(model.similarity(zimg, ztxt), np.float64)
        return [logits, *probabilities(logits)]

    judge = None if abstention is None else lambda vectors, scores: abstention.judge(vectors)
    return score_rows(batches, score, ("text", "logit", "sigmoid", "softmax"), texts, judge)


def encode_texts(model: Model, texts: Sequence[str]) -> jax.Array:
    """Unit vectors of texts, float32 [texts, D].

    Raises:
        ValueError: `texts` is empty, one of them is blank, or the model gives no finite numbers for
            one, as float16 may where activations are large.
    """
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("texts: expected at least one, none of them empty")
    ztxt = model.encode_text(model.processor.texts(list(texts)))
    finite = np.isfinite(np.asarray(ztxt)).all(axis=1)
    if not finite.all():
        text = texts[int(np.argmin(finite))]
        raise ValueError(f"text {text!r}: the model gave numbers that are not finite; try float32")
    return ztxt


def probabilities(
    logits: Shaped[np.ndarray, "*images texts"],
) -> tuple[Float64[np.ndarray, "*images texts"], Float64[np.ndarray, "*images texts"]]:
    """Sigmoid of each logit, and softmax over the texts.

    In float64 from the float32 logits on, so that small sigmoids keep their digits.

    Raises:
        ValueError: the logits are not finite, although those of finite embeddings should be.
    """
    x = np.asarray(logits, np.float64)
    if not np.isfinite(x).all():
        raise ValueError(
            "the logits exp(t) * cosine + b are not finite, because the model's temperature t or "
            "bias b is too large: its training may have diverged"
        )
    softmax = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.exp(-np.logaddexp(0.0, -x)), softmax / softmax.sum(axis=-1, keepdims=True)
