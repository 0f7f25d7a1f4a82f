"""The train step: gradients of an objective, in one piece or several, and one update."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from medsiglip_jax.model import devices, sharding, tree
from medsiglip_jax.train import freeze, optim
from medsiglip_jax.train.objectives.objective import NEGATIVES, Batch, Loss, Params

State = dict[str, Any]
Metrics = dict[str, Any]


def init_state(
    params: Params, optimizer: optim.Optimizer, frozen: Params | None = None, average: bool = False
) -> State:
    """The state before the first step.

    {"params" (what trains), "frozen", "opt_state", "step" (batches seen), "skipped" (updates that
    were not made because loss or gradient was not finite), "skipped_in_row"}, and with `average`
    "ema", the moving average of "params". What is new is created on the devices of its parameter.
    The train step donates the whole state: the arrays of `params` and `frozen` are deleted by the
    first step.
    """
    # No weakly typed leaf (jnp.full without a dtype): the step returns none, and would be compiled
    # again for the second call.
    params = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params)
    init, places = partial(_new_state, optimizer, average), None
    if isinstance(_whole(params), NamedSharding):
        places = _shardings(jax.eval_shape(init, params), params)
    state = jax.jit(init, out_shardings=places)(params)
    return {"params": params, "frozen": frozen or {}, **state}


def state_shapes(
    params: Params, optimizer: optim.Optimizer, frozen: Params, average: bool = False
) -> State:
    """What `init_state` returns, for parameters given as `jax.ShapeDtypeStruct` with shardings."""
    shapes = jax.eval_shape(partial(_new_state, optimizer, average), params)
    state = place_shapes(shapes, _shardings(shapes, params))
    return {"params": params, "frozen": frozen, **state}


def place_shapes(shapes: Any, places: Any) -> Any:
    """Abstract arrays with shardings; `shapes` and `places` are trees of the same structure."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def _new_state(optimizer: optim.Optimizer, average: bool, params: Params) -> State:
    counts = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_row")}
    # Copied, because the step donates the average and the parameters.
    ema = {"ema": jax.tree.map(jnp.copy, params)} if average else {}
    return {"opt_state": optimizer.init(params), **ema, **counts}


def learned(state: State) -> Params:
    """The parameters to evaluate and to export: with their moving average, if there is one, in
    place of those that train."""
    return freeze.join(state.get("ema", state["params"]), state["frozen"])


def _whole(params: Params) -> Sharding:
    """Of what every device of the parameters holds whole."""
    first = jax.tree.leaves(params)[0].sharding
    on_mesh = isinstance(first, NamedSharding)
    return sharding.replicated(first.mesh) if on_mesh else first  # pyright: ignore


def _shardings(state: State, params: Params) -> State:
    """A moment or average is split as its parameter, anything else is whole on every device."""
    flat, whole = tree.flatten(params), _whole(params)

    def sharding_of(keys, leaf):
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        parameter = flat.get("/".join(names[1:]))  # the first is "opt_state" or "ema"
        if parameter is None or parameter.shape != leaf.shape:
            return whole
        return parameter.sharding

    return jax.tree_util.tree_map_with_path(sharding_of, state)


def make_train_step(
    loss: Loss,
    optimizer: optim.Optimizer,
    accumulate: int = 1,
    negatives: str = "batch",
    places: State | None = None,
    ema: float | None = None,
    device: Any = None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Returns the compiled `step(state, batch) -> (state, metrics)`; it donates `state`.

    Metrics are device scalars: `loss`, `grad_norm` (before clipping), `learning_rate`, for a
    contrastive model `temperature` (exp(t)) and `bias` (b), all from before the update, and
    `skipped_in_row`. Where loss or gradient is not finite, only the counts of the state change.

    Args:
        loss: of one of `medsiglip_jax.train.objectives`.
        optimizer: from `medsiglip_jax.train.optim`.
        accumulate: pieces in which the batch is encoded, one after the other.
        negatives: "batch": the loss and its gradient are those of the whole batch (GradCache,
            arXiv 2101.06983: the embeddings of all pieces first, then every piece again with the
            gradient of its embeddings). "piece": the mean of the losses of the pieces, each with
            its own negatives only, in three quarters of the time; for a contrastive loss that is
            another, easier objective.
        places: tree of shardings of the state, so that it comes back with the shardings it had; by
            default the compiler chooses them, and other ones make the step compile twice.
        ema: decay of the moving average in the state; None: the state has none. After n updates it
            is at most n / (9 + n), or short runs would export little but what they started from.
        device: of the kind that it is compiled for; None: what this process computes on.
    """
    if accumulate < 1 or negatives not in NEGATIVES:
        raise ValueError(
            f"accumulate is {accumulate} and negatives {negatives!r}; expected at least 1 and one "
            f"of {', '.join(NEGATIVES)}"
        )
    if accumulate == 1:
        gradients = _gradients
    else:
        gradients = _cached_gradients if negatives == "batch" else _plain_gradients

    options = devices.step_options(device or devices.default())
    compiled = partial(jax.jit, donate_argnums=0, compiler_options=options)

    @partial(compiled, out_shardings=places and (places, None))
    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, frozen = state["params"], state["frozen"]
        value, grads = gradients(loss, params, frozen, batch, accumulate)
        norm = optim.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        new_params, opt_state = optimizer.apply(params, grads, state["opt_state"])
        keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        average = {}
        if ema is not None:
            updates = state["step"] - state["skipped"] + 1
            new = _moved(state["ema"], new_params, jnp.maximum(1 - ema, 9 / (updates + 9)))
            average = {"ema": keep(new, state["ema"])}
        in_row = jnp.where(finite, 0, state["skipped_in_row"] + 1)
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(optimizer.learning_rate(state["step"] - state["skipped"])),
            "skipped_in_row": in_row,
            **_temperature({**frozen, **params}),
        }
        return {
            "params": keep(new_params, params),
            "frozen": frozen,
            "opt_state": keep(opt_state, state["opt_state"]),
            **average,
            "step": state["step"] + 1,
            "skipped": state["skipped"] + ~finite,
            "skipped_in_row": in_row,
        }, metrics

    return step


def _moved(average: Params, params: Params, share: Any) -> Params:
    """The average with a share of the way to the parameters."""
    return jax.tree.map(lambda a, p: a + (share * (p - a)).astype(a.dtype), average, params)


def _temperature(params: Params) -> Metrics:
    if "t" not in params:
        return {}
    return {"temperature": jnp.exp(params["t"]).reshape(()), "bias": params["b"].reshape(())}


# ------------------------------------------------------------------------------- gradients


def _gradients(loss: Loss, params: Params, frozen: Params, batch: Batch, _: int):
    return jax.value_and_grad(lambda p: loss(freeze.join(p, frozen), batch))(params)


def _cached_gradients(loss: Loss, params: Params, frozen: Params, batch: Batch, pieces: int):
    """GradCache: all pieces encoded, the loss of all, then each piece again with the gradient
    (cotangent) of its encoded rows."""

    def encode(params, piece):
        return loss.encode(freeze.join(params, frozen), piece)

    def reduce(params, encoded):
        return loss.reduce(freeze.join(params, frozen), encoded, batch)

    cut = _cut(batch, pieces)
    encoded = jax.lax.map(lambda piece: encode(params, piece), cut)
    encoded = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), encoded)  # uncut
    value, (grads, cotangents) = jax.value_and_grad(reduce, argnums=(0, 1))(params, encoded)

    def add(grads, piece_and_cotangent):
        piece, cotangent = piece_and_cotangent
        _, vjp = jax.vjp(lambda p: encode(p, piece), params)
        return jax.tree.map(jnp.add, grads, vjp(cotangent)[0]), None

    grads, _ = jax.lax.scan(add, grads, (cut, _cut(cotangents, pieces)))
    return value, grads


def _plain_gradients(loss: Loss, params: Params, frozen: Params, batch: Batch, pieces: int):
    def add(total, piece):
        share = piece["mask"].sum() / jnp.maximum(batch["mask"].sum(), 1)
        new = _gradients(loss, params, frozen, piece, 1)
        return jax.tree.map(lambda a, b: a + share * b, total, new), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, _cut(batch, pieces))[0]


def _cut(batch: Batch, pieces: int) -> Batch:
    """[b, …] -> [pieces, b / pieces, …]; every piece has rows of the shard of every device."""

    def cut(x):
        if len(x) % pieces:
            raise ValueError(
                f"a batch of {len(x)} cannot be cut into {pieces} equal pieces; choose a multiple "
                f"of {pieces}"
            )
        return x.reshape(len(x) // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)
