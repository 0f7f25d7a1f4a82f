"""AdamW and Adafactor as big_vision chains them, schedules, and what decays, by path."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from medsiglip_jax.model import tree
from medsiglip_jax.train import freeze

Params = dict[str, Any]
Schedule = Callable[[Any], Any]

# big_vision's default (optax.py `wd_mults`): kernels, that of the patch embedding included; not
# biases, LayerNorm, the token embedding, pos_embedding, the probe, t, b or LoRA's a and b.
DECAY_RULES = ((".*/kernel", True), (".*", False))


@dataclass(frozen=True)
class Optimizer:
    """What the train step needs to know of an optimiser, so that only this file knows optax.

    The parameters may be any part of a model's tree: what is absent has no state, and its gradient
    does not count for the clipping.

    Attributes:
        init: params -> opt_state.
        update: (gradients, opt_state, params) -> (updates to add to params, opt_state).
        learning_rate: step, from 0 -> the rate of the update made in that step.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params], tuple[Params, Any]]
    learning_rate: Callable[[Any], Any]

    def apply(self, params: Params, gradients: Params, opt_state: Any) -> tuple[Params, Any]:
        """Returns the parameters after one update, each in its own dtype, and the new state."""
        updates, opt_state = self.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state  # pyright: ignore[reportReturnType]


# ------------------------------------------------------------------------------- schedules

# progress in [0, 1] between warm-up and end -> multiplier; rsqrt counts steps instead.
_DECAYS = {
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": jnp.ones_like,
}
_TIMESCALE = 10_000  # of rsqrt, in steps
SCHEDULES = (*_DECAYS, "rsqrt")
OPTIMIZERS = ("adamw", "adafactor")


def schedule(
    kind: str, total_steps: int, warmup_steps: int = 0, cooldown_steps: int = 0
) -> Schedule:
    """Returns step -> the float32 multiplier of the peak rate (big_vision utils.py:1070-1143).

    Steps count from 0: with a warm-up, the first update changes nothing.

    Args:
        kind: "cosine" and "linear" fall to 0 at `total_steps`; "rsqrt" is
            1 / sqrt(1 + steps since the warm-up / 10,000); "constant" is 1.
        total_steps: updates in all.
        warmup_steps: the multiplier rises linearly over them, and the decay starts after them.
        cooldown_steps: over these last steps it falls linearly to 0, on top of the decay.

    Raises:
        ValueError: an unknown kind, or warm-up and cool-down that do not fit into the run.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule is {kind!r}; expected one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}, total_steps {total_steps}; expected fewer steps of "
            "warm-up than in total"
        )
    if not 0 <= cooldown_steps <= total_steps - warmup_steps:
        raise ValueError(
            f"cooldown_steps is {cooldown_steps}; expected at most the "
            f"{total_steps - warmup_steps} steps that the warm-up leaves"
        )

    def multiplier(step):
        step = jnp.asarray(step, jnp.float32)
        since = jnp.maximum(step - warmup_steps, 0)
        if kind == "rsqrt":
            value = 1 / jnp.sqrt(1 + since / _TIMESCALE)
        else:
            value = _DECAYS[kind](jnp.minimum(since / (total_steps - warmup_steps), 1))
        if warmup_steps:
            value *= jnp.minimum(step / warmup_steps, 1)
        if cooldown_steps:
            value *= jnp.clip((total_steps - step) / cooldown_steps, 0, 1)
        return value

    return multiplier


# ------------------------------------------------------------------------------ optimisers


def adamw(
    learning_rate: float,
    schedule: Schedule,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float | None = 1.0,
    rates: Params | None = None,
) -> Optimizer:
    """AdamW as big_vision chains it (optax.py:142-149): clip, Adam, rates, decay, schedule.

    The decay is decoupled as in the AdamW paper (arXiv 1711.05101, algorithm 2): a step shrinks a
    kernel by `weight_decay * schedule(step)`, whatever `learning_rate` and `rates` are.
    optax.adamw and torch multiply it by the rate too; a value from there has to be multiplied by
    its rate to mean the same here.

    Args:
        learning_rate: rate where the schedule is 1.
        schedule: step, from 0 -> multiplier of the whole update.
        weight_decay: fraction of a kernel taken off in a step where the schedule is 1.
        b1: decay of the first moment.
        b2: decay of the second; 0.95 is SigLIP's (arXiv 2303.15343), for large batches stay
            stable with it where 0.999 diverges.
        clip_norm: the gradient is scaled down to this global norm; None leaves it alone.
        rates: multipliers of the rate in the structure of the parameters, each a number or, for
            a stack of layers, a vector along axis 0; None: all 1. A rate of 0 does not freeze,
            for the decay goes on.
    """
    direction = _scale_by_adam(b1, b2)
    return _chain(direction, learning_rate, schedule, weight_decay, clip_norm, rates)


def adafactor(
    learning_rate: float,
    schedule: Schedule,
    *,
    weight_decay: float = 0.0,
    beta2_cap: float = 0.999,
    momentum: float = 0.9,
    clip_norm: float | None = 1.0,
    rates: Params | None = None,
) -> Optimizer:
    """Adafactor as in big_vision (optax.py:187-214), chained as `adamw`: half a float per weight.

    Second moments are factored (arXiv 1804.04235) over the two largest axes of a parameter where
    both have at least 32 entries, and decay by min(beta2_cap, 1 - t**-0.8) in the t-th update.
    Neither updates are clipped nor rates scaled by the parameter's size. The layer axis of a
    stack is never factored, so that each layer is treated as big_vision's unstacked one.

    Args:
        learning_rate, schedule, weight_decay, clip_norm, rates: as of `adamw`.
        beta2_cap: upper bound on the decay of the second moments; 0.95 is SigLIP's.
        momentum: decay of the average of the updates, which is kept in bfloat16 and not debiased:
            the first update is a tenth of what it becomes. 0: none.
    """
    # optax.ema multiplies the bfloat16 average by a bfloat16 0.9, which is 0.8984, and so does
    # big_vision: a constant gradient's update settles at 0.985 of its size.
    average = optax.ema(momentum, debias=False, accumulator_dtype=jnp.bfloat16)
    rms = _scale_by_factored_rms(beta2_cap)
    direction = optax.chain(rms, average if momentum else optax.identity())
    return _chain(direction, learning_rate, schedule, weight_decay, clip_norm, rates)


def _chain(
    direction: Any,
    learning_rate: float,
    schedule: Schedule,
    weight_decay: float,
    clip_norm: float | None,
    rates: Params | None,
) -> Optimizer:
    chain: Any = optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        direction,
        optax.scale(learning_rate),
        optax.identity() if rates is None else _scale_by_rates(rates),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_schedule(schedule),
        optax.scale(-1.0),
    )
    return Optimizer(chain.init, chain.update, lambda step: learning_rate * schedule(step))


def _scale_by_adam(b1: float, b2: float, eps: float = 1e-8) -> Any:
    """Adam's direction (arXiv 1412.6980, algorithm 1).

    optax.scale_by_adam takes 1 - b2**t from a rounded b2, which at b2 = 0.999 moves the first
    updates by 1e-5 of their size.
    """

    def init(params):
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, updates, state.nu)
        mass1, mass2 = _weights_so_far(b1, count), _weights_so_far(b2, count)
        updates = jax.tree.map(lambda m, v: m / mass1 / (jnp.sqrt(v / mass2) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _weights_so_far(decay: float, count: Any) -> Any:
    """1 - decay**count without cancellation: the weights that a moving average holds."""
    return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))


def _scale_by_factored_rms(beta2_cap: float) -> Any:
    """optax's, by big_vision's numbers, for each layer of a stack on its own.

    Its state is optax's too, of trees in the structure of the parameters.
    """
    rms = optax.scale_by_factored_rms(
        min_dim_size_to_factor=32,  # 128 would leave attention kernels, (1152, 16, 72), whole
        epsilon=1e-30,
        decay_rate_fn=lambda step, _: jnp.minimum(beta2_cap, 1 - (step + 1.0) ** -0.8),
    )

    def init(params):
        states = jax.tree.map_with_path(lambda path, p: _per_layer(path, rms.init)(p), params)
        return jax.tree.transpose(jax.tree.structure(params), None, states)

    def update(updates, state, params=None):
        def update_leaf(path, gradient, param, *moments):
            moments = optax.FactoredState(*moments)
            return _per_layer(path, rms.update)(gradient, moments, param)

        pairs = jax.tree.map_with_path(update_leaf, updates, params, *state)
        return jax.tree.transpose(jax.tree.structure(updates), None, pairs)

    return optax.GradientTransformation(init, update)


def _per_layer(path: Any, function: Callable) -> Callable:
    # Blocks below a cut may train in part, as their biases do when only kernels are frozen.
    stacked = any(stack in _name(path) for stack in (tree.STACK, freeze.FROZEN_STACK))
    return jax.vmap(function) if stacked else function


# ------------------------------------------------------------------------------ by parameter


def _scale_by_rates(rates: Params) -> Any:
    def scale(path, update, rate):
        rate = jnp.asarray(rate, update.dtype)
        if rate.shape not in ((), update.shape[:1]):
            raise ValueError(
                f"the rate of {_name(path)} has shape {rate.shape}, the parameter {update.shape}; "
                f"expected a number or one per layer, shape {update.shape[:1]}"
            )
        return update * rate.reshape(rate.shape + (1,) * (update.ndim - rate.ndim))

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, updates, rates))


def decay_mask(params: Params) -> Params:
    """What decays by `DECAY_RULES`: bools in the structure of `params`, which may be partial."""

    def decays(path, _):
        return next(value for regex, value in DECAY_RULES if re.fullmatch(regex, _name(path)))

    return jax.tree.map_with_path(decays, params)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def global_norm(gradients: Params) -> Float[Array, ""]:
    """L2 norm over all leaves together."""
    return optax.tree.norm(gradients)
