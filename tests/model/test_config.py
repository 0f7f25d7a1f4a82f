"""Architectures: sizes that fit together, by name or from a file."""

import dataclasses

import pytest

from medsiglip_jax.model import config

TINY = config.named("tiny-56")


@pytest.mark.parametrize("change, say", [
    (dict(width=50), "divisible"),
    (dict(depth=0), "positive integer"),
    (dict(pool="max"), "'map' or 'mean'"),
    (dict(image_size=3), "smaller than patch_size"),
])  # fmt: skip
def test_wrong_architectures(change, say):
    with pytest.raises(ValueError, match=say):
        dataclasses.replace(TINY.vision, **change)


def test_towers_must_embed_into_one_space():
    with pytest.raises(ValueError, match="same space"):
        config.ModelConfig(TINY.vision, dataclasses.replace(TINY.text, embed_dim=40))
    with pytest.raises(ValueError, match="neither"):
        config.ModelConfig(None, None)


def test_config_round_trip():
    for made in config.NAMED.values():
        assert config.ModelConfig.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match="vision has no key widht .did you mean width"):
        config.ModelConfig.from_dict({"vision": {"widht": 3}, "text": None})
