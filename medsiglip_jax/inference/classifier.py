"""Images scored by the classifier that a model was fine-tuned with."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64

from medsiglip_jax.data.rows import Rows
from medsiglip_jax.inference.abstain import Abstention, Judged
from medsiglip_jax.inference.classify import probabilities
from medsiglip_jax.inference.encode import encode_rows, image_rows, score_rows
from medsiglip_jax.model import towers
from medsiglip_jax.model.api import Model
from medsiglip_jax.model.config import ClassifierConfig
from medsiglip_jax.preprocess.dicom.rules import Rules

_KEYS = ("label", "logit", "probability", "positive")


def classify_labels(
    model: Model,
    images: Sequence[str | os.PathLike] | Rows,
    preprocess: str | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int], Any] = int,
    dicom: Rules | None = None,
    keys: Sequence[str] = _KEYS,
    abstention: Abstention | None = None,
) -> list[dict[str, Any]]:
    """Scores images with the labels of a model that has a classifier.

    Args:
        model: with a classifier.
        images: paths, URIs or parts of files, or rows of images.
        preprocess: pixel preset; by default the one that the classifier was trained with.
        batch_size: images per call of the encoder.
        on_batch: called with the number of images just done, for progress.
        dicom: how DICOM files become pixels; by default as in the training of the classifier.
        keys: of a label and its scores.
        abstention: when there is no answer; see `trust.known`.

    Returns:
        For each image `{"image": path, "scores": [{"label", "logit", "probability", "positive"},
        …]}` in the order of the labels, or `{"image": path, "error": reason}`; with `abstention` as
        `score_rows` has it.

    Raises:
        ValueError: the model has no classifier.
    """
    features, rows = model.features, images if isinstance(images, Rows) else image_rows(images)
    assert model.config.classifier is not None
    preparation = model.config.prepared(preprocess, dicom)
    batches = encode_rows(
        features, rows, preparation.preprocess, False, batch_size, preparation.dicom, on_batch
    )
    own, multi_label = model.config.classifier.labels, model.config.classifier.multi_label

    def judge(vectors: np.ndarray, arrays: Sequence[np.ndarray]) -> Judged:
        assert abstention is not None
        return abstention.judge(vectors, arrays[1], own, not multi_label)

    return score_rows(
        batches, lambda z: scores(model, z), keys, own, None if abstention is None else judge
    )


def scores(model: Model, features: Float[np.ndarray, "n d"]) -> tuple[
    Float64[np.ndarray, "n c"], Float64[np.ndarray, "n c"], Bool[np.ndarray, "n c"]
]:  # fmt: skip
    """Logits, probabilities and which labels are positive.

    Args:
        model: with a classifier.
        features: what `model.features` gives, not normalised.
    """
    classifier = model.config.classifier
    assert classifier is not None
    logits = towers.class_logits(model.params["classifier"], features)
    logits = np.asarray(logits, np.float64)
    sigmoid, softmax = probabilities(logits)
    shares = sigmoid if classifier.multi_label else softmax
    return logits, shares, _positive(classifier, shares)


def _positive(classifier: ClassifierConfig, shares: np.ndarray) -> np.ndarray:
    """By the thresholds that were chosen on validation rows; without any, at one half for several
    findings, and the likeliest class of one."""
    if classifier.thresholds:
        chosen = [np.nan if t is None else t for t in classifier.thresholds]
        return shares >= np.array(chosen)  # never where there is none
    if classifier.multi_label:
        return shares >= 0.5
    return shares == shares.max(axis=1, keepdims=True)
