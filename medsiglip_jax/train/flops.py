"""Floating-point operations, counted from the parameter tree.

Only matrix products count, 2 m n k each, which is 99 % of all there is. The compiler's own count
takes the body of a loop once, however often it runs: of a scanned tower all blocks but one are
missing from it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medsiglip_jax.model import tree
from medsiglip_jax.model.attention import RECOMPUTES, used
from medsiglip_jax.model.config import ModelConfig

# What a gradient passes on its way down to the first stage that trains, from the bottom up.
_STAGES = (
    r"(img|txt)/(embedding/.*|Embed_0/.*|pos_embedding)",
    r"(img|txt)/.*/frozen_blocks/.*",
    r"(img|txt)/.*/encoderblock/.*",
    r"(img|txt)/.*/encoder_norm/.*",
    r"img/MAPHead_0/.*|txt/head/.*",
    r"(?!img/|txt/).*",  # t, b and what an objective adds
)
_BLOCKS = (1, 2)
_ONE_TOKEN = re.compile(r"img/MAPHead_0/(?!.*/(key|value)(_lora)?/).*|txt/head/.*|(?!img/|txt/).*")
_PRODUCT = re.compile(r".*/(kernel|a|b)")
# Its result is needed by nothing in the backward pass, and is not computed again.
_LAST = re.compile(r".*/Dense_1/kernel|.*/Dense_1_lora/b")


@dataclass(frozen=True)
class Flops:
    """Of one step over all devices.

    Attributes:
        model: of the forward and the backward pass.
        again: of what is computed a second time to save memory (remat, accumulation).
    """

    model: float
    again: float

    @property
    def total(self) -> float:
        return self.model + self.again


def of_embedding(config: ModelConfig, params: Any, images: int) -> Flops:
    """Of embedding so many images with `params`, arrays or shapes."""
    flat = tree.flatten({"img": params["img"]})
    return Flops(images * sum(_forward(config, flat, stage) for stage in range(len(_STAGES))), 0.0)


def of_step(
    config: ModelConfig,
    trained: Any,
    frozen: Any,
    batch_size: int,
    *,
    attention: str,
    dtype: str = "float32",
    remat: str = "none",
    unused: Sequence[str] = (),
    loss: float = 0.0,
    encoded_twice: bool = False,
) -> Flops:
    """Of one train step.

    Args:
        config: of the model.
        trained: part of the parameters, or shapes.
        frozen: the other part.
        batch_size: examples of the step.
        attention: back end.
        dtype: of the arithmetic.
        remat: what is recomputed to save memory, see `towers.REMAT`.
        unused: regexes of parameters that nothing is computed with.
        loss: FLOPs of a step after the towers and heads.
        encoded_twice: the forward pass runs again for the gradients, as when the pieces of a batch
            share their negatives.
    """
    used_paths = {
        path: x
        for path, x in (tree.flatten(trained) | tree.flatten(frozen)).items()
        if not any(re.fullmatch(regex, path) for regex in unused)
    }
    trains = tree.flatten(trained).keys()
    forward = backward = again = 0.0
    for tower in ("img", "txt"):  # what an objective adds stands on the image tower
        paths = {p: x for p, x in used_paths.items() if p.startswith("txt/") == (tower == "txt")}
        share = RECOMPUTES.get(used(attention, _length(config, tower), dtype), 0.0)
        flows = False
        for stage in range(len(_STAGES)):
            here = _forward(config, paths, stage)
            forward += here
            mine = {p: x for p, x in paths.items() if p in trains and _stage(p) == stage}
            backward += _products(config, mine, stage)
            # The carry of a scan has a gradient as soon as one block has.
            flows = flows or bool(mine and stage in _BLOCKS)
            if flows:
                backward += here + _attention(config, paths, stage)
                again += _recomputed(config, paths, stage, remat, share)
            flows = flows or bool(mine)
    again += forward if encoded_twice else 0.0
    return Flops(batch_size * (forward + backward) + loss, batch_size * again)


def _stage(path: str) -> int:
    return next(i for i, regex in enumerate(_STAGES) if re.fullmatch(regex, path))


def _forward(config: ModelConfig, paths: dict[str, Any], stage: int) -> float:
    mine = {p: x for p, x in paths.items() if _stage(p) == stage}
    return _products(config, mine, stage) + _attention(config, paths, stage)


def _products(config: ModelConfig, paths: dict[str, Any], stage: int) -> float:
    """Of one example with the kernels among `paths`."""
    products = (
        2.0 * x.size * (1 if _ONE_TOKEN.fullmatch(path) else _tokens(config, path))
        for path, x in paths.items()
        if _PRODUCT.fullmatch(path) and _stage(path) == stage
    )
    return sum(products, start=0.0)


def _attention(config: ModelConfig, paths: dict[str, Any], stage: int) -> float:
    """Of one example, of the logits and of the mixture of the values."""
    total = 0.0
    for path, x in paths.items():
        if path.endswith("/query/kernel") and _stage(path) == stage:
            depth, *_, heads, size = x.shape if stage in _BLOCKS else (1, *x.shape)
            n = _tokens(config, path)
            total += 4.0 * depth * (n if stage in _BLOCKS else 1) * n * heads * size
    return total


def _recomputed(
    config: ModelConfig, paths: dict[str, Any], stage: int, remat: str, share: float
) -> float:
    """By `remat`, and by the backward pass of the attention itself, that share of its forward."""
    if stage not in _BLOCKS:
        return 0.0
    attention = (share + (remat != "none")) * _attention(config, paths, stage)
    if remat != "block":  # "dots" keeps the products with kernels
        return attention
    kernels = {p: x for p, x in paths.items() if not _LAST.fullmatch(p)}
    return attention + _products(config, kernels, stage)


def _tokens(config: ModelConfig, path: str) -> int:
    return _length(config, "txt" if path.startswith("txt/") else "img")


def _length(config: ModelConfig, tower: str) -> int:
    if tower == "txt":
        return config.text.context_length if config.text else 0
    return config.vision.num_tokens if config.vision else 0
