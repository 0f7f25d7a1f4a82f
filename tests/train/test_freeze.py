"""Freezing and adapters: what trains, what stays, and that the model computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import assert_close, model_terms

import medsiglip_jax
from medsiglip_jax.model import towers, tree
from medsiglip_jax.model.config import two_towers
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.train import freeze, lora

CONFIG = two_towers(
    image_size=8, patch_size=4, width=8, depth=3, mlp_dim=16, num_heads=2,
    vocab_size=12, context_length=4,
)  # fmt: skip
TERMS = model_terms(CONFIG)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
TOKENS = np.random.default_rng(1).integers(1, 12, (3, 4), np.int32)


@pytest.fixture(scope="module")
def params():
    return medsiglip_jax.init(CONFIG).params


@jax.jit
def encode(params):
    z, _ = towers.encode_image(params, jnp.asarray(IMAGES), CONFIG)
    return z, towers.encode_text(params, jnp.asarray(TOKENS), CONFIG)


def assert_equal(a, b):
    assert tree.flatten(a).keys() == tree.flatten(b).keys()
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "patterns",
    [(), ("img/.*",), ("img/Transformer/encoderblock_[01]/.*",), (".*/bias", "t"),
     ("txt/(Embed_0|Encoder_0/encoderblock_0).*", ".*/scale")],
)  # fmt: skip
def test_cut_and_joined_it_is_the_same_model(params, patterns):
    part = freeze.partition(patterns, params)
    trainable, frozen = part.split(params)
    joined = freeze.join(trainable, frozen)
    assert tree.size(trainable) + tree.size(frozen) == tree.size(params)
    assert_equal(part.whole(joined), params)
    for got, want in zip(encode(joined), encode(params), strict=True):
        assert_close(got, want, TERMS)


def test_what_is_frozen_is_what_was_said(params):
    trainable, frozen = freeze.partition(
        ("img/Transformer/encoderblock_[01]/.*", "img/embedding/.*"), params
    ).split(params)
    blocks = trainable["img"]["Transformer"]["encoderblock"]
    assert {len(x) for x in jax.tree.leaves(blocks)} == {1}
    assert {len(x) for x in jax.tree.leaves(frozen["img"]["Transformer"]["frozen_blocks"])} == {2}
    assert "embedding" in frozen["img"] and "embedding" not in trainable["img"]
    assert trainable["txt"].keys() == params["txt"].keys() and "txt" not in frozen


def test_the_backward_pass_ends_at_the_cut(params):
    """With two of three blocks frozen the gradient costs less than half of the full one."""
    images = jnp.asarray(IMAGES)

    def flops(patterns):
        trainable, frozen = freeze.partition(patterns, params).split(params)

        def loss(trainable):
            joined = freeze.join(trainable, frozen)
            return towers.encode_image(joined, images, CONFIG)[0].sum()

        jaxpr = str(jax.make_jaxpr(jax.grad(loss))({"img": trainable["img"]}))
        return jaxpr.count("scan[")

    # Forward and backward over the blocks; with a cut, the frozen ones forward only.
    assert flops(()) == 2
    assert flops(("img/(embedding.*|pos_embedding|Transformer/encoderblock_[01]/.*)",)) == 3
    # A trainable embedding below the cut: the gradient has to pass through the frozen blocks.
    assert flops(("img/Transformer/encoderblock_[01]/.*",)) == 4


def test_freezing_that_cannot_be_meant(params):
    with pytest.raises(ValueError, match="match no parameter: 'image/.*'"):
        freeze.partition(("image/.*",), params)
    with pytest.raises(ValueError, match="nothing to train"):
        freeze.partition((".*",), params)
    with pytest.raises(ValueError, match="blocks of img.* that are not the first ones"):
        freeze.partition(("img/Transformer/encoderblock_2/.*",), params)
    with pytest.raises(ValueError, match="or not as many as of the other"):
        freeze.partition(
            ("img/Transformer/encoderblock_0/.*", "img/Transformer/encoderblock_1/.*/bias"), params
        )


def random_adapters(config, params):
    rng = np.random.default_rng(0)
    adapters = lora.init(config, params)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), adapters)


@pytest.mark.float
@pytest.mark.parametrize("targets", [lora.LoRA().targets, (r"img/.*/(query|out)/kernel",)])
def test_merged_adapters_are_the_same_function(params, targets):
    config = lora.LoRA(rank=3, targets=targets)
    adapted = freeze.join(params, random_adapters(config, params))
    merged = lora.merge(adapted)
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()
    changed = 0.0
    for got, want, old in zip(encode(adapted), encode(merged), encode(params), strict=True):
        assert_close(got, want, TERMS)
        changed += float(jnp.abs(want - old).max())
    assert changed > 1e-2


@pytest.mark.float
def test_new_adapters_change_nothing(params):
    adapted = freeze.join(params, lora.init(lora.LoRA(), params))
    for got, want in zip(encode(adapted), encode(params), strict=True):
        assert_close(got, want, TERMS)
    assert_equal(lora.merge(adapted), params)


def test_adapters_are_drawn_by_seed_and_path(params):
    def draw(targets, seed):
        return tree.flatten(lora.init(lora.LoRA(targets=(targets,)), params, seed))

    few, many = draw("txt/.*/query/kernel", 5), draw("txt/.*/(query|key)/kernel", 5)
    assert len(many) == 2 * len(few)
    assert all(np.array_equal(x, many[path]) for path, x in few.items())
    a, b = "txt/Encoder_0/encoderblock/MultiHeadDotProductAttention_0/query_lora/a", "key_lora"
    assert not np.array_equal(many[a], many[a.replace("query_lora", b)])
    assert not np.array_equal(few[a], draw("txt/.*/query/kernel", 6)[a])


def test_only_adapters_train(params):
    config = lora.LoRA(rank=2)
    adapted = freeze.join(params, lora.init(config, params))
    trainable, frozen = freeze.partition(config.frozen(adapted), adapted).split(adapted)
    names = {path.split("/")[-1] for path in tree.flatten(trainable)}
    assert names == {"a", "b", "t"} and "t" not in frozen
    assert tree.size(trainable) < 0.5 * tree.size(frozen)
    assert all("_lora" not in p or p.endswith("scale") for p in tree.flatten(frozen))


@pytest.mark.slow
def test_bfloat16_adapters_compute_in_bfloat16(params):
    half = Compute(dtype="bfloat16", precision="default")
    adapted = freeze.join(params, random_adapters(lora.LoRA(), params))
    z, _ = towers.encode_image(adapted, jnp.asarray(IMAGES), CONFIG, half)
    exact, _ = towers.encode_image(adapted, jnp.asarray(IMAGES), CONFIG)
    cosine = (towers.normalize(z) * towers.normalize(exact)).sum(-1)
    assert float(cosine.min()) > 0.995


def test_targets_without_an_adapter(params):
    with pytest.raises(ValueError, match="img/embedding/kernel; expected kernels of query"):
        lora.init(lora.LoRA(targets=("img/embedding/kernel",)), params)
    with pytest.raises(ValueError, match="match no parameter"):
        lora.init(lora.LoRA(targets=(".*/qeury/kernel",)), params)
    with pytest.raises(ValueError, match="rank is 0"):
        lora.LoRA(rank=0)
