"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the kernels of attention and MLP blocks.

The adapter of ".../query/kernel" is ".../query_lora/{a,b,scale}": the layer's output gains
scale * x @ a @ b. `b` starts at zero, so that training starts at the model given.
"""

import re
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medsiglip_jax.files import storage
from medsiglip_jax.files.places import Place
from medsiglip_jax.model import processes, tree
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.weights import peft, processors

Params = dict[str, Any]

# How many of a kernel's axes, after that of the stack, are the layer's input.
_INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "Dense_0": 1, "Dense_1": 1}
_LAYER = re.compile(rf".*/({'|'.join(_INPUT_AXES)})/kernel")


@dataclass(frozen=True)
class LoRA:
    """Which layers get adapters, and how large these are.

    Attributes:
        rank: inner size of an adapter.
        alpha: the output of an adapter is scaled by alpha / rank.
        targets: regexes over the paths of the kernels that get an adapter.
        train: regexes over the paths of parameters that train in full beside the adapters.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = (r".*/encoderblock/.*/(query|key|value|out|Dense_0|Dense_1)/kernel",)
    train: tuple[str, ...] = ("t", "b")

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; expected at least 1")

    def frozen(self, params: Params) -> tuple[str, ...]:
        """Regexes for `freeze.partition`: everything but the adapters and `train`.

        Raises:
            ValueError: a pattern of `train` matches nothing.
        """
        paths = list(tree.flatten(params))
        tree.match([*((pattern, True) for pattern in self.train), (".*", False)], paths)
        keep = "|".join([r".*_lora/[ab]", *self.train])
        return (rf"(?!(?:{keep})$).*",)


def init(config: LoRA, params: Params, seed: int = 0) -> Params:
    """The tree of adapters for `params`, float32, `a` normal / sqrt(fan-in), `b` zero.

    Each is drawn from (seed, path) alone.

    Raises:
        ValueError: a target matches nothing, or a parameter that can have no adapter.
    """
    flat = tree.flatten(params)
    chosen = tree.match([*((t, True) for t in config.targets), (".*", False)], list(flat))
    targets = [path for path, yes in chosen.items() if yes]
    if wrong := [path for path in targets if not _LAYER.fullmatch(path)]:
        raise ValueError(
            f"lora.targets match {wrong[0]}; expected kernels of {', '.join(_INPUT_AXES)} layers"
        )
    adapters = {}
    for path in targets:
        stack, n, m = _sizes(path, flat[path].shape)
        rng = np.random.default_rng((seed, zlib.crc32(path.encode())))
        a = rng.normal(size=(*stack, n, config.rank), scale=n**-0.5).astype(np.float32)
        name = path.removesuffix("/kernel") + "_lora"
        adapters[f"{name}/a"] = jnp.asarray(a)
        adapters[f"{name}/b"] = jnp.zeros((*stack, config.rank, m), jnp.float32)
        adapters[f"{name}/scale"] = jnp.full(stack, config.alpha / config.rank, jnp.float32)
    return tree.unflatten(adapters)


def merge(params: Params) -> Params:
    """Adds every adapter in the tree to its kernel: the same model without adapters."""
    flat = tree.flatten(params)
    for name in [path.removesuffix("_lora/a") for path in flat if path.endswith("_lora/a")]:
        a, b, scale = (flat.pop(f"{name}_lora/{key}") for key in ("a", "b", "scale"))
        kernel = flat[f"{name}/kernel"]
        with jax.default_matmul_precision("highest"):
            change = scale[..., None, None] * (a @ b)
        flat[f"{name}/kernel"] = (kernel + change.reshape(kernel.shape)).astype(kernel.dtype)
    return tree.unflatten(flat)


def export(
    config: LoRA,
    params: Params,
    trained: Collection[str],
    architecture: ModelConfig,
    base: str,
    folder: Place,
) -> None:
    """Writes the adapters for PEFT, and whatever else of the model was trained.

    Args:
        config: which adapters there are.
        params: the model with its adapters.
        trained: the paths of what is not as in the base.
        architecture: that of the model.
        base: what the adapters are for, as the run named it.
        folder: a new folder; one that exists is replaced.
    """
    factors, rest = _split(params, peft.adapts)
    changed = [p for p in rest if {p, f"{p.removesuffix('/kernel')}_lora/a"} & {*trained}]
    others = {path: rest[path] for path in peft.together(changed, architecture)}
    factors, others = jax.tree.map(np.asarray, processes.gathered((factors, others)))
    if jax.process_index():
        return
    settings = dict(base_model_name_or_path=base, r=config.rank, lora_alpha=config.alpha)
    with storage.new_folder(folder, overwrite=True, marker=peft.CONFIG) as partial:
        peft.write_folder(partial, factors, others, architecture, settings)
        # The adapter alone is no classifier, even if its export is one.
        alone = replace(architecture, classifier=None, preparation=architecture.trained)
        processors.write_preparation(partial, alone)


def _split(
    params: Params, apart: Callable[[str], bool]
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], dict[str, jax.Array]]:
    """The adapters of kernels whose paths are to be `apart`, path -> (a, b), without these kernels;
    and all other parameters, path -> array, with their adapters merged."""
    flat, factors = tree.flatten(params), {}
    for name in [path.removesuffix("_lora/a") for path in flat if path.endswith("_lora/a")]:
        if apart(f"{name}/kernel"):
            factors[f"{name}/kernel"] = flat.pop(f"{name}_lora/a"), flat.pop(f"{name}_lora/b")
            del flat[f"{name}_lora/scale"], flat[f"{name}/kernel"]
    return factors, tree.flatten(merge(tree.unflatten(flat)))


def _sizes(path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """(leading axes of the stack, inputs, outputs) of a kernel."""
    stack = tuple(shape[:1]) if tree.STACK in path else ()
    layer = shape[len(stack) :]
    axes = _INPUT_AXES[path.split("/")[-2]]
    return stack, int(np.prod(layer[:axes])), int(np.prod(layer[axes:]))
