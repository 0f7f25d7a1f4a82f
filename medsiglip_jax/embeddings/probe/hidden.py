"""A hidden layer between the features and the regressions of a probe, trained with AdamW."""

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from scipy import special

from medsiglip_jax.data.labels import label_columns
from medsiglip_jax.embeddings.probe.logistic import Labelled

_BATCH = 256
_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 1e-2
_EPOCHS, _PATIENCE = 200, 10
_ABSENT = -1e9  # logit of a class without training rows


class Hidden(NamedTuple):
    """The layer, gelu(features @ weights + biases)."""

    weights: Float64[np.ndarray, "d h"]
    biases: Float64[np.ndarray, " h"]

    def __call__(self, features: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n h"]:
        """What the regressions take; not the approximation of GELU by the hyperbolic tangent."""
        x = features @ self.weights + self.biases
        return x * special.ndtr(x)


class Trained(NamedTuple):
    """The layer and the regressions on it; as `logistic.Fitted` otherwise."""

    hidden: Hidden
    coefficients: Float64[np.ndarray, "c h"]
    intercepts: Float64[np.ndarray, " c"]
    epochs: int


def fit(train: Labelled, validation: Labelled, classes: int, units: int, seed: int) -> Trained:
    """Trains a layer of `units` together with the regressions; the same seed gives the same layer.

    The loss is that of the linear probe. Training ends when the loss on the validation rows has
    not fallen for ten epochs, and the weights of the best epoch are kept.

    Args:
        train: features of equal scale, and labels.
        validation: likewise.
        classes: number of classes or findings.
        units: size of the layer.
        seed: of the first weights and the order of the rows.

    Raises:
        ValueError: the validation rows have no label to stop on, or the training rows are all of
            one class.
    """
    exclusive = train.labels.ndim == 1
    (x, y), (xv, yv) = (_known(rows, classes) for rows in (train, validation))
    fitted = _fitted(y, exclusive)
    if not fitted.any():
        raise ValueError("the training rows with a label are all of one class; 2 are needed")
    y, yv = (np.where(fitted, labels, np.nan) for labels in (y, yv))
    judged = (yv == 1).any(axis=1) if exclusive else ~np.isnan(yv).all(axis=1)
    xv, yv = xv[judged], yv[judged]
    if not len(yv):
        raise ValueError(
            "the validation rows have no labels, and a hidden layer is trained until their loss "
            "rises; give labelled validation rows, or fit a linear probe"
        )
    params, epochs = _trained((x, y), (xv, yv), fitted, units, seed, exclusive)
    weights = {name: np.asarray(value, np.float64) for name, value in params.items()}
    absent = -np.inf if exclusive else np.nan
    coefficients = np.where(fitted[:, None], weights["w2"].T, 0 if exclusive else np.nan)
    intercepts = np.where(fitted, weights["b2"], absent)
    return Trained(Hidden(weights["w1"], weights["b1"]), coefficients, intercepts, epochs)


def _known(rows: Labelled, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels (NaN unknown) of the rows that have a label."""
    labels = label_columns(rows.labels, classes)
    known = ~np.isnan(labels).all(axis=1)
    return np.asarray(rows.vectors[known], np.float32), labels[known].astype(np.float32)


def _fitted(labels: np.ndarray, exclusive: bool) -> np.ndarray:
    """The classes that can be learned from these labels."""
    present = (labels == 1).any(axis=0)
    if exclusive:
        return present & (present.sum() > 1)
    return present & (labels == 0).any(axis=0)


def _trained(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray],
    fitted: np.ndarray, units: int, seed: int, exclusive: bool,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """The weights of the epoch with the lowest validation loss, and its number."""
    import jax

    optax = installed()
    optimizer = optax.adamw(_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    loss = functools.partial(_loss, exclusive=exclusive, fitted=fitted)
    params = _start(train[0].shape[1], units, len(fitted), seed)
    state, batch = optimizer.init(params), min(_BATCH, len(train[0]))

    @jax.jit
    def epoch(params, state, order, x, y):
        def step(carry, rows):
            params, state = carry
            gradient = jax.grad(loss)(params, x[rows], y[rows])
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    judge, draws = jax.jit(loss), np.random.default_rng(seed)
    best, lowest, best_epoch = params, float("inf"), 0
    for number in range(1, _EPOCHS + 1):
        order = draws.permutation(len(train[0]))
        order = order[: len(order) // batch * batch].reshape(-1, batch)
        params, state = epoch(params, state, order, *train)
        if (value := float(judge(params, *validation))) < lowest:
            best, lowest, best_epoch = params, value, number
        elif number - best_epoch >= _PATIENCE:
            break
    if not best_epoch:
        raise ValueError("the hidden layer learns nothing: its loss is not finite; change --scale")
    return best, best_epoch


def _start(inputs: int, units: int, classes: int, seed: int) -> dict[str, np.ndarray]:
    """First weights, of variance 1 / inputs (LeCun); the regressions begin at zero."""
    first = np.random.default_rng(seed).normal(size=(inputs, units)) / np.sqrt(inputs)
    shapes = {"b1": (units,), "w2": (units, classes), "b2": (classes,)}
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return {"w1": first.astype(np.float32), **zeros}


def _loss(params, x, y, *, exclusive: bool, fitted: np.ndarray):
    """The mean loss of the known labels."""
    import jax
    import jax.numpy as jnp

    optax = installed()
    hidden = jax.nn.gelu(x @ params["w1"] + params["b1"], approximate=False)
    logits = hidden @ params["w2"] + params["b2"]
    known = ~jnp.isnan(y)
    y = jnp.where(known, y, 0)
    if exclusive:
        losses = optax.softmax_cross_entropy(jnp.where(fitted, logits, _ABSENT), y)
        known = known.any(axis=1)
    else:
        losses = optax.sigmoid_binary_cross_entropy(logits, y)
    return jnp.where(known, losses, 0).sum() / jnp.maximum(known.sum(), 1)


def installed() -> Any:
    """optax, whose optimizer and losses this needs.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import optax
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a hidden layer needs optax: pip install 'medsiglip-jax[evaluate]'"
        ) from None
    return optax
