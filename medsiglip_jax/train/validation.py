"""A model run over held-out examples while it trains, and scores of classes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from scipy import special

from medsiglip_jax import metrics
from medsiglip_jax.data.labels import label_columns
from medsiglip_jax.model import sharding

Params = dict[str, Any]
Batch = dict[str, Any]
Encode = Callable[[Params, Batch], dict[str, Any]]


def encoder(encode: Encode, mesh: Mesh | None = None) -> Encode:
    """The compiled `encode` of a loss: its rows, labels and mask, whole on every host."""

    def encode_and_keep(params: Params, batch: Batch) -> dict[str, Any]:
        rest = {name: x for name, x in batch.items() if name not in ("image", "text")}
        return {**encode(params, batch), **rest}

    return jax.jit(encode_and_keep, out_shardings=mesh and sharding.replicated(mesh))


def collect(
    encode: Encode, params: Params, batches: Iterable[Batch], mesh: Mesh | None = None
) -> dict[str, np.ndarray]:
    """Runs `encode` over batches and returns the rows that are not masked, on the host, with their
    numbers as `row`.

    Raises:
        ValueError: all are masked.
    """
    parts = [
        {k: np.asarray(v) for k, v in encode(params, sharding.put_batch(batch, mesh)).items()}
        for batch in batches
    ]
    encoded = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not encoded["mask"].any():
        raise ValueError(
            "none of the validation images could be read; look at data.path, data.root and the "
            "list of unreadable images"
        )
    rows = np.arange(len(encoded["mask"]))
    return {name: x[encoded["mask"]] for name, x in (encoded | {"row": rows}).items()}


def class_metrics(multi_label: bool) -> tuple[str, ...]:
    """The names of what `class_scores` returns."""
    return ("val_auc",) if multi_label else ("val_accuracy", "val_auc")


def class_scores(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`val_accuracy` of one class per image, and the macro one-vs-rest `val_auc`.

    Over known labels; a class that all images or none show is left out of the mean. NaN where
    nothing is known.

    Args:
        scores: [n, classes], larger for likelier.
        labels: int [n], -1 unknown, or float [n, classes] of 0, 1 and NaN (unknown).
    """
    values = {}
    if labels.ndim == 1:
        scores, labels = scores[labels >= 0], labels[labels >= 0]
        values["val_accuracy"] = metrics.accuracy(scores, labels)
    values["val_auc"] = metrics.macro_auc(scores, labels) if len(labels) else np.nan
    return values


def judge(
    encoded: Sequence[Batch],
    probabilities: Sequence[np.ndarray],
    classes: Sequence[str],
    groups: Sequence[str] = (),
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Thresholds that validation rows choose, and what they are worth on test rows.

    Args:
        encoded: from `collect`, with `label`: of the validation rows and, if there are any, of the
            test rows.
        probabilities: [n, classes] of each of them.
        classes: their names.
        groups: patients of the test rows, unreadable ones included.

    Returns:
        The threshold of each class by Youden's rule, NaN where validation has only one label; and
        the scores of `metrics.judge_classes`, or None without test rows.
    """
    labels = [label_columns(rows["label"], len(classes)) for rows in encoded]
    thresholds = np.array([
        metrics.choose_threshold(rows.scores, rows.positive)
        for rows in map(metrics.known, probabilities[0].T, labels[0].T)
    ])  # fmt: skip
    if len(encoded) == 1:
        return thresholds, None
    patients = [groups[row] for row in encoded[1]["row"]] if groups else None
    judged = metrics.judge_classes(probabilities[1], labels[1], classes, thresholds, patients)
    return thresholds, judged


def probabilities(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """float64 [n, classes]: sigmoids of findings, or the softmax of classes."""
    logits = np.asarray(logits, np.float64)
    return special.expit(logits) if multi_label else special.softmax(logits, axis=1)
