"""What is trained for: contrastive pairs, or classes on pooled image features."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from medsiglip_jax import losses
from medsiglip_jax.model import towers
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.towers import Compute

Params = dict[str, Any]
Batch = dict[str, Any]
Rows = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """A loss in two parts, so that a large batch can be encoded piece by piece.

    Attributes:
        encode: (params, batch) -> arrays with one row per example, each depending on that
            example alone.
        loss: (params, rows, batch) -> the loss of the whole batch.
    """

    encode: Callable[[Params, Batch], Rows]
    loss: Callable[[Params, Rows, Batch], jax.Array]

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        return self.loss(params, self.encode(params, batch), batch)


def contrastive(
    config: ModelConfig,
    compute: Compute,
    loss_chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Objective:
    """SigLIP's pairwise sigmoid loss over the images and texts of the whole batch.

    A batch is {`image` uint8 [b,H,W,3], `text` int32 [b,l], `mask` bool [b]} and, if wanted,
    `positives` int32 [b], the ids of `losses.sigmoid_loss`.

    Args:
        config: with both towers.
        compute: how to do the arithmetic.
        loss_chunk: `chunk_size` of the loss.
        mesh: devices over whose "data" axis the batches are split; the loss then rings over it,
            so that no device ever holds the texts of all. None: one device, or let the compiler
            split the loss.
    """
    pairs = _sigmoid_loss(loss_chunk, mesh)

    def encode(params: Params, batch: Batch) -> Rows:
        zimg, _ = towers.encode_image(params, batch["image"], config, compute)
        ztxt = towers.encode_text(params, batch["text"], config, compute)
        return {"zimg": towers.normalize(zimg), "ztxt": towers.normalize(ztxt)}

    def loss(params: Params, rows: Rows, batch: Batch) -> jax.Array:
        positives = batch.get("positives")
        return pairs(rows["zimg"], rows["ztxt"], params["t"], params["b"], positives, batch["mask"])

    return Objective(encode, loss)


def _sigmoid_loss(chunk_size: int | None, mesh: Mesh | None) -> Callable:
    """`loss(zimg, ztxt, t, b, positives, mask)` of global arrays, split over `mesh` if given."""
    if mesh is None:
        return lambda zimg, ztxt, t, b, positives, mask: losses.sigmoid_loss(
            zimg, ztxt, t, b, positives=positives, mask=mask, chunk_size=chunk_size
        )
    rows, whole = PartitionSpec("data"), PartitionSpec()

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, rows, whole, whole, rows, rows), out_specs=whole
    )
    def ring(zimg, ztxt, t, b, positives, mask):
        return losses.sigmoid_loss(
            zimg, ztxt, t, b, positives=positives, mask=mask, chunk_size=chunk_size,
            axis_name="data",
        )  # fmt: skip

    def loss(zimg, ztxt, t, b, positives, mask):
        if positives is None:  # a negative id matches only itself
            positives = jnp.full(len(zimg), -1, jnp.int32)
        return ring(zimg, ztxt, t, b, positives, mask)

    return loss


# What a piece of a batch has for negatives when it is accumulated, see `step.make_train_step`.
NEGATIVES = ("batch", "piece")
POOLS = ("map", "mean")


def classification(
    config: ModelConfig,
    compute: Compute,
    pool: str = "map",
    multi_label: bool = False,
    pos_weight: Any = None,
) -> Objective:
    """A linear head, params["head"], on the pooled features of the image tower.

    A batch is {`image`, `mask`} and `label`: int32 [b], negative for unknown, or for multi-label
    float32 [b, classes] with NaN for unknown. The loss is the mean over what is known in the whole
    batch, however it is accumulated.

    Args:
        config: with an image tower.
        compute: how to do the arithmetic.
        pool: "map", the attention-pooling head, or "mean" over the patch tokens (the official
            classification notebook).
        multi_label: every class for itself (sigmoid) instead of one of them (softmax).
        pos_weight: factor on each class's positives, with `multi_label`.
    """
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; expected one of {', '.join(POOLS)}")

    def encode(params: Params, batch: Batch) -> Rows:
        z, tokens = towers.encode_image(params, batch["image"], config, compute)
        return {"features": z if pool == "map" else tokens.mean(axis=1)}

    def loss(params: Params, rows: Rows, batch: Batch) -> jax.Array:
        logits = class_logits(params, rows)
        if multi_label:
            return losses.binary_cross_entropy(logits, batch["label"], batch["mask"], pos_weight)
        return losses.cross_entropy(logits, batch["label"], batch["mask"])

    return Objective(encode, loss)


def class_logits(params: Params, rows: Rows) -> jax.Array:
    """The head's logits, float32 [b, classes]."""
    with jax.default_matmul_precision("highest"):
        return rows["features"] @ params["head"]["kernel"] + params["head"]["bias"]


def init_head(config: ModelConfig, classes: int) -> Params:
    """A head of zeros: every class starts equally likely, and no seed matters."""
    assert config.vision is not None
    return {
        "kernel": jnp.zeros((config.vision.width, classes), jnp.float32),
        "bias": jnp.zeros((classes,), jnp.float32),
    }
