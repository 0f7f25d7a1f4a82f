"""Folders as transformers and its users write them, beside what transformers makes of them: the
same numbers, or a refusal in one line; never other numbers."""

import json
import shutil

import numpy as np
import pytest
import references
from checkpoint_files import GOLDEN, rewrite
from references import assert_close, model_terms, tower_terms
from safetensors.numpy import load_file, save_file

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.model import api

transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
torch = pytest.importorskip("torch")

PIXELS, TOKENS = references.inputs(references.TINY, images=2, texts=3, seed=5)


@pytest.fixture(scope="module")
def reference():
    return references.siglip(references.TINY, seed=3)


@pytest.fixture
def whole(reference, tmp_path):
    reference.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def of_images(tower):
    """What a tower of transformers makes of the pixels."""
    values = torch.tensor(PIXELS).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return tower(pixel_values=values).pooler_output.numpy()


def of_texts(tower):
    with torch.no_grad():
        return tower(input_ids=torch.tensor(TOKENS).long()).pooler_output.numpy()


# -------------------------------------------------------------------------- a tower by itself


@pytest.mark.float
@pytest.mark.parametrize("inner", [False, True], ids=["SiglipVisionModel", "vision_model"])
def test_the_image_tower_alone(reference, whole, tmp_path, inner):
    """With names that begin with "vision_model.", and without, as transformers 5 writes them."""
    tower = reference.vision_model
    if not inner:
        tower = transformers.SiglipVisionModel.from_pretrained(whole)
    tower.save_pretrained(tmp_path / "alone")
    theirs = of_images(transformers.SiglipVisionModel.from_pretrained(tmp_path / "alone"))
    model = medsiglip_jax.load(tmp_path / "alone")
    ours = model.encode_image(PIXELS, normalize=False)
    assert_close(ours, theirs, tower_terms(model.config.vision), 10)
    assert_close(ours, of_images(reference.vision_model), tower_terms(model.config.vision), 10)


@pytest.mark.float
@pytest.mark.parametrize("inner", [False, True], ids=["SiglipTextModel", "text_model"])
def test_the_text_tower_alone(reference, whole, tmp_path, inner):
    tower = reference.text_model
    if not inner:
        tower = transformers.SiglipTextModel.from_pretrained(whole)
    tower.save_pretrained(tmp_path / "alone")
    model = medsiglip_jax.load(tmp_path / "alone")
    ours = model.encode_text(TOKENS, normalize=False)
    assert_close(ours, of_texts(reference.text_model), tower_terms(model.config.text), 10)
    with pytest.raises(ValueError, match="no image tower"):
        model.encode_image(PIXELS)


@pytest.mark.float
def test_a_classifier_gives_its_tower_too(reference, whole, tmp_path):
    kind = transformers.SiglipForImageClassification
    kind.from_pretrained(whole, num_labels=3).save_pretrained(tmp_path / "classifier")
    model = medsiglip_jax.load(tmp_path / "classifier")
    ours = model.encode_image(PIXELS, normalize=False)
    assert_close(ours, of_images(reference.vision_model), tower_terms(model.config.vision), 10)
    assert model.config.classifier is not None and len(model.config.classifier.labels) == 3


@pytest.mark.float
def test_buffers_of_older_versions_are_no_parameters(reference, whole):
    for tower, tokens in (("vision_model", 9), ("text_model", 64)):
        ids = np.arange(tokens)[None]
        rewrite(whole, lambda t, n=tower, i=ids: t.update({f"{n}.embeddings.position_ids": i}))
    model = medsiglip_jax.load(whole)
    ours = model.encode_text(TOKENS, normalize=False)
    assert_close(ours, of_texts(reference.text_model), model_terms(model.config), 10)


# ---------------------------------------------------------------------- which files are read


def add_shards(folder, change=1.0):
    """An index and shards beside what is there, of other weights."""
    tensors = load_file(folder / "model.safetensors")
    names, shards = sorted(tensors), {}
    for i in range(2):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        save_file(
            {name: tensors[name] * np.float32(change) for name in names[i::2]}, folder / shard
        )
        shards |= dict.fromkeys(names[i::2], shard)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.float
@pytest.mark.parametrize("stale", ["other weights", "a shard is missing", "an index of nothing"])
def test_a_single_file_comes_before_an_index(reference, whole, stale):
    add_shards(whole, change=1.5)
    if stale == "a shard is missing":
        (whole / "model-00001-of-00002.safetensors").unlink()
    if stale == "an index of nothing":
        (whole / "model.safetensors.index.json").write_text("{}")
    theirs = of_texts(transformers.SiglipModel.from_pretrained(whole).text_model)
    model = medsiglip_jax.load(whole)
    assert_close(model.encode_text(TOKENS, normalize=False), theirs, model_terms(model.config), 10)
    (note,) = api.describe(whole)["notes"]
    assert "ignored" in note and "model.safetensors.index.json" in note


@pytest.mark.float
@pytest.mark.parametrize("name", ["other.safetensors", "model.safetensors.index.json"])
def test_a_file_that_the_config_names_comes_first(whole, name):
    add_shards(whole, change=1.5)
    tensors = load_file(whole / "model.safetensors")
    save_file({n: x * np.float32(1.5) for n, x in tensors.items()}, whole / "other.safetensors")
    raw = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(raw | {"transformers_weights": name}))
    theirs = of_texts(transformers.SiglipModel.from_pretrained(whole).text_model)
    model = medsiglip_jax.load(whole)
    assert_close(model.encode_text(TOKENS, normalize=False), theirs, model_terms(model.config), 10)


@pytest.mark.parametrize("name, say", [
    ("../other.safetensors", "plain .safetensors file name"), (7, "plain .safetensors file name"),
    ("gone.safetensors", "no weights here; expected gone.safetensors"),
])  # fmt: skip
def test_a_file_that_cannot_be_what_the_config_names(whole, name, say):
    raw = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(raw | {"transformers_weights": name}))
    with pytest.raises(ValueError, match=say):
        medsiglip_jax.load(whole)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "siglip."])
def test_names_of_a_wrapper_are_one_line(whole, prefix, capsys):
    rewrite(whole, lambda t: [t.update({prefix + n: t.pop(n)}) for n in list(t)])
    assert cli.main(["info", str(whole)]) == 2
    line = capsys.readouterr().err.strip()
    assert f"all 88 tensor names begin with '{prefix}'" in line and "\n" not in line


# --------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("format, dtype, value", [
    ("huggingface", "float32", np.nan), ("huggingface", "bfloat16", -np.inf),
    ("orbax", "float32", -np.inf), ("orbax", "bfloat16", np.nan),
    ("big_vision", "float32", np.nan), ("big_vision", "bfloat16", -np.inf),
])  # fmt: skip
def test_weights_that_are_not_finite_are_named(tmp_path, format, dtype, value):
    model = medsiglip_jax.load(GOLDEN, dtype=dtype)
    kernel = np.array(model.params["txt"]["head"]["kernel"])
    kernel[3, 5] = kernel[0, 0] = value
    model.params["txt"]["head"]["kernel"] = kernel
    medsiglip_jax.save(model, tmp_path / "out", format=format)
    with pytest.raises(ValueError, match="txt/head/kernel has 2 values that are NaN or infinite"):
        medsiglip_jax.load(tmp_path / "out", dtype=dtype)


def test_a_layer_that_is_not_finite_is_named(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "m")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    rewrite(tmp_path / "m", lambda t: t.update({name: t[name] * np.float32(np.nan)}))
    with pytest.raises(ValueError, match="img/.*Dense_0/kernel has 1,536 values"):
        medsiglip_jax.load(tmp_path / "m")


def test_a_dtype_that_cannot_hold_the_weights_is_an_error(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t["logit_bias"].fill(1e6))
    assert medsiglip_jax.load(tmp_path / "m", dtype="bfloat16").params["b"] == 999_424
    with pytest.raises(ValueError, match="b has 1 values .* the dtype asked for cannot hold them"):
        medsiglip_jax.load(tmp_path / "m", dtype="float16")
