"""Floating-point operations, counted from the parameter tree.

Only matrix products count, 2 m n k each, which are 99 % of the operations. The compiler counts the
body of a loop once, however often it runs: of a scanned tower it misses all blocks but one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medsiglip_jax.model import tree
from medsiglip_jax.model.attention import RECOMPUTES, used
from medsiglip_jax.model.config import ModelConfig

# The stages of a forward pass, from the bottom up. A gradient passes them in the other direction,
# down to the first one that trains.
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
# The result of a block's last product is not needed in the backward pass, nor recomputed.
_LAST = re.compile(r".*/Dense_1/kernel|.*/Dense_1_lora/b")


@dataclass(frozen=True)
class Flops:
    """Operations over all devices.

    Attributes:
        model: of the forward and the backward pass.
        recomputed: of what is computed a second time to save memory (remat, accumulation).
    """

    model: float
    recomputed: float


def of_embedding(config: ModelConfig, params: Any, images: int) -> Flops:
    """Operations to embed so many images with `params`, arrays or shapes."""
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
    """Operations of one train step.

    Args:
        config: of the model.
        trained: the parameters that train, or their shapes.
        frozen: the other parameters.
        batch_size: examples of the step.
        attention: back end of the attention.
        dtype: of the arithmetic.
        remat: what is recomputed to save memory, see `towers.REMAT`.
        unused: regexes of parameters that the loss does not depend on.
        loss: operations of the step after the towers and heads.
        encoded_twice: whether the forward pass runs again for the gradients, as it does when the
            pieces of a batch share their negatives.
    """
    used_paths = {
        path: x
        for path, x in (tree.flatten(trained) | tree.flatten(frozen)).items()
        if not any(re.fullmatch(regex, path) for regex in unused)
    }
    trains = tree.flatten(trained).keys()
    forward = backward = recomputed = 0.0
    for tower in ("img", "txt"):  # what an objective adds stands on the image tower
        paths = {p: x for p, x in used_paths.items() if p.startswith("txt/") == (tower == "txt")}
        share = RECOMPUTES.get(used(attention, _length(config, tower), dtype), 0.0)
        flows = False
        for stage in range(len(_STAGES)):
            stage_forward = _forward(config, paths, stage)
            forward += stage_forward
            weights = {p: x for p, x in paths.items() if p in trains and _stage(p) == stage}
            backward += _products(config, weights, stage)
            # The carry of a scan has a gradient as soon as one block has.
            flows = flows or bool(weights and stage in _BLOCKS)
            if flows:
                backward += stage_forward + _attention(config, paths, stage)
                recomputed += _recomputed(config, paths, stage, remat, share)
            flows = flows or bool(weights)
    recomputed += forward if encoded_twice else 0.0
    return Flops(batch_size * (forward + backward) + loss, batch_size * recomputed)


def _stage(path: str) -> int:
    return next(i for i, regex in enumerate(_STAGES) if re.fullmatch(regex, path))


def _forward(config: ModelConfig, paths: dict[str, Any], stage: int) -> float:
    return _products(config, paths, stage) + _attention(config, paths, stage)


def _products(config: ModelConfig, paths: dict[str, Any], stage: int) -> float:
    """Operations of one example with the kernels among `paths`."""
    products = (
        2.0 * x.size * (1 if _ONE_TOKEN.fullmatch(path) else _tokens(config, path))
        for path, x in paths.items()
        if _PRODUCT.fullmatch(path) and _stage(path) == stage
    )
    return sum(products, start=0.0)


def _attention(config: ModelConfig, paths: dict[str, Any], stage: int) -> float:
    """Operations of one example for the attention logits and the weighted sums of values."""
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
    """Operations recomputed because of `remat`, and by the attention's own backward pass, which
    repeats the given share of its forward pass."""
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
