"""Classes, or several findings at once, from the pooled features of the image tower."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from medsiglip_jax import losses
from medsiglip_jax.files.settings import Check, one_of
from medsiglip_jax.model import towers
from medsiglip_jax.model.config import POOLS, ClassifierConfig, ModelConfig
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.train import validation
from medsiglip_jax.train.objectives.objective import Batch, Labels, Loss, Objective, Params, Reading

_WEIGHTS = Check(
    lambda weight: not isinstance(weight, str) or weight == "balanced",
    "'balanced', or one number per class",
)


@dataclass(frozen=True)
class Classification(Objective):
    """A linear layer, params["classifier"], on the pooled features of the image tower.

    A batch is {`image`, `mask`} and `label`: int32 [b], negative for unknown, or for several
    findings float32 [b, classes] with NaN for unknown. The loss is the mean over what is known in
    the whole batch, however it is accumulated.

    Attributes:
        pool: "map", the attention-pooling head, or "mean" over the patch tokens (the official
            classification notebook).
        pos_weight: for several findings, the weight of positives in the loss: None, "balanced"
            (negatives / positives of the training rows) or one number per finding.
        class_weight: for one class per image, the weight of each class in the loss: None,
            "balanced" (rows / (classes * rows of the class)) or one number per class.
    """

    name: str = "classification"
    pool: Annotated[str, one_of(POOLS)] = "map"
    pos_weight: Annotated[str | tuple[float, ...] | None, _WEIGHTS] = None
    class_weight: Annotated[str | tuple[float, ...] | None, _WEIGHTS] = None

    columns: ClassVar[Mapping[str, str]] = {"labels": "name their column (data.label)"}
    judged: ClassVar[bool] = True
    lora_train: ClassVar[tuple[str, ...] | None] = ("classifier/.*",)

    def loss(
        self, config: ModelConfig, compute: Compute, labels: Labels, loss_chunk: int | None = None
    ) -> Loss:
        """Softmax cross-entropy of one class per image, sigmoid of several findings.

        Raises:
            ValueError: `pos_weight` or `class_weight` does not go with the labels.
        """
        pos_weight, class_weight = self._weights(labels), self._class_weights(labels)

        def encode(params: Params, batch: Batch) -> Batch:
            z, tokens = towers.encode_image(params, batch["image"], config, compute)
            return {"features": z if self.pool == "map" else tokens.mean(axis=1)}

        def reduce(params: Params, encoded: Batch, batch: Batch) -> jax.Array:
            logits = towers.class_logits(params["classifier"], encoded["features"])
            label, mask = batch["label"], batch["mask"]
            if labels.multi_label:
                return losses.binary_cross_entropy(logits, label, mask, pos_weight)
            return losses.cross_entropy(logits, label, mask, class_weight)

        return Loss(encode, reduce)

    def _weights(self, labels: Labels) -> np.ndarray | None:
        """Factor on each finding's positives."""
        weight, classes = self.pos_weight, labels.classes
        if weight is None:
            return None
        if not labels.multi_label:
            raise ValueError(
                "objective.pos_weight is for several findings at once (data.label a tuple of "
                "columns); here every image has one class: objective.class_weight"
            )
        if isinstance(weight, str):  # balanced; a plan has no labels to count
            if labels.values is None:
                return None
            positives = (labels.values == 1).sum(0)
            known = (~np.isnan(labels.values)).sum(0)
            return ((known - positives) / np.maximum(positives, 1)).astype(np.float32)
        return _one_each("pos_weight", weight, classes)

    def _class_weights(self, labels: Labels) -> np.ndarray | None:
        """Weight of each class."""
        weight, values = self.class_weight, labels.values
        if weight is None:
            return None
        if labels.multi_label:
            raise ValueError(
                "objective.class_weight is for one class per image; for several findings at once "
                "there is objective.pos_weight"
            )
        if isinstance(weight, str):  # balanced; a plan has no labels to count
            if values is None:
                return None
            counts = np.bincount(values[values >= 0], minlength=len(labels.classes))
            balanced = counts.sum() / (len(counts) * np.maximum(counts, 1))
            return np.where(counts, balanced, 0).astype(np.float32)
        return _one_each("class_weight", weight, labels.classes)

    def added(self, config: ModelConfig, labels: Labels) -> Params:
        """A classifier of zeros: every class starts equally likely, and no seed matters."""
        assert config.vision is not None
        if self.pool == "map" and config.vision.pool != "map":
            raise ValueError(
                "objective.pool is 'map', and this model has no attention-pooling head; expected "
                "'mean'"
            )
        kernel = jnp.zeros((config.vision.width, len(labels.classes)), jnp.float32)
        bias = jnp.zeros(kernel.shape[1:], jnp.float32)
        return {"classifier": {"kernel": kernel, "bias": bias}}

    def unused(self, params: Params) -> tuple[str, ...]:
        idle = self.pool == "mean" and "MAPHead_0" in params["img"]
        return (*super().unused(params), *(["img/MAPHead_0/.*"] if idle else []))

    def metric_names(self, labels: Labels, zero_shot: bool) -> tuple[str, ...]:
        return ("val_loss", *validation.class_metrics(labels.multi_label))

    def metrics(
        self, encoded: Batch, params: Params, loss: Loss, batch_size: int, zclass: Any = None
    ) -> dict[str, float]:
        """`val_loss`, `val_auc` and, for one class per image, `val_accuracy`."""
        logits = self._logits(encoded, params)
        return {
            **super().metrics(encoded, params, loss, batch_size),
            **validation.class_scores(logits, encoded["label"]),
        }

    def probabilities(self, encoded: Batch, params: Params, labels: Labels) -> np.ndarray:
        """Sigmoids of several findings, the softmax of one class per image."""
        return validation.probabilities(self._logits(encoded, params), labels.multi_label)

    def _logits(self, encoded: Batch, params: Params) -> np.ndarray:
        return np.asarray(towers.class_logits(params["classifier"], encoded["features"]))

    def exported(
        self, config: ModelConfig, params: Params, labels: Labels, reading: Reading
    ) -> tuple[ModelConfig, Params]:
        """The image tower and its classifier: what was trained."""
        chosen = tuple(None if np.isnan(t) else float(t) for t in reading.thresholds)
        classifier = ClassifierConfig(
            labels.classes, self.pool, labels.multi_label, chosen, reading.preprocess, reading.dicom
        )
        return (
            ModelConfig(config.vision, None, classifier),
            {name: params[name] for name in ("img", "classifier")},
        )


def _one_each(name: str, weight: tuple[float, ...], classes: tuple[str, ...]) -> np.ndarray:
    if len(weight) != len(classes):
        raise ValueError(
            f"objective.{name} has {len(weight)} numbers for the {len(classes)} classes "
            f"{', '.join(classes)}; give one each, or 'balanced'"
        )
    return np.asarray(weight, np.float32)
