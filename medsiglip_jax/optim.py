"""The optimiser: AdamW with warm-up and cosine decay, and which parameters decay, by path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optax
from jaxtyping import Array, Float

from medsiglip_jax import tree

Params = dict[str, Any]

# big_vision's default (optax.py `wd_mults`): kernels, that of the patch embedding included; not
# biases, LayerNorm, the token embedding, pos_embedding, the probe, t or b.
DECAY_RULES = ((".*/kernel", True), (".*", False))


@dataclass(frozen=True)
class Optimizer:
    """What the train step needs to know of an optimiser, so that only this file knows optax.

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


def adamw(
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float = 1.0,
    decay_rules: Sequence[tuple[str, bool]] = DECAY_RULES,
) -> Optimizer:
    """AdamW as big_vision chains it (optax.py:142-149): clip, Adam, rate, decay, schedule.

    The decay is decoupled as in the AdamW paper (arXiv 1711.05101, algorithm 2): a step shrinks a
    kernel by `weight_decay * schedule(step)`, whatever the rate. optax.adamw and torch multiply it
    by the rate too; a value from there has to be multiplied by its rate to mean the same here.

    Args:
        learning_rate: peak rate, reached after the warm-up.
        total_steps: the schedule is 0 from here on.
        warmup_steps: linear warm-up from 0: with any, the first update changes nothing.
        weight_decay: fraction of a kernel taken off in a step at the peak of the schedule.
        b1: decay of the first moment.
        b2: decay of the second; 0.95 is SigLIP's (arXiv 2303.15343), for large batches stay
            stable with it where 0.999 diverges.
        clip_norm: the gradient is scaled down to this global norm.
        decay_rules: (regex over paths, whether to decay); first match wins.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}, total_steps {total_steps}; expected fewer steps of "
            "warm-up than in total"
        )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else 1.0, 1.0, warmup_steps, total_steps
    )
    chain: Any = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1, b2),
        optax.scale(learning_rate),
        optax.add_decayed_weights(weight_decay, mask=partial(select, decay_rules)),
        optax.scale_by_schedule(schedule),
        optax.scale(-1.0),
    )
    return Optimizer(chain.init, chain.update, lambda step: learning_rate * schedule(step))


def select(rules: Sequence[tuple[str, Any]], params: Params) -> Params:
    """The tree of values that `rules` give to the paths of `params`."""
    return tree.unflatten(tree.match(rules, list(tree.flatten(params))))


def global_norm(gradients: Params) -> Float[Array, ""]:
    """L2 norm over all leaves together."""
    return optax.tree.norm(gradients)
