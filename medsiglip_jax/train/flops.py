"""Floating-point operations, counted from the parameter tree.

Only matrix products count, 2 m n k each, which are 99 % of the operations. The compiler counts the
body of a loop once, however often it runs: of a scanned tower it misses all blocks but one.
"""

import re
from dataclasses import dataclass
from typing import Any

from medsiglip_jax.model import tree
from medsiglip_jax.model.attention import RECOMPUTES, used_in
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.train.recipe import Recipe

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
        model: those of the forward and the backward pass.
        recomputed: those of what is recomputed to save memory (remat, accumulation).
    """

    model: float
    recomputed: float


def of_embedding(config: ModelConfig, params: Any, images: int) -> Flops:
    """Operations to embed so many images with `params`, arrays or shapes."""
    flat = tree.flatten({"img": params["img"]})
    return Flops(images * (_products(config, flat) + _attention(config, flat)), 0.0)


def of_step(
    recipe: Recipe, config: ModelConfig, trained: Any, frozen: Any, attention: str
) -> Flops:
    """Operations of one train step.

    Args:
        recipe: the run.
        config: of its model.
        trained: the parameters that train, or their shapes.
        frozen: the other parameters.
        attention: back end of the attention.
    """
    objective, flat = recipe.objective, tree.flatten(trained) | tree.flatten(frozen)
    unused = objective.unused(tree.unflatten(flat))
    used_paths = {p: x for p, x in flat.items() if not any(re.fullmatch(r, p) for r in unused)}
    trains = tree.flatten(trained).keys()
    forward = backward = recomputed = 0.0
    for tower in ("img", "txt"):  # what an objective adds stands on the image tower
        paths = {p: x for p, x in used_paths.items() if p.startswith("txt/") == (tower == "txt")}
        # The share of its forward pass that the attention's own backward pass repeats.
        sizes = config.text if tower == "txt" else config.vision
        share = RECOMPUTES.get(used_in(sizes, attention, recipe.dtype), 0.0) if sizes else 0.0
        flows = False
        for stage in range(len(_STAGES)):
            here = {p: x for p, x in paths.items() if _stage(p) == stage}
            attention_forward = _attention(config, here)
            stage_forward = _products(config, here) + attention_forward
            forward += stage_forward
            weights = {p: x for p, x in here.items() if p in trains}
            backward += _products(config, weights)
            # The carry of a scan has a gradient as soon as one block has.
            flows = flows or bool(weights and stage in _BLOCKS)
            if flows:
                backward += stage_forward + attention_forward
            if flows and stage in _BLOCKS:
                recomputed += (share + (recipe.remat != "none")) * attention_forward
                if recipe.remat == "block":  # "dots" keeps the products with kernels
                    kernels = {p: x for p, x in here.items() if not _LAST.fullmatch(p)}
                    recomputed += _products(config, kernels)
            flows = flows or bool(weights)
    if objective.accumulate > 1 and objective.negatives == "batch":
        recomputed += forward  # for the gradients of the pieces, which share their negatives
    loss, rows = objective.loss_flops(config, recipe.batch_size), recipe.batch_size
    return Flops(rows * (forward + backward) + loss, rows * recomputed)


def _stage(path: str) -> int:
    return next(i for i, regex in enumerate(_STAGES) if re.fullmatch(regex, path))


def _products(config: ModelConfig, paths: dict[str, Any]) -> float:
    """Operations of one example with the kernels among `paths`."""
    products = (
        2.0 * x.size * (1 if _ONE_TOKEN.fullmatch(path) else _tokens(config, path))
        for path, x in paths.items()
        if _PRODUCT.fullmatch(path)
    )
    return sum(products, start=0.0)


def _attention(config: ModelConfig, paths: dict[str, Any]) -> float:
    """Operations of one example for the attention logits and the weighted sums of values."""
    total = 0.0
    for path, x in paths.items():
        if path.endswith("/query/kernel"):
            in_block, n = _stage(path) in _BLOCKS, _tokens(config, path)
            depth, *_, heads, size = x.shape if in_block else (1, *x.shape)
            total += 4.0 * depth * (n if in_block else 1) * n * heads * size
    return total


def _tokens(config: ModelConfig, path: str) -> int:
    """Of the tower that a path lies in, or of one that is named."""
    if path.split("/")[0] == "txt":
        return config.text.context_length if config.text else 0
    return config.vision.num_tokens if config.vision else 0
