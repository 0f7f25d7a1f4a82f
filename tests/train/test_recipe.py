"""Recipes: strict keys, types and values, all problems at once."""

import dataclasses
import json

import pytest

from medsiglip_jax.train import configs, recipe
from medsiglip_jax.train.objectives.contrastive import Contrastive
from medsiglip_jax.train.recipe import from_dict

SMALL = {"data": {"path": "a.csv"}, "total_steps": 3, "init": "somewhere"}


def test_the_defaults():
    found = from_dict(SMALL)
    assert found.data == (recipe.Data("a.csv"),) and found.objective == Contrastive()
    assert found.mesh is None and found.optimizer.name == "adamw"
    assert from_dict(dataclasses.asdict(found)) == found
    assert from_dict(SMALL | {"objective": "classification"}).objective.name == "classification"


@pytest.mark.parametrize("override, say", [
    ("--config.batch_siez=3", r"config has no key batch_siez \(did you mean batch_size\?\); there"),
    ("--config.batch_size=many", "batch_size is 'many'; expected int"),
    ("--config.batch_size=1.5", "batch_size is 1.5; expected int"),
    ("--config.optimizer.name=sgd", "optimizer.name is 'sgd'; expected one of adamw, adafactor"),
    ("--config.optimizer.b3=1", "optimizer has no key b3"),
    ("--config.data.path=3", "data.path is 3; expected str"),
    ("--config.lora=8", "lora is 8; expected a mapping of rank"),
    ("--config.seed", "--config.seed: no value; write"),
    ("--config.seed.x=1", "seed is 0, not a dict"),
    ("--config.init=None", "init is None and model None; expected either init or model"),
    ("--config.validation=1.5", "validation is 1.5; expected a split's name, or a share"),
    ("--config.augment.crop=0.5", "augment.crop is 0.5; expected"),
    ("--config.objective.pool=mean", "objective has no key pool; there are name, accumulate, neg"),
    ("--config.objective={'name': 'classification', 'pool': 'cls'}",
     "objective.pool is 'cls'; expected one of map, mean"),
    ("--config.data=({'path': 'a.csv'}, {'path': 'b.csv', 'weight': 0.0})",
     r"data\[1\].weight is 0.0; expected more than 0"),
    ("--config.data.weight=-1.0", "data.weight is -1.0; expected more than 0"),
    ("--config.dtype=float64", "dtype is 'float64'; expected one of float32, bfloat16"),
])  # fmt: skip
def test_wrong_overrides(override, say):
    with pytest.raises(ValueError, match=say):
        configs.read("contrastive", [override])


def test_all_problems_at_once():
    with pytest.raises(ValueError) as error:
        from_dict({"data": {"pth": "x"}, "steps": 3, "objective": {"nam": "x"}})
    for part in ("data has no key pth", "data lacks path", "no key steps",
                 "objective has no key nam"):  # fmt: skip
        assert part in str(error.value)


def test_every_key_is_described():
    text = recipe.describe()
    for key in ("batch_size (default 32)", "lora.rank (default 16)", "data.group", "mesh.fsdp",
                "augment.crop", "optimizer.layer_decay (default 1.0)",
                "objective.name (default 'contrastive')",
                "objective.pool (default 'map')"):  # fmt: skip
        assert f"--config.{key}" in text
    assert "Attributes" not in text and "\n\n" not in text
    found = {key["key"]: key for key in recipe.keys()}
    assert json.loads(json.dumps(found)).keys() == found.keys()
    assert text.count("--config.") == len(found) and all(key["meaning"] for key in found.values())
    assert [name for name, key in found.items() if key["required"]] == ["data", "data.path"]
    assert found["total_steps"] == {
        "key": "total_steps", "type": "int | None", "required": False, "default": None,
        "meaning": "number of updates.", "only_with": None,
    }  # fmt: skip
    assert found["optimizer.b2"]["default"] == recipe.OptimizerConfig().b2
    assert found["objective.pool"]["only_with"] == "classification"


def test_a_run_needs_steps_or_epochs():
    with pytest.raises(ValueError, match="lacks total_steps, or epochs"):
        from_dict({"data": {"path": "a.csv"}, "init": "m"})
