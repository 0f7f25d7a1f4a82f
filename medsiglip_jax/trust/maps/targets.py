"""What is explained: a number that is a function of an image's embedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.embeddings.probe.prediction import check_model
from medsiglip_jax.inference.classify import encode_texts
from medsiglip_jax.model import towers
from medsiglip_jax.model.api import Model


@dataclass(frozen=True)
class Form:
    """How embeddings become a logit, as a static argument of compiled programs.

    Attributes:
        normalize: divide the embedding by its norm, as similarities do.
        unit: divide it by its length without epsilon, as probes of scale "unit" do.
        exclusive: the logit is that of the softmax: log(p / (1 - p)).
    """

    normalize: bool
    unit: bool = False
    exclusive: bool = False

    def __call__(self, numbers: Mapping[str, Array], z: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Logits of embeddings, not normalised; `numbers` are those of a `Target`."""
        with jax.default_matmul_precision("highest"):
            z = towers.normalize(z) if self.normalize else z
            z = z / jnp.linalg.norm(z, axis=-1, keepdims=True) if self.unit else z
            if "mean" in numbers:
                z = (z - numbers["mean"]) / numbers["deviation"]
            if "hidden_weights" in numbers:
                z = z @ numbers["hidden_weights"] + numbers["hidden_biases"]
                z = jax.nn.gelu(z, approximate=False)
            logits = z @ numbers["coefficients"].T + numbers["intercepts"]
        own = logits[:, numbers["index"]]
        if not self.exclusive:
            return own
        others = jnp.arange(logits.shape[1]) != numbers["index"]
        return own - jax.nn.logsumexp(logits, axis=1, where=others)


@dataclass(frozen=True, eq=False)
class Target:
    """A logit that is explained.

    Attributes:
        text: what it is the logit of: a text, or a label.
        contrast: the text whose logit is subtracted, or None.
        form: how it is computed.
        numbers: float32 arrays that `form` computes with.
        model: whose image tower gives the embedding.
        preprocess: the preset that its images need, or None if any may be used.
    """

    text: str
    contrast: str | None
    form: Form
    numbers: Mapping[str, Array]
    model: Model
    preprocess: str | None = None

    def logits(self, z: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Of embeddings, not normalised; float32."""
        return np.asarray(_logits(self.form, self.numbers, z))


@partial(jax.jit, static_argnums=0)
def _logits(form: Form, numbers: Mapping[str, Array], z: Array) -> Array:
    return form(numbers, z)


def _float32(**numbers: Any) -> dict[str, Array]:
    return {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}


def of_texts(model: Model, texts: Sequence[str], contrast: str | None = None) -> list[Target]:
    """The logit of each text, exp(t) * cosine + b, or how far it is above that of `contrast`.

    Raises:
        ValueError: no texts, an empty one, or a model without both towers.
    """
    if contrast is not None and contrast in texts:
        raise ValueError(f"contrast is {contrast!r}, one of the texts; expected another text")
    ztxt = encode_texts(model, [*texts, *([] if contrast is None else [contrast])])
    if model.config.vision is None or "t" not in model.params:
        raise ValueError("the model has no image tower, or no temperature; maps need both towers")
    factor, bias = (jnp.asarray(model.params[k], jnp.float32).reshape(()) for k in "tb")
    directions = jnp.exp(factor) * ztxt.astype(jnp.float32)
    if contrast is not None:
        directions, bias = directions - directions[-1], jnp.zeros(())
    return [
        Target(text, contrast, Form(normalize=True),
               {**_float32(coefficients=row[None], intercepts=bias[None]), "index": jnp.array(0)},
               model)
        for text, row in zip(texts, directions, strict=False)
    ]  # fmt: skip


def of_probe(model: Model, probe: Probe, label: str | None) -> Target:
    """The logit of a label of a probe: log(p / (1 - p)) of its probability p.

    Raises:
        ValueError: the probe has no such label, could not be fitted to it, or belongs to another
            model.
    """
    preprocess, normalized = check_model(probe, model)
    index = _index(label, probe.classes, "the probe")
    if not probe.fitted[index]:
        raise ValueError(f"the probe was not fitted to {probe.classes[index]!r}: it had one label")
    scaling, hidden = probe.scaling, probe.hidden
    layer = {} if hidden is None else {"hidden_weights": hidden[0], "hidden_biases": hidden[1]}
    numbers = _float32(
        mean=scaling.mean, deviation=scaling.deviation, coefficients=probe.coefficients,
        intercepts=probe.intercepts, **layer,
    )  # fmt: skip
    form = Form(normalized, scaling.unit, probe.exclusive)
    numbers["index"] = jnp.array(index)
    return Target(probe.classes[index], None, form, numbers, model, preprocess)


def of_classifier(model: Model, label: str | None) -> Target:
    """The logit of a label of the classifier that a model was fine-tuned with, as `of_probe`.

    Raises:
        ValueError: the model has no classifier, or that no such label.
    """
    features, classifier = model.features, model.config.classifier
    assert classifier is not None
    index, own = _index(label, classifier.labels, "the classifier"), model.params["classifier"]
    numbers = _float32(coefficients=own["kernel"].T, intercepts=own["bias"])
    form = Form(normalize=False, exclusive=not classifier.multi_label)
    numbers["index"] = jnp.array(index)
    return Target(classifier.labels[index], None, form, numbers, features, classifier.preprocess)


def _index(label: str | None, labels: Sequence[str], what: str) -> int:
    if label is None and len(labels) == 1:
        return 0
    if label is None:
        named = ", ".join(map(repr, labels))
        raise ValueError(f"which label to explain is missing (label=, --label); {what} has {named}")
    if label not in labels:
        raise ValueError(f"label is {label!r}; {what} has {', '.join(map(repr, labels))}")
    return labels.index(label)
