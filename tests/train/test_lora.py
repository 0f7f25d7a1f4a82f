"""Adapters that leave here: peft and we load the same model from the folder."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import references

import medsiglip_jax
from medsiglip_jax.model import api, tree
from medsiglip_jax.model.config import ModelConfig, Preparation
from medsiglip_jax.train import freeze, lora

TARGETS = ".*/(query|out|Dense_0)/kernel"  # also of the pooling head, whose attention is one tensor
TRAIN = ("t", "img/.*/bias", "img/pos_embedding", "txt/head/.*")


def trained(tmp_path, config, train):
    """Writes a base and the adapter of a run whose parameters have all moved; and the run's own."""
    model = medsiglip_jax.init(config, seed=1)
    medsiglip_jax.save(model, tmp_path / "base")
    settings = lora.LoRA(rank=3, alpha=5.0, targets=(TARGETS,), train=train)
    params = freeze.join(model.params, lora.init(settings, model.params))
    part = freeze.partition(settings.frozen(params), params)
    moving, frozen = part.split(params)
    rng = np.random.default_rng(0)
    moving = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), moving)
    whole, paths = part.whole(freeze.join(moving, frozen)), set(tree.flatten(moving))
    config = dataclasses.replace(config, preparation=Preparation("serving"))
    lora.export(settings, whole, paths, config, str(tmp_path / "base"), tmp_path / "adapter")
    return lora.merge(whole)


@pytest.mark.float
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("towers", ["both", "image"])
def test_an_adapter_is_the_model_that_was_trained(tmp_path, towers):
    config, train = references.SMALL, TRAIN
    if towers == "image":
        config, train = ModelConfig(config.vision, None), TRAIN[1:3]
    want = trained(tmp_path, config, train)
    ours = medsiglip_jax.load(tmp_path / "adapter")
    assert ours.config == dataclasses.replace(config, preparation=Preparation("serving"))
    for path, leaf in tree.items(want):
        got = tree.flatten(ours.params)[path]
        references.assert_close(got, leaf, terms=3, largest=1)

    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = transformers.SiglipModel if config.text else transformers.SiglipVisionModel
    base = kind.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval().get_base_model()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    values = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        tower = theirs.vision_model if config.text else theirs
        z = tower(pixel_values=values).pooler_output.numpy()
        if config.text:
            np.testing.assert_array_equal(theirs.logit_scale.numpy(), want["t"])
    model = api.Model(want, config)
    terms = references.model_terms(config)
    references.assert_close(model.encode_image(pixels, normalize=False), z, terms)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="base of this adapter is not there"):
        medsiglip_jax.load(tmp_path / "adapter")
