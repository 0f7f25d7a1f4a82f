"""The reference implementation (transformers on CPU torch, float32), with weights worth testing."""

from pathlib import Path
from typing import Any

import numpy as np

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
