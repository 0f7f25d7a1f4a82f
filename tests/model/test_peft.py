"""Adapters of PEFT: what peft computes with them, or a refusal in one line; never other numbers."""

import json
import re
import shutil
from typing import Any

import numpy as np
import pytest
import references
from checkpoint_files import GOLDEN, assert_same
from references import assert_close, model_terms
from safetensors.numpy import load_file, save_file
from test_huggingface import write_medgemma

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.model import api
from medsiglip_jax.model.config import ClassifierConfig, ModelConfig
from medsiglip_jax.preprocess import text

PIXELS, TOKENS = references.inputs(references.TINY, images=2, texts=3, seed=5)
LAYER = "vision_model.encoder.layers.{}.self_attn.q_proj"
TEXT = "text_model.encoder.layers.1.mlp.fc1"


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape, scale=0.1).astype(np.float32)


def write(folder, tensors=None, base: Any = GOLDEN, prefix="base_model.model.", **settings):
    """An adapter of rank 4 of two layers, or of the `tensors` given."""
    folder.mkdir()
    if tensors is None:
        tensors = {
            f"{LAYER.format(1)}.lora_A.weight": random(4, 32),
            f"{LAYER.format(1)}.lora_B.weight": random(32, 4, seed=1),
            f"{TEXT}.lora_A.weight": random(4, 32, seed=2),
            f"{TEXT}.lora_B.weight": random(48, 4, seed=3),
        }
    save_file(
        {prefix + name: x for name, x in tensors.items()}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **settings}
    content = {"base_model_name_or_path": base and str(base), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return tensors


def merged(tmp_path, change):
    """The parameters of the base after a change of its tensors."""
    shutil.copytree(GOLDEN, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file)
    return medsiglip_jax.load(tmp_path / "merged").params


def refusal(run, folder):
    """The one line of `info`."""
    assert cli.main(["info", str(folder)]) == 2
    line = run.readouterr().err.strip()
    assert "\n" not in line and str(folder) in line
    return line


# -------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("settings, scales", [
    ({}, (6 / 4, 6 / 4)),
    ({"use_rslora": True}, (3.0, 3.0)),
    ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 1}}, (2 / 4, 6 / 4)),
    ({"alpha_pattern": {".*mlp.fc[12]": 3, "oj": 1}, "use_rslora": True}, (3.0, 3 / 2)),
], ids=["alpha / r", "rslora", "the first pattern that ends the name", "both"])  # fmt: skip
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_scale_times_b_times_a_is_added(tmp_path, settings, scales, prefix):
    x = write(tmp_path / "adapter", prefix=prefix, **settings)

    def change(tensors):
        for module, scale in zip((LAYER.format(1), TEXT), scales, strict=True):
            product = x[f"{module}.lora_B.weight"] @ x[f"{module}.lora_A.weight"]
            tensors[f"{module}.weight"] += np.float32(scale) * product

    assert_same(medsiglip_jax.load(tmp_path / "adapter").params, merged(tmp_path, change))


def test_ranks_of_their_own_convolutions_and_embeddings(tmp_path):
    q, conv, words = (
        LAYER.format(0),
        "vision_model.embeddings.patch_embedding",
        "text_model.embeddings",
    )
    x = {
        f"{q}.lora_A.weight": random(2, 32), f"{q}.lora_B.weight": random(32, 2),
        f"{conv}.lora_A.weight": random(4, 3, 14, 14), f"{conv}.lora_B.weight": random(32, 4, 1, 1),
        f"{words}.token_embedding.lora_embedding_A": random(4, 64),
        f"{words}.token_embedding.lora_embedding_B": random(32, 4),
    }  # fmt: skip
    write(tmp_path / "adapter", x, rank_pattern={"q_proj": 2})

    def change(tensors):
        tensors[f"{q}.weight"] += 3 * (x[f"{q}.lora_B.weight"] @ x[f"{q}.lora_A.weight"])
        a, b = (x[f"{conv}.lora_{n}.weight"] for n in "AB")
        tensors[f"{conv}.weight"] += 1.5 * np.einsum("rchw,or->ochw", a, b[..., 0, 0])
        a, b = (x[f"{words}.token_embedding.lora_embedding_{n}"] for n in "AB")
        tensors[f"{words}.token_embedding.weight"] += 1.5 * (b @ a).T

    ours, theirs = medsiglip_jax.load(tmp_path / "adapter"), merged(tmp_path, change)
    for path, leaf in api.tree.items(theirs):
        assert_close(api.tree.flatten(ours.params)[path], leaf, terms=8)


def test_tensors_that_were_saved_whole_replace_those_of_the_base(tmp_path):
    q, head = LAYER.format(0), "vision_model.head.attention.in_proj_weight"
    whole = {
        "vision_model.post_layernorm.bias": random(32),
        head: random(96, 32),
        "logit_scale": random(1),
    }
    x = {
        f"{q}.lora_A.weight": random(4, 32), f"{q}.lora_B.weight": random(32, 4),
        f"{q}.base_layer.bias": random(32, seed=4), "classifier.weight": random(3, 32), **whole,
    }  # fmt: skip
    settings = dict(bias="all", modules_to_save=["classifier", "head.attention"])
    write(tmp_path / "adapter", x, **settings)

    def change(tensors):
        tensors.update(whole | {f"{q}.bias": x[f"{q}.base_layer.bias"]})
        tensors[f"{q}.weight"] += 1.5 * (x[f"{q}.lora_B.weight"] @ x[f"{q}.lora_A.weight"])

    assert_same(medsiglip_jax.load(tmp_path / "adapter").params, merged(tmp_path, change))
    notes = api.describe(tmp_path / "adapter")["notes"]
    assert f"merged with its base {GOLDEN}" in notes[0] and notes[1].endswith("classifier")


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_by_itself_on_a_base_of_two(tmp_path, tower):
    """Whose names transformers 5 writes without their first part."""
    module = "encoder.layers.0.mlp.fc2"
    x = {f"{module}.lora_A.weight": random(4, 48), f"{module}.lora_B.weight": random(32, 4)}
    kind = {"base_model_class": f"Siglip{tower.title()}Model"}
    write(tmp_path / "adapter", x, auto_mapping=kind)

    def change(tensors):
        product = x[f"{module}.lora_B.weight"] @ x[f"{module}.lora_A.weight"]
        tensors[f"{tower}_model.{module}.weight"] += 1.5 * product

    assert_same(medsiglip_jax.load(tmp_path / "adapter").params, merged(tmp_path, change))
    write(tmp_path / "unknown", x)
    with pytest.raises(ValueError, match="may be of either tower.*base_model_class"):
        medsiglip_jax.load(tmp_path / "unknown")


@pytest.mark.parametrize("tower", ["", "vision_model."], ids=["transformers 5", "4"])
def test_the_image_tower_of_medgemma(tmp_path, tower):
    """Adapters of its language model are left out, as that is."""
    (folder := tmp_path / "gemma").mkdir()
    write_medgemma(folder, "vision_tower.")
    module = f"model.vision_tower.{tower}encoder.layers.0.mlp.fc1"
    words = "model.language_model.layers.0.self_attn.q_proj"
    x = {
        f"{module}.lora_A.weight": random(2, 32), f"{module}.lora_B.weight": random(48, 2),
        f"{words}.lora_A.weight": random(4, 8), f"{words}.lora_B.weight": random(8, 4),
    }  # fmt: skip
    pattern = {"rank_pattern": {"vision_tower.*fc1": 2}, "revision": "main"}
    write(tmp_path / "adapter", x, base=folder, **pattern)
    got = medsiglip_jax.load(tmp_path / "adapter").params["img"]["Transformer"]["encoderblock"]
    want = np.array(load_file(folder / "model.safetensors")[
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"])  # fmt: skip
    want += 3 * (x[f"{module}.lora_B.weight"] @ x[f"{module}.lora_A.weight"])
    np.testing.assert_array_equal(got["MlpBlock_0"]["Dense_0"]["kernel"][0], want.T)
    assert "left out of the adapter: language_model" in api.describe(tmp_path / "adapter")["notes"]


def test_a_base_in_half_precision_is_added_to_in_float32(tmp_path):
    medsiglip_jax.save(medsiglip_jax.load(GOLDEN, dtype="bfloat16"), tmp_path / "half")
    x = write(tmp_path / "adapter", base=tmp_path / "half")
    kernel = api.tree.flatten(medsiglip_jax.load(tmp_path / "adapter").params)[
        "txt/Encoder_0/encoderblock/MlpBlock_0/Dense_0/kernel"
    ][1]
    half = load_file(tmp_path / "half" / "model.safetensors")[f"{TEXT}.weight"].astype(np.float32)
    product = x[f"{TEXT}.lora_B.weight"] @ x[f"{TEXT}.lora_A.weight"]
    np.testing.assert_array_equal(kernel.T, half + np.float32(1.5) * product)


@pytest.mark.parametrize("format", ["big_vision", "huggingface"])
def test_bases_of_other_layouts_and_their_tokenizer(tmp_path, checkpoint, format):
    base = medsiglip_jax.load(checkpoint)
    medsiglip_jax.save(base, tmp_path / "base", format=format)
    name = "text_model.head"
    x = {f"{name}.lora_A.weight": random(4, 16), f"{name}.lora_B.weight": random(16, 4)}
    write(tmp_path / "adapter", x, base="../base")  # beside the adapter, wherever we are
    model = medsiglip_jax.load(tmp_path / "adapter")
    product = x[f"{name}.lora_B.weight"] @ x[f"{name}.lora_A.weight"]
    want = np.asarray(base.params["txt"]["head"]["kernel"]) + np.float32(1.5) * product.T
    np.testing.assert_array_equal(model.params["txt"]["head"]["kernel"], want)
    assert model.processor.texts(["a scan"]).shape == (1, 64)
    medsiglip_jax.save(model, tmp_path / "merged")  # and no adapter a second time
    assert_same(medsiglip_jax.load(tmp_path / "merged").params, model.params)
    other = text.train(["another corpus of words"] * 4, 22)
    (tmp_path / "adapter" / "spiece.model").write_bytes(other)
    medsiglip_jax.save(medsiglip_jax.load(tmp_path / "adapter"), tmp_path / "own")
    assert (tmp_path / "own" / "spiece.model").read_bytes() == other


def test_a_classifier_whose_head_was_saved_whole(tmp_path):
    base = medsiglip_jax.load(GOLDEN)
    config = ModelConfig(base.config.vision, None, ClassifierConfig(("a", "b", "c"), "mean"))
    head = {"kernel": random(32, 3), "bias": random(3)}
    medsiglip_jax.save(
        api.Model({"img": base.params["img"], "classifier": head}, config), tmp_path / "base"
    )
    x = {"classifier.weight": random(3, 32, seed=7), "classifier.bias": random(3, seed=8)}
    write(tmp_path / "adapter", x, base=tmp_path / "base", modules_to_save=["classifier"])
    model = medsiglip_jax.load(tmp_path / "adapter")
    np.testing.assert_array_equal(model.params["classifier"]["kernel"], x["classifier.weight"].T)
    np.testing.assert_array_equal(model.params["classifier"]["bias"], x["classifier.bias"])
    assert model.config == medsiglip_jax.load(tmp_path / "base").config


def test_relative_to_the_working_directory_and_in_one_folder(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN, tmp_path / "work" / "base")
    monkeypatch.chdir(tmp_path / "work")
    write(tmp_path / "adapter", base="base")
    model = medsiglip_jax.load(tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():  # as Trainer leaves it beside a whole model
        shutil.copy(file, "base")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "."
    (tmp_path / "work" / "base" / "adapter_config.json").write_text(json.dumps(settings))
    assert_same(medsiglip_jax.load("base").params, model.params)


def test_the_hash_is_of_base_and_adapter(tmp_path):
    def sha256(name, base=GOLDEN, **settings):
        write(tmp_path / name, base=base, **settings)
        return api.describe(tmp_path / name)["sha256"]

    other = shutil.copytree(GOLDEN, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"logit_scale": tensors["logit_scale"] + 1}, other / "model.safetensors")
    hashes = {sha256("one"), sha256("alpha", lora_alpha=7), sha256("based", base=other)}
    assert len(hashes | {api.describe(GOLDEN)["sha256"]}) == 4
    assert sha256("again") in hashes


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("settings, say", [
    ({"peft_type": "IA3"}, "peft_type is 'IA3', not 'LORA'"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "use_dora is True"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"layer_replication": [[0, 1]]}, "layer_replication is"),
    ({"revision": "v2"}, "revision is 'v2'"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
    ({"of_a_later_version": 1}, "of_a_later_version is 1"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
    ({"r": 8}, r"'A': \(4, 32\).*want.*'A': \(8, 32\)"),
    ({"r": 0}, "rank 0"),
    ({"lora_alpha": "6"}, "alpha '6'"),
    ({"rank_pattern": ["q_proj"]}, "list"),
    ({"alpha_pattern": {"q_proj(": 2}}, "adapter"),
    ({"modules_to_save": ["head"]}, "modules_to_save names 'head'"),
    ({"base": None}, "base_model_name_or_path is None"),
    ({"base": "../gone"}, r"\.\./gone.*base_model_name_or_path"),
    ({"base": "nobody/nothing"}, "nobody/nothing.*base_model_name_or_path"),
])  # fmt: skip
def test_what_cannot_be_merged_is_one_line(tmp_path, capsys, settings, say, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "adapter", **settings)
    line = refusal(capsys, tmp_path / "adapter")
    assert re.search(say, line), line


@pytest.mark.parametrize("tensors, say", [
    ({f"{LAYER.format(2)}.lora_A.weight": 4}, "its base does not have"),
    ({"vision_model.heads.weight": 4, "logit_bias": 1}, "vision_model.heads.weight, "),
    ({f"{LAYER.format(1)}.lora_A.weight": (4, 32)}, "want .*'B'"),
    ({f"{LAYER.format(1)}.bias": 31}, r"\(31,\).*want.*\(32,\)"),
    ({f"{LAYER.format(1)}.lora_magnitude_vector": 32}, "lora_magnitude_vector"),
    ({f"{LAYER.format(1)}.lora_A.default.weight": (4, 32)}, "lora_A.default.weight"),
    ({"vision_model.head.attention.lora_A.weight": (4, 32)}, "peft adds its out_proj twice"),
    ({}, "holds no tensors"),
])  # fmt: skip
def test_adapters_of_another_base_are_one_line(tmp_path, capsys, tensors, say):
    write(tmp_path / "adapter", {name: random(*np.atleast_1d(s)) for name, s in tensors.items()})
    line = refusal(capsys, tmp_path / "adapter")
    assert re.search(say, line), line


def test_pickles_bases_of_orbax_and_damage_are_one_line(tmp_path, capsys):
    write(tmp_path / "pickle")
    (tmp_path / "pickle" / "adapter_model.safetensors").rename(
        tmp_path / "pickle/adapter_model.bin"
    )
    assert "adapter_model.bin is a pickle" in refusal(capsys, tmp_path / "pickle")
    medsiglip_jax.save(medsiglip_jax.load(GOLDEN), tmp_path / "orbax", format="orbax")
    write(tmp_path / "onto", base=tmp_path / "orbax")
    assert "orbax" in refusal(capsys, tmp_path / "onto")
    write(tmp_path / "short")
    file = tmp_path / "short" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "not a readable safetensors file" in refusal(capsys, tmp_path / "short")
    write(tmp_path / "nan", {f"{TEXT}.lora_{n}.weight": np.full(s, np.nan, np.float32)
                             for n, s in (("A", (4, 32)), ("B", (48, 4)))})  # fmt: skip
    with pytest.raises(ValueError, match="Dense_0/kernel has 1,536 values that are NaN"):
        medsiglip_jax.load(tmp_path / "nan")


def test_adapters_are_not_offered_as_a_format_to_write(tmp_path, capsys):
    with pytest.raises(ValueError, match="'peft'; expected one of orbax, huggingface, big_vision"):
        medsiglip_jax.save(medsiglip_jax.load(GOLDEN), tmp_path / "out", format="peft")
    assert cli.main(["convert", "--help"]) == 0
    assert "peft" not in capsys.readouterr().out


def test_two_adapters_whose_bases_are_each_other(tmp_path, capsys):
    write(tmp_path / "one", base="../two")
    write(tmp_path / "two", base="../one")
    assert cli.main(["info", str(tmp_path / "one")]) == 2
    assert "no config.json here" in capsys.readouterr().err


# -------------------------------------------------------------------------------- peft itself


@pytest.mark.float
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("settings", [
    dict(target_modules=["q_proj", "v_proj"], bias="all"),
    dict(target_modules="all-linear", use_rslora=True, rank_pattern={"fc1": 2},
         alpha_pattern={"fc2": 3}),
    dict(target_modules=["k_proj"], modules_to_save=["head"], bias="lora_only"),
    dict(target_modules=["patch_embedding", "token_embedding", "fc2"]),
], ids=lambda settings: str(settings["target_modules"]))  # fmt: skip
def test_the_embeddings_of_peft(tmp_path, settings):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = references.siglip(references.TINY, seed=3)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    theirs = references.run(wrapped.merge_and_unload(), PIXELS, TOKENS)
    ours = medsiglip_jax.load(tmp_path / "adapter")
    terms = model_terms(ours.config)
    assert_close(ours.encode_image(PIXELS), theirs["image_embeds"], terms, 1)
    assert_close(ours.encode_text(TOKENS), theirs["text_embeds"], terms, 1)
