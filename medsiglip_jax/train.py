"""The train step and the loop around it: any iterator of batches in, a trained state out."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medsiglip_jax import model as towers
from medsiglip_jax import optim
from medsiglip_jax.config import ModelConfig
from medsiglip_jax.losses import sigmoid_loss
from medsiglip_jax.model import Compute
from medsiglip_jax.optim import Optimizer

State = dict[str, Any]
Batch = dict[str, Any]
Metrics = dict[str, Any]


def init_state(params: dict[str, Any], optimizer: Optimizer) -> State:
    """The state before the first step: {"params", "opt_state", "step"}.

    The train step donates it: the arrays of `params` are gone after the first step.
    """
    # Types and places must be those that the step returns, or the second step compiles all over
    # again: no weakly typed leaf (jnp.full without a dtype), no scalar on one device of a mesh.
    params = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params)
    state = {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
    }
    where = jax.tree.leaves(params)[0].sharding
    if not isinstance(where, NamedSharding):
        return state
    whole = NamedSharding(where.mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole), state
    )


def make_train_step(
    config: ModelConfig,
    compute: Compute,
    optimizer: Optimizer,
    loss_chunk: int | None = None,
    *,
    mesh: Mesh | None = None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Returns the compiled `step(state, batch) -> (state, metrics)`; it donates `state`.

    A batch is {`image` uint8 [b,H,W,3], `text` int32 [b,l], `mask` bool [b]} and, if wanted,
    `positives` int32 [b], the ids of `sigmoid_loss`. Metrics are device scalars: `loss`,
    `grad_norm` (before clipping), `temperature` (exp(t)), `bias` (b) and `learning_rate`, all as
    this step found them.

    Args:
        config: the architecture, with both towers.
        compute: dtype, precision, attention and remat of the towers.
        optimizer: from `medsiglip_jax.optim`.
        loss_chunk: `chunk_size` of the loss.
        mesh: devices over whose "data" axis the batches are split; the loss then rings over it,
            so that no device ever holds the texts of all. None: one device, or let the compiler
            split the loss.
    """
    loss = make_loss(loss_chunk, mesh)

    def loss_fn(params, batch):
        zimg = towers.normalize(towers.encode_image(params, batch["image"], config, compute)[0])
        ztxt = towers.normalize(towers.encode_text(params, batch["text"], config, compute))
        return loss(zimg, ztxt, params["t"], params["b"], batch.get("positives"), batch["mask"])

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params = state["params"]
        value, gradients = jax.value_and_grad(loss_fn)(params, batch)
        new_params, opt_state = optimizer.apply(params, gradients, state["opt_state"])
        metrics = {
            "loss": value,
            "grad_norm": optim.global_norm(gradients),
            "temperature": jnp.exp(params["t"]).reshape(()),
            "bias": params["b"].reshape(()),
            "learning_rate": jnp.asarray(optimizer.learning_rate(state["step"])),
        }
        return {"params": new_params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    return step


def make_loss(chunk_size: int | None = None, mesh: Mesh | None = None) -> Callable:
    """`loss(zimg, ztxt, t, b, positives, mask)` of global arrays, split over `mesh` if given."""
    if mesh is None:
        return lambda zimg, ztxt, t, b, positives, mask: sigmoid_loss(
            zimg, ztxt, t, b, positives=positives, mask=mask, chunk_size=chunk_size
        )
    rows, whole = PartitionSpec("data"), PartitionSpec()

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, rows, whole, whole, rows, rows), out_specs=whole
    )
    def ring(zimg, ztxt, t, b, positives, mask):
        return sigmoid_loss(
            zimg, ztxt, t, b, positives=positives, mask=mask, chunk_size=chunk_size,
            axis_name="data",
        )  # fmt: skip

    def loss(zimg, ztxt, t, b, positives, mask):
        if positives is None:  # a negative id matches only itself
            positives = jnp.full(len(zimg), -1, jnp.int32)
        return ring(zimg, ztxt, t, b, positives, mask)

    return loss


def fit(
    state: State,
    step: Callable[[State, Batch], tuple[State, Metrics]],
    batches: Iterator[Batch],
    total_steps: int,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    log_every: int = 50,
) -> State:
    """Trains until `state["step"]` is `total_steps` and returns the state.

    Args:
        state: where to start; a restored one continues from its step. Donated.
        step: from `make_train_step`.
        batches: the batches from the step of `state` on.
        total_steps: steps in all, those already in `state` included.
        on_log: called with the number of steps done and the metrics of the last of them as
            floats, every `log_every` steps and after the last.
        log_every: steps between logs. Only these wait for the device.

    Raises:
        FloatingPointError: at a log, the loss or the gradient was not finite.
        ValueError: `batches` ended early.
    """
    start = int(state["step"])
    for done in range(start + 1, total_steps + 1):
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError(
                f"the batches ended after step {done - 1} of {total_steps}; expected one per step"
            ) from None
        state, metrics = step(state, batch)
        if done % log_every == 0 or done == total_steps:
            values = {name: float(value) for name, value in metrics.items()}
            check_finite(done, values)
            if on_log:
                on_log(done, values)
    return state


def check_finite(step: int, metrics: dict[str, float]) -> None:
    """Raises FloatingPointError, with the step and the metric, if training has diverged."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(
                f"{name} is {metrics[name]} at step {step}: training has diverged. Lower the "
                "learning rate, lengthen the warm-up, or look for bad values in the data"
            )
