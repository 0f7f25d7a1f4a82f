"""Random weights: the named architecture, the distributions of flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import assert_close

import medsiglip_jax
from medsiglip_jax.model import config, towers, tree
from medsiglip_jax.model.weights import random


def test_init_is_the_named_architecture():
    assert tree.size(towers.param_shapes(config.named("so400m-448"))) == 878_300_338
    tiny = medsiglip_jax.init("tiny-56", seed=1)
    assert not np.array_equal(
        tiny.params["img"]["pos_embedding"],
        medsiglip_jax.init("tiny-56", seed=2).params["img"]["pos_embedding"],
    )
    assert tiny.params["t"].shape == tiny.params["b"].shape == (1,)
    assert_close(jnp.exp(tiny.params["t"]), 10, terms=3)  # log(10), its logarithm and exp: 2.3 + 1


def test_random_weights_are_distributed_as_flax_initialises_them():
    """Against the modules' own initialisers where flax has them; seeds alone decide."""
    from flax import linen as nn

    architecture = config.two_towers(
        image_size=64, patch_size=8, width=128, depth=2, mlp_dim=256, num_heads=4, vocab_size=500
    )
    flat = tree.flatten(random.init_params(architecture, seed=0))
    key = jax.random.key(0)
    block = "img/Transformer/encoderblock"
    cases = {
        f"{block}/MlpBlock_0/Dense_0/kernel": nn.initializers.xavier_uniform()(key, (128, 256)),
        f"{block}/MultiHeadDotProductAttention_0/query/kernel":
            nn.initializers.xavier_uniform()(key, (128, 128)),
        f"{block}/MultiHeadDotProductAttention_0/out/kernel":
            nn.initializers.xavier_uniform()(key, (128, 128)),
        "img/embedding/kernel": nn.initializers.lecun_normal()(key, (8, 8, 3, 128)),
        "txt/head/kernel": nn.initializers.lecun_normal()(key, (128, 128)),
        "txt/Embed_0/embedding": nn.linear.default_embed_init(key, (500, 128)),
    }  # fmt: skip
    for path, want in cases.items():
        assert flat[path].std() == pytest.approx(float(want.std()), rel=0.05), path
        assert np.abs(flat[path]).max() == pytest.approx(float(np.abs(want).max()), rel=0.2), path
    again = tree.flatten(random.init_params(architecture, seed=0))
    assert all(np.array_equal(flat[path], again[path]) for path in flat)
    assert (flat[f"{block}/LayerNorm_0/scale"] == 1).all()
    layers = flat[f"{block}/MlpBlock_0/Dense_0/kernel"]
    assert not np.array_equal(layers[0], layers[1])
