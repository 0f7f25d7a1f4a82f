"""SigLIP's own objective: which text belongs to which image."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, PartitionSpec

from medsiglip_jax import losses
from medsiglip_jax.data.examples import Examples, with_own_ids
from medsiglip_jax.model import towers
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.train import validation
from medsiglip_jax.train.objectives.objective import Batch, Labels, Loss, Objective, Params

# Side of the blocks in which all held-out images meet all texts: 16 MB of float32 at a time.
_BLOCK = 2048


@dataclass(frozen=True)
class Contrastive(Objective):
    """SigLIP's pairwise sigmoid loss over the images and texts of the whole batch.

    A batch is {`image` uint8 [b,H,W,3], `text` int32 [b,l], `mask` bool [b]} and, if wanted,
    `positives` int32 [b], the ids of `losses.sigmoid_loss`.
    """

    name: str = "contrastive"

    towers: ClassVar[tuple[str, ...]] = ("img", "txt")
    columns: ClassVar[Mapping[str, str]] = {
        "texts": "name their column (data.text), or make texts of labels "
        '(data.captions="a photo of {label}")'
    }
    chunked: ClassVar[bool] = True

    def loss(
        self, config: ModelConfig, compute: Compute, labels: Labels, loss_chunk: int | None = None
    ) -> Loss:
        """Over several devices the loss is a ring, so that none ever holds the texts of all."""
        mesh = compute.rows and compute.rows.mesh
        pairs = _sigmoid_loss(loss_chunk, mesh)  # pyright: ignore

        def encode(params: Params, batch: Batch) -> Batch:
            zimg, _ = towers.encode_image(params, batch["image"], config, compute)
            ztxt = towers.encode_text(params, batch["text"], config, compute)
            return {"zimg": towers.normalize(zimg), "ztxt": towers.normalize(ztxt)}

        def reduce(params: Params, encoded: Batch, batch: Batch) -> jax.Array:
            zimg, ztxt, mask = encoded["zimg"], encoded["ztxt"], batch["mask"]
            own_text = jnp.full(len(mask), -1, jnp.int32)  # a negative id matches only itself
            positives = batch.get("positives", own_text)
            return pairs(zimg, ztxt, params["t"], params["b"], positives, mask)

        return Loss(encode, reduce)

    def examples(self, examples: Examples) -> Examples:
        """With an id for each row, so that one met twice in a batch is no negative of itself."""
        return with_own_ids(examples)

    def batch(self, config: ModelConfig, rows: int, labels: Labels) -> dict[str, ShapeDtypeStruct]:
        positives = ShapeDtypeStruct((rows,), jnp.int32)
        return {**super().batch(config, rows, labels), "positives": positives}

    def loss_flops(self, config: ModelConfig, batch_size: int) -> float:
        """Of every image with every text: one product forward, two backward."""
        return 3 * 2.0 * batch_size**2 * config.embed_dim

    def loss_bytes(self, rows: int, loss_chunk: int | None) -> dict[str, int]:
        return {"loss: a tile of pairs": 4 * min(rows, loss_chunk or rows) ** 2}

    def metric_names(self, labels: Labels, zero_shot: bool) -> tuple[str, ...]:
        scores = validation.class_metrics(labels.multi_label) if zero_shot else ()
        return ("val_loss", "val_positive", "val_negative", "val_recall@1", *scores)

    def metrics(
        self, encoded: Batch, params: Params, loss: Loss, batch_size: int, zclass: Any = None
    ) -> dict[str, float]:
        """Loss, mean logits and recall of image-text pairs; zero-shot scores of classes.

        The loss depends on the batch size, so held-out rows are drawn into batches at random.

        Returns:
            `val_loss`, the mean logits `val_positive` and `val_negative` of matching pairs and
            others, `val_recall@1` image to text (equal captions or positives count), and with
            `zclass` and labels zero-shot `val_accuracy` and `val_auc`.
        """
        t, b = (np.asarray(params[name], np.float32) for name in "tb")
        zimg, ztxt, ids = (encoded[name] for name in ("zimg", "ztxt", "positives"))
        scores = {
            "val_loss": _mean_loss(zimg, ztxt, ids, t, b, batch_size),
            **_pair_scores(zimg, ztxt, ids, t, b),
        }
        if zclass is not None and "label" in encoded:
            scores |= validation.class_scores(zimg @ zclass.T, encoded["label"])
        return scores


def _sigmoid_loss(chunk_size: int | None, mesh: Mesh | None) -> Callable:
    """`loss(zimg, ztxt, t, b, positives, mask)` of global arrays, split over `mesh` if given."""

    options: dict[str, Any] = {"chunk_size": chunk_size, "axis_name": "data" if mesh else None}

    def loss(zimg, ztxt, t, b, positives, mask):
        return losses.sigmoid_loss(zimg, ztxt, t, b, positives=positives, mask=mask, **options)

    if mesh is None:
        return loss
    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = (rows, rows, whole, whole, rows, rows)
    return jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=whole)


def _mean_loss(zimg, ztxt, ids, t, b, batch_size: int) -> float:
    total, n = 0.0, len(ids)
    order = np.random.default_rng(0).permutation(n)  # inputs are often sorted by class
    for start in range(0, n, batch_size):
        rows = order[start : start + batch_size]
        images, texts = zimg[rows], ztxt[rows]
        value = losses.sigmoid_loss(images, texts, t, b, positives=ids[rows], chunk_size=_BLOCK)
        total += float(value) * len(rows)
    return total / n


def _pair_scores(zimg, ztxt, ids, t, b) -> dict[str, float]:
    """Over all pairs, a block of them at a time."""
    n, hits = len(ids), 0
    sums, counts = np.zeros(2), np.zeros(2)
    for i in range(0, n, _BLOCK):
        images, image_ids = zimg[i : i + _BLOCK], ids[i : i + _BLOCK]
        best, best_id = np.full(len(images), -np.inf), np.full(len(images), -1)
        for j in range(0, n, _BLOCK):
            text_ids = ids[j : j + _BLOCK]
            logits = np.exp(t) * (images @ ztxt[j : j + _BLOCK].T) + b
            same = image_ids[:, None] == text_ids
            sums += logits[same].sum(dtype=np.float64), logits[~same].sum(dtype=np.float64)
            counts += same.sum(), (~same).sum()
            highest = logits.max(1)
            best_id = np.where(highest > best, text_ids[logits.argmax(1)], best_id)
            best = np.maximum(best, highest)
        hits += (best_id == image_ids).sum()
    means = sums / np.maximum(counts, 1)
    return {"val_positive": means[0], "val_negative": means[1], "val_recall@1": hits / n}
