"""What the tests compare with: the reference implementation (transformers on CPU torch, float32),
with weights worth testing, and how close its numbers can be.

Weights, pixels and tokens are compared in bytes, and so is what one program computes twice on one
machine. What two programs or two processors compute in floats is compared with `assert_close`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from medsiglip_jax.model import config

# The architecture of the fixture `checkpoint`, whose tokenizer learns 22 pieces.
SMALL = config.two_towers(
    image_size=28, patch_size=14, width=16, depth=1, mlp_dim=16, num_heads=2, vocab_size=22
)
TINY = dict(
    vision=dict(image_size=42, patch_size=14),
    text=dict(vocab_size=64),
    both=dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    ),
)  # fmt: skip
SO400M = dict(
    vision=dict(image_size=448, patch_size=14),
    text=dict(vocab_size=32000),
    both=dict(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16
    ),
)  # fmt: skip


def rounding(terms: int, largest: float = 1.0, dtype: Any = np.float32) -> float:
    """How far apart two right computations of one number may lie: the tolerance of every test here.

    Processors and libraries differ in the order of their sums and in whether they fuse a product
    with its sum, so in nothing but roundings. Each is at most eps / 2 of the `largest` number that
    is rounded on the way. A number that comes from sums of together `terms` terms has been rounded
    about `terms` times in either computation, and

    - if all of these go one way, the two differ by terms * eps * largest: the bound;
    - as a rule they go either way, evenly within their half eps. Their sum then has the standard
      deviation sqrt(terms / 12) * eps * largest, the difference of two sqrt(2) times that, and the
      largest of 100,000 such differences is 4.5 of those: 1.8 * sqrt(terms) * eps * largest.

    Twice the latter is allowed, and never more than the bound: min(terms, 4 * sqrt(terms)) * eps *
    largest. With 1,000 terms in float32 these are 1.5e-5 of the largest number. What a test should
    find is larger: products of TF32 or bfloat16 are off by 5e-4 or 4e-3, a wrong formula by more.

    Args:
        terms: the lengths of the sums that the number comes from, added up; a function of one
            element counts as one. `tower_terms` knows those of a model.
        largest: the largest magnitude on the way, in the units of the number that is compared.
        dtype: the floats that were computed with.
    """
    return min(terms, 4 * math.sqrt(terms)) * float(np.finfo(dtype).eps) * float(largest)


def assert_close(got, want, terms: int, largest: float | None = None, dtype: Any = np.float32):
    """Equal but for `rounding`; `largest` is of `want` unless larger numbers cancel on the way."""
    want = np.asarray(want, np.float64)
    if largest is None:
        largest = np.abs(want).max(initial=0)
    atol = rounding(terms, largest, dtype)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol)


def tower_terms(tower) -> int:
    """The `terms` of one output of a tower (a `VisionConfig` or a `TextConfig`)."""
    tokens = getattr(tower, "num_tokens", None) or tower.context_length
    norms, kernels = 4 * tower.width, 3 * tower.width + tower.mlp_dim
    block = norms + kernels + tower.width // tower.num_heads + 2 * tokens
    # The patches or the table of embeddings before the blocks, the pooling head after them.
    return 3 * getattr(tower, "patch_size", 1) ** 2 + (tower.depth + 1) * block


def model_terms(model: config.ModelConfig) -> int:
    """Those of the tower with more of them."""
    return max(tower_terms(tower) for tower in (model.vision, model.text) if tower)


def sorted_ranks(queries, targets, query_ids, target_ids):
    """One argsort per query, ties to those that do not match."""
    queries, targets = (x.astype(np.float64) for x in (queries, targets))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    found = []
    for cosines, id in zip((queries @ targets.T).round(7), query_ids, strict=True):
        match = target_ids == id
        order = np.lexsort((match, -cosines))
        found.append(np.flatnonzero(match[order])[0] if match.any() else -1)
    # Matches that come before the best are none, so its place is one more than who is ahead.
    return np.array(found) + 1


def siglip(sizes: dict[str, Any], seed: int = 0):
    """A `transformers.SiglipModel` with random weights, biases and norms included.

    Left at their initial zeros and ones, biases and norms would hide a loader that mixes them up.
    """
    import torch
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(seed)
    config = SiglipConfig(
        vision_config={**sizes["both"], **sizes["vision"]},
        text_config={
            **sizes["both"],
            **sizes["text"],
            "projection_size": sizes["both"]["hidden_size"],
            "bos_token_id": None,
            "eos_token_id": 1,
        },
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_scale.fill_(4.77)  # exp: 118, as the released checkpoints
        model.logit_bias.fill_(-12.7)
    return model


def inputs(sizes: dict[str, Any], images: int, texts: int, seed: int = 0):
    """Random uint8 images and token ids padded with 1, as SigLIP pads."""
    rng = np.random.default_rng(seed)
    side = sizes["vision"]["image_size"]
    pixels = rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    tokens = rng.integers(2, sizes["text"]["vocab_size"], (texts, 64)).astype(np.int32)
    tokens[np.arange(64) >= rng.integers(1, 64, (texts, 1))] = 1
    return pixels, tokens


def run(model, pixels: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings, logits and patch tokens of the reference."""
    import torch

    values = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2)
    with torch.inference_mode():
        out = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=values)
        patches = model.vision_model(pixel_values=values).last_hidden_state
    return {
        "image_embeds": out.image_embeds.numpy(),
        "text_embeds": out.text_embeds.numpy(),
        "logits": out.logits_per_image.numpy(),
        "patches": patches.numpy(),
    }


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
