"""Hugging Face folders: what transformers writes is read, and the other way round."""

import json
import struct

import numpy as np
import pytest
import references
from checkpoint_files import GOLDEN, assert_same, rewrite, truncate
from references import assert_close, model_terms
from safetensors.numpy import load_file, save_file

import medsiglip_jax
from medsiglip_jax.model import api, config, towers
from medsiglip_jax.model.weights.checkpoint import CheckpointError


def test_huggingface_tensors_are_byte_equal_after_a_round_trip(golden, tmp_path):
    medsiglip_jax.save(golden, tmp_path / "out")
    before = load_file(GOLDEN / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), name


@pytest.mark.float
def test_transformers_loads_what_we_save(golden, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    medsiglip_jax.save(golden, tmp_path / "out")
    model, problems = transformers.SiglipModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(problems.values()), problems
    for name, want in load_file(GOLDEN / "model.safetensors").items():
        assert model.state_dict()[name].numpy().tobytes() == want.tobytes(), name
    expected = np.load(GOLDEN / "expected.npz")
    ours = references.run(model, expected["pixels"], expected["tokens"])
    # Cosines times exp(4.77) = 118, less 12.7.
    assert_close(ours["logits"], expected["logits"], model_terms(golden.config), 118 + 12.7)


def test_transformers_loads_the_processor_we_save(golden, tmp_path, real_data):
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    model = medsiglip_jax.init(
        config.two_towers(image_size=42, patch_size=14, width=8, depth=1, mlp_dim=8, num_heads=2)
    )
    spiece = real_data / "tokenizer" / "spiece.model"
    model = api.Model(model.params, model.config, tokenizer=spiece)
    medsiglip_jax.save(model, tmp_path / "out")
    theirs = transformers.SiglipTokenizer.from_pretrained(tmp_path / "out")
    texts = ["A chest X-ray with pneumonia.", "w/o <5 mm", ""]
    ids = theirs(texts, padding="max_length", max_length=64, truncation=True)["input_ids"]
    np.testing.assert_array_equal(ids, model.processor.texts(texts))
    pixels = transformers.SiglipImageProcessorPil.from_pretrained(tmp_path / "out")
    assert pixels.size == {"height": 42, "width": 42}


def test_sharded_safetensors(golden, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({n: tensors[n] for n in names[i::3]}, folder / file)
        weight_map |= {n: file for n in names[i::3]}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(medsiglip_jax.load(folder).params, golden.params)
    index.write_text(json.dumps({"weight_map": {n: "../" + f for n, f in weight_map.items()}}))
    with pytest.raises(ValueError, match="plain file name"):
        medsiglip_jax.load(folder)


@pytest.mark.float
def write_medgemma(folder, prefix):
    tensors = {
        prefix + name: value
        for name, value in load_file(GOLDEN / "model.safetensors").items()
        if name.startswith("vision_model.") and ".head." not in name
    }
    tensors["language_model.model.embed_tokens.weight"] = np.ones((3, 4), np.float32)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((GOLDEN / "config.json").read_text())
    raw = {"model_type": "gemma3", "vision_config": raw["vision_config"]}
    (folder / "config.json").write_text(json.dumps(raw))


def test_medgemma_vision_tower(golden, tmp_path):
    write_medgemma(tmp_path, "vision_tower.")
    model = medsiglip_jax.load(tmp_path)
    pixels = np.load(GOLDEN / "expected.npz")["pixels"]
    patches = model.encode_tokens(pixels)
    terms = model_terms(golden.config)
    assert_close(patches, golden.encode_tokens(pixels), terms)
    assert_close(model.encode_image(pixels, normalize=False), np.mean(patches, axis=1), terms)
    assert "mean of the patch tokens" in " ".join(api.describe(tmp_path)["notes"])
    assert "language_model" in " ".join(api.describe(tmp_path)["notes"])
    for call in (lambda: model.processor.texts(["a"]), lambda: model.encode_text(np.ones((1, 64)))):
        with pytest.raises(ValueError, match="no text tower.*MedGemma"):
            call()
    medsiglip_jax.save(model, tmp_path / "out")
    assert_same(medsiglip_jax.load(tmp_path / "out").params, model.params)
    with pytest.raises(ValueError, match="temperature"):
        model.similarity(np.ones((1, 32)), np.ones((1, 32)))
    write_medgemma(tmp_path, "model.vision_tower.")  # as newer versions of transformers name it
    assert_same(medsiglip_jax.load(tmp_path).params, model.params)
    tower = "vision_tower.vision_model."  # which transformers 5 writes without its last part
    rewrite(tmp_path, lambda t: [t.update({n.replace(f"model.{tower}", "vision_tower."): t.pop(n)})
                                 for n in list(t) if tower in n])  # fmt: skip
    assert_same(medsiglip_jax.load(tmp_path).params, model.params)


@pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
def test_a_pooling_head_in_a_gemma_checkpoint_is_left_out(tmp_path, prefix):
    """transformers makes one if the configuration does not say vision_use_head, and never uses
    it."""
    write_medgemma(tmp_path, prefix)
    want = medsiglip_jax.load(tmp_path).params
    tensors = load_file(GOLDEN / "model.safetensors").items()
    head = {f"{prefix}{name}": value for name, value in tensors
            if name.startswith("vision_model.head.")}  # fmt: skip
    rewrite(tmp_path, lambda tensors: tensors.update(head))
    model = medsiglip_jax.load(tmp_path)
    assert_same(model.params, want)
    assert head and "pooling head, which Gemma does not use" in model.checkpoint.notes[-1]


def test_quantised_tensors_are_refused(folder):
    name = "vision_model.head.mlp.fc1.weight"
    rewrite(folder, lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(CheckpointError, match=f"{name} is I8; expected a float"):
        medsiglip_jax.load(folder)


@pytest.mark.parametrize("field, value, say", [
    ("model_type", "siglip2", "siglip2"),
    ("model_type", "clip", "expected 'siglip'"),
    ("text_config", {"hidden_act": "gelu", "hidden_size": 32}, "gelu_pytorch_tanh"),
    ("text_config", {"layer_norm_eps": 1e-5, "hidden_size": 32}, "layer_norm_eps"),
    ("vision_config", {"num_attention_heads": 5, "hidden_size": 32}, "divisible"),
    ("vision_config", {"hidden_size": -3}, "positive"),
    ("vision_config", {"hidden_size": "32"}, "positive|width"),
    ("vision_config", [1], "list"),
])  # fmt: skip
def test_wrong_configurations(folder, field, value, say):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=say):
        medsiglip_jax.load(folder)


@pytest.mark.parametrize("tower, key, value, told", [
    ("vision", "num_hidden_layers", 10**6, "tensors of 2"),
    ("vision", "image_size", 10**9, "9 positions"),
    ("text", "max_position_embeddings", 10**9, r"\(64, 32\)"),
    ("text", "vocab_size", 10**12, r"\(64, 32\)"),
    ("vision", "intermediate_size", 10**15, r"\(48, 32\)"),
    ("text", "num_hidden_layers", 1, "tensors of 2"),
    ("text", "vocab_size", -1, "a positive integer"),
    ("text", "num_hidden_layers", True, "a positive integer"),
    ("vision", "patch_size", 14.0, "a positive integer"),
])  # fmt: skip
def test_numbers_that_contradict_the_tensors(folder, monkeypatch, tower, key, value, told):
    """Before anything of that size is built: a million layers took three minutes, and a billion
    pixels ended the process."""
    monkeypatch.setattr(towers, "param_shapes", pytest.fail)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw[f"{tower}_config"][key] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=rf"{tower} {key} is {value}.*{told}") as caught:
        medsiglip_jax.load(folder)
    assert "\n" not in str(caught.value)


def test_the_number_of_labels_is_limited_before_they_are_named(folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | {"architectures": ["SiglipForImageClassification"]}
    for count in (10**9, "3", -2, [1]):
        path.write_text(json.dumps(raw | {"num_labels": count}))
        with pytest.raises(CheckpointError, match="num_labels is .*; expected 1 to 100000"):
            medsiglip_jax.load(folder)


def grow(path):
    path.write_bytes(path.read_bytes() + b"x" * 64)


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def not_json(path):
    path.write_bytes(struct.pack("<Q", 16) + b"this is not JSON" + bytes(64))


def overlapping(path):
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    }
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(16))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, grow, huge_header, not_json, overlapping, empty])
def test_damaged_safetensors(folder, damage):
    damage(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        medsiglip_jax.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": ' * 2000, "\0", ""])
def test_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        medsiglip_jax.load(folder)
