"""What an objective is: all that training and planning ask about what a model is trained for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct

from medsiglip_jax.data.examples import Examples
from medsiglip_jax.files.settings import at_least, one_of
from medsiglip_jax.model.config import ModelConfig, Preparation
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.preprocess.dicom.rules import Rules

Params = dict[str, Any]
Batch = dict[str, Any]  # of examples, or what `Loss.encode` made of one

# What a piece of a batch has for negatives when it is accumulated, see `step.make_train_step`.
NEGATIVES = ("batch", "piece")


@dataclass(frozen=True)
class Loss:
    """A loss in two parts, so that a large batch can be encoded piece by piece.

    Attributes:
        encode: (params, batch) -> arrays with one row per example, each depending on that
            example alone.
        reduce: (params, encoded, batch) -> the loss of the whole batch, a scalar.
    """

    encode: Callable[[Params, Batch], Batch]
    reduce: Callable[[Params, Batch, Batch], jax.Array]

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        return self.reduce(params, self.encode(params, batch), batch)


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels that a run learns from.

    Attributes:
        classes: their names; empty where there are no labels.
        multi_label: several findings per image instead of one class.
        values: those of all training examples, float32 [n, classes] with NaN for unknown if
            `multi_label`, else int32 [n] with -1; None in a plan, which reads no data.
    """

    classes: tuple[str, ...] = ()
    multi_label: bool = False
    values: np.ndarray | None = None


@dataclass(frozen=True)
class Reading:
    """How the images and the probabilities of a trained classifier are read.

    Attributes:
        preprocess: the pixel preset of the run.
        dicom: how its files became pixels.
        thresholds: the probability from which each class is positive; NaN if it was not chosen,
            empty without held-out rows.
    """

    preprocess: str
    dicom: Rules
    thresholds: Sequence[float] = ()


@dataclass(frozen=True)
class Objective:
    """The settings of an objective, which are keys of a recipe, and what follows from them.

    A subclass adds its settings as fields, with a default each, and overrides what differs.

    Attributes:
        name: the name of the objective.
        accumulate: the number of pieces in which a batch is encoded, to save memory.
        negatives: with `accumulate`, what a piece has for negatives: the whole "batch" (exact), or
            only its own "piece".
    """

    name: str = ""
    accumulate: Annotated[int, at_least(1)] = 1
    negatives: Annotated[str, one_of(NEGATIVES)] = "batch"

    # The towers that are trained; without "txt" a batch holds no tokens.
    towers: ClassVar[tuple[str, ...]] = ("img",)
    # Columns of `Examples` that must be there -> what to do where one is not.
    columns: ClassVar[Mapping[str, str]] = {}
    # Whether a recipe's `loss_chunk` bounds the memory of the loss.
    chunked: ClassVar[bool] = False
    # Whether its classes are scored on test rows, by `probabilities`.
    judged: ClassVar[bool] = False
    # What trains beside LoRA's adapters, in place of a recipe's `lora.train`.
    lora_train: ClassVar[tuple[str, ...] | None] = None

    def loss(
        self, config: ModelConfig, compute: Compute, labels: Labels, loss_chunk: int | None = None
    ) -> Loss:
        """The loss to minimise.

        Args:
            config: of the model.
            compute: how to do the arithmetic, and over which devices the batches are split.
            labels: what the labels are, for an objective that has some.
            loss_chunk: side of the tiles of a loss over pairs.
        """
        raise NotImplementedError

    def check_columns(self, examples: Examples, path: str) -> None:
        """Raises ValueError if the examples of `path` lack a column."""
        for column, advice in self.columns.items():
            if getattr(examples, column) is None:
                raise ValueError(f"{path} has no {column}; {advice}")

    def examples(self, examples: Examples) -> Examples:
        """The examples as the loss wants them."""
        return examples

    def added(self, config: ModelConfig, labels: Labels) -> Params:
        """New parameters beside those of the model, such as a head."""
        return {}

    def unused(self, params: Params) -> tuple[str, ...]:
        """Regexes of parameters without a gradient; weight decay alone would shrink them."""
        idle = () if "txt" in self.towers else ("txt/.*", "t", "b")
        return tuple(regex for regex in idle if regex.split("/")[0] in params)

    def batch(self, config: ModelConfig, rows: int, labels: Labels) -> dict[str, ShapeDtypeStruct]:
        """Shapes of a batch of `rows` examples, as the loader makes it."""
        size = config.image_size
        batch = {
            "image": ShapeDtypeStruct((rows, size, size, 3), jnp.uint8),
            "mask": ShapeDtypeStruct((rows,), jnp.bool_),
        }
        if "txt" in self.towers:
            batch["text"] = ShapeDtypeStruct((rows, config.context_length), jnp.int32)
        if "labels" in self.columns:
            shape, dtype = (rows,), jnp.int32
            if labels.multi_label:
                shape, dtype = (rows, len(labels.classes)), jnp.float32
            batch["label"] = ShapeDtypeStruct(shape, dtype)
        return batch

    def metric_names(self, labels: Labels, zero_shot: bool) -> tuple[str, ...]:
        """The names of what `metrics` returns.

        Args:
            labels: of the examples.
            zero_shot: whether it gets `zclass`.
        """
        return ("val_loss",)

    def metrics(
        self, encoded: Batch, params: Params, loss: Loss, batch_size: int, zclass: Any = None
    ) -> dict[str, float]:
        """Scores on held-out examples, under names that start with "val_".

        Args:
            encoded: what `loss.encode` returned for all of them, and the rest of their batches
                (`label`, `mask`, `positives`).
            params: of the model, whole.
            loss: that `self.loss` returned.
            batch_size: of training.
            zclass: float32 [classes, D], normalised embeddings of one caption per class, if the
                recipe makes captions of labels.
        """
        return {"val_loss": float(loss.reduce(params, encoded, encoded))}

    def probabilities(self, encoded: Batch, params: Params, labels: Labels) -> np.ndarray:
        """Those of the classes, float64 [n, classes], of rows that `loss.encode` has encoded."""
        raise NotImplementedError

    def loss_flops(self, config: ModelConfig, batch_size: int) -> float:
        """Floating-point operations of a step after the towers and the added parameters."""
        return 0.0

    def loss_bytes(self, rows: int, loss_chunk: int | None) -> dict[str, int]:
        """The largest arrays of the loss on a device with so many rows, by name."""
        return {}

    def exported(
        self, config: ModelConfig, params: Params, labels: Labels, reading: Reading
    ) -> tuple[ModelConfig, Params]:
        """The architecture and the parameters that an export holds.

        Args:
            config: of the model.
            params: trained, adapters merged, with what `added` has added.
            labels: what was learned.
            reading: how images were read, and the probabilities of a classifier are.
        """
        made = Preparation(reading.preprocess, reading.dicom)
        return dataclasses.replace(config, preparation=made), params
