"""Scores of a model on held-out examples, while it trains."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from medsiglip_jax import losses, metrics
from medsiglip_jax.model import sharding
from medsiglip_jax.train import objectives
from medsiglip_jax.train.objectives import Batch, Objective, Params

# Side of the blocks in which all images meet all texts: 16 MB of float32 at a time.
_BLOCK = 2048


def encoder(objective: Objective, mesh: jax.sharding.Mesh | None = None):
    """The compiled `encode(params, batch)`: rows, labels and mask, whole on every host."""

    def encode(params: Params, batch: Batch) -> dict[str, Any]:
        rest = {name: x for name, x in batch.items() if name not in ("image", "text")}
        return {**objective.encode(params, batch), **rest}

    return jax.jit(encode, out_shardings=mesh and sharding.replicated(mesh))


def collect(encode, params: Params, batches: Iterable[Batch], mesh=None) -> dict[str, np.ndarray]:
    """Runs `encode` over batches and returns the rows that are not masked, on the host."""
    parts = [
        {k: np.asarray(v) for k, v in encode(params, sharding.put_batch(batch, mesh)).items()}
        for batch in batches
    ]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not rows["mask"].any():
        raise ValueError("none of the validation images could be read; they are listed by path")
    return {name: x[rows["mask"]] for name, x in rows.items()}


def contrastive(
    rows: dict[str, np.ndarray], params: Params, batch_size: int, zclass: np.ndarray | None = None
) -> dict[str, float]:
    """Loss, mean logits and recall of image-text pairs; zero-shot scores of classes.

    Args:
        rows: `zimg`, `ztxt`, `positives`, and if there are any `label` int32 [n].
        params: with `t` and `b`.
        batch_size: of training, for the loss depends on it; rows are drawn into batches by chance.
        zclass: normalised prompt embeddings [classes, d].

    Returns:
        `val_loss`, the mean logits `val_positive` and `val_negative` of matching pairs and others,
        `val_recall@1` image to text (equal captions or positives count), and with `zclass`
        zero-shot `val_accuracy` and `val_auc`.
    """
    t, b = (np.asarray(params[name], np.float32) for name in "tb")
    ids = rows["positives"]
    result = _loss(rows, ids, t, b, batch_size) | _pairs(rows["zimg"], rows["ztxt"], ids, t, b)
    if zclass is not None and "label" in rows:
        result |= class_scores(rows["zimg"] @ zclass.T, rows["label"])
    return result


def _loss(rows, ids, t, b, batch_size: int) -> dict[str, float]:
    total, n = 0.0, len(ids)
    order = np.random.default_rng(0).permutation(n)  # manifests are often sorted by class
    for start in range(0, n, batch_size):
        part = order[start : start + batch_size]
        zimg, ztxt = rows["zimg"][part], rows["ztxt"][part]
        value = losses.sigmoid_loss(zimg, ztxt, t, b, positives=ids[part], chunk_size=_BLOCK)
        total += float(value) * len(part)
    return {"val_loss": total / n}


def _pairs(zimg, ztxt, ids, t, b) -> dict[str, float]:
    """Over all pairs, a block of them at a time."""
    n, found = len(ids), 0
    sums, counts = np.zeros(2), np.zeros(2)
    for i in range(0, n, _BLOCK):
        best, best_id = np.full(len(zimg[i : i + _BLOCK]), -np.inf), np.full(n, -1)[i : i + _BLOCK]
        for j in range(0, n, _BLOCK):
            logits = np.exp(t) * (zimg[i : i + _BLOCK] @ ztxt[j : j + _BLOCK].T) + b
            same = ids[i : i + _BLOCK, None] == ids[j : j + _BLOCK]
            sums += logits[same].sum(dtype=np.float64), logits[~same].sum(dtype=np.float64)
            counts += same.sum(), (~same).sum()
            better = logits.max(1) > best
            best_id = np.where(better, ids[j : j + _BLOCK][logits.argmax(1)], best_id)
            best = np.maximum(best, logits.max(1))
        found += (best_id == ids[i : i + _BLOCK]).sum()
    means = sums / np.maximum(counts, 1)
    return {"val_positive": means[0], "val_negative": means[1], "val_recall@1": found / n}


def classification(
    rows: dict[str, np.ndarray], params: Params, objective: Objective
) -> dict[str, float]:
    """`val_loss`, `val_auc` and, for one class per image, `val_accuracy`."""
    whole = {"label": rows["label"], "mask": np.ones(len(rows["label"]), bool)}
    head = {"head": params["head"]}
    loss = objective.loss(head, rows, whole)
    logits = np.asarray(objectives.class_logits(head, rows))
    return {"val_loss": float(loss)} | class_scores(logits, rows["label"])


def class_scores(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`val_accuracy` and macro one-vs-rest `val_auc`, over known labels; classes that all or no
    rows are of are left out of the mean."""
    if labels.ndim == 1:
        scores, labels = scores[labels >= 0], labels[labels >= 0]
        columns = [(scores[:, c], labels == c) for c in range(scores.shape[1])]
        result = {"val_accuracy": metrics.accuracy(scores, labels)} if len(labels) else {}
    else:
        known = [~np.isnan(labels[:, c]) for c in range(labels.shape[1])]
        columns = [(scores[k, c], labels[k, c] == 1) for c, k in enumerate(known)]
        result = {}
    aucs = [metrics.auc(s, y) for s, y in columns if 0 < y.sum() < len(y)]
    return result | ({"val_auc": float(np.mean(aucs))} if aucs else {})
