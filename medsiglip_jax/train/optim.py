"""AdamW and Adafactor as big_vision chains them, schedules, and what decays, by path."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from medsiglip_jax.files.settings import Check, more_than, one_of
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
_FRACTION = Check(lambda x: 0 <= x < 1, "at least 0 and less than 1")


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


def fitting_ramps(total_steps: int, warmup_steps: int, cooldown_steps: int) -> tuple[int, int]:
    """Warm-up and cool-down that fit into a run: as given or, if together they are longer than it,
    at most a tenth of it each."""
    if warmup_steps < total_steps and warmup_steps + cooldown_steps <= total_steps:
        return warmup_steps, cooldown_steps
    return min(warmup_steps, total_steps // 10), min(cooldown_steps, total_steps // 10)


# ------------------------------------------------------------------------------ optimisers


# For large batches SigLIP's b2 of 0.95 (arXiv 2303.15343) is stable where 0.999 diverges.
@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated; see `make_optimizer`.

    Attributes:
        name: "adamw" or "adafactor".
        schedule: of the learning rate: "cosine", "rsqrt", "linear" or "constant".
        warmup_steps: the learning rate rises linearly over the first steps.
        cooldown_steps: the learning rate falls linearly to 0 over the last steps.
        weight_decay: the fraction by which a step at the peak of the schedule shrinks a kernel. It
            is not multiplied by the learning rate; torch's value is ours divided by the rate.
        b1: decay of AdamW's first moment.
        b2: decay of AdamW's second moment; for adafactor the upper bound of that decay.
        clip_norm: the gradient is scaled down to this global norm.
        rates: pairs of a regex over parameter paths and a factor on the learning rate; the first
            match wins.
        layer_decay: factor on the learning rate from each block to the one below it; the
            embeddings are below the first block.
    """

    name: Annotated[str, one_of(OPTIMIZERS)] = "adamw"
    schedule: Annotated[str, one_of(SCHEDULES)] = "cosine"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    weight_decay: float = 0.0
    b1: Annotated[float, _FRACTION] = 0.9
    b2: Annotated[float, _FRACTION] = 0.95
    clip_norm: Annotated[float, more_than(0)] = 1.0
    rates: tuple[tuple[str, float], ...] = ()
    layer_decay: float = 1.0


def make_optimizer(
    learning_rate: float, schedule: Schedule, config: OptimizerConfig, rates: Params | None = None
) -> Optimizer:
    """An optimiser as big_vision chains it (optax.py:142-149): clip, Adam, rates, decay, schedule.

    The decay is decoupled as in the AdamW paper (arXiv 1711.05101, algorithm 2): a step shrinks a
    kernel by `weight_decay * schedule(step)`, whatever `learning_rate` and `rates` are.
    optax.adamw and torch multiply it by the rate too; a value from there has to be multiplied by
    its rate to mean the same here.

    Args:
        learning_rate: rate where the schedule is 1.
        schedule: step, from 0 -> multiplier of the whole update.
        config: of the recipe; `schedule` and `rates` are what its fields of these names stand for.
        rates: multipliers of the rate in the structure of the parameters, each a number or, for
            a stack of layers, a vector along axis 0; None: all 1. A rate of 0 does not freeze,
            for the decay goes on.
    """
    b1, b2 = config.b1, config.b2
    chain: Any = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _adafactor(b2) if config.name == "adafactor" else _scale_by_adam(b1, b2),
        optax.scale(learning_rate),
        optax.identity() if rates is None else _scale_by_rates(rates),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_schedule(schedule),
        optax.scale(-1.0),
    )
    return Optimizer(chain.init, chain.update, lambda step: learning_rate * schedule(step))


def _adafactor(beta2_cap: float) -> Any:
    """Adafactor's direction as in big_vision (optax.py:187-214): half a float per weight.

    Second moments are factored (arXiv 1804.04235) over the two largest axes of a parameter where
    both have at least 32 entries, and decay by min(beta2_cap, 1 - t**-0.8) in the t-th update.
    Neither updates are clipped nor rates scaled by the parameter's size. The layer axis of a
    stack is never factored, so that each layer is treated as big_vision's unstacked one.

    The average of the updates is kept in bfloat16 and not debiased: the first update is a tenth of
    what it becomes. optax.ema multiplies it by a bfloat16 0.9, which is 0.8984, and so does
    big_vision: a constant gradient's update settles at 0.985 of its size.
    """
    average = optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16)
    return optax.chain(_scale_by_factored_rms(beta2_cap), average)


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
