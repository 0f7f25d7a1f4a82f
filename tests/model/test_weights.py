"""Checkpoints: strict in both directions, lossless round trips, nothing hostile gets in."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
from references import assert_close, model_terms
from safetensors.numpy import load_file, save_file

import medsiglip_jax
from medsiglip_jax.model import api, config, tree
from medsiglip_jax.model.weights import big_vision, hub, layouts, positions, random
from medsiglip_jax.model.weights.checkpoint import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden" / "siglip-tiny"


@pytest.fixture(scope="module")
def golden():
    return medsiglip_jax.load(GOLDEN)


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))


def assert_same(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


# -------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", layouts.LAYOUTS)
def test_round_trip(golden, tmp_path, format, dtype):
    model = medsiglip_jax.load(GOLDEN, dtype=dtype)
    medsiglip_jax.save(model, tmp_path / "out", format=format)
    again = medsiglip_jax.load(tmp_path / "out", dtype=dtype)
    assert again.config == model.config
    assert again.checkpoint.dtype == dtype
    assert_same(again.params, model.params)


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


def test_casting_equals_numpy(golden):
    half = medsiglip_jax.load(GOLDEN, dtype="bfloat16")
    for path, leaf in tree.items(golden.params):
        want = np.asarray(leaf).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(tree.flatten(half.params)[path]), want)


@pytest.mark.float
@pytest.mark.parametrize("fsdp", [False, True])
def test_loading_onto_a_mesh(golden, monkeypatch, fsdp):
    from medsiglip_jax.model import sharding

    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 256)
    mesh = sharding.make_mesh()
    model = medsiglip_jax.load(GOLDEN, mesh=mesh, fsdp=fsdp)
    assert_same(model.params, golden.params)
    kernel = model.params["txt"]["Encoder_0"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert kernel.sharding.is_fully_replicated != fsdp
    expected = np.load(GOLDEN / "expected.npz")
    for n in (1, 3, 11):
        pixels = np.resize(expected["pixels"], (n, *expected["pixels"].shape[1:]))
        assert_close(
            model.encode_image(pixels), golden.encode_image(pixels), model_terms(golden.config)
        )


# --------------------------------------------------------------------------------- big_vision


def unrolled(model) -> dict[str, np.ndarray]:
    arrays = {}
    for path, leaf in tree.items(model.params):
        if "/encoderblock/" not in path:
            arrays[path] = np.asarray(leaf)
            continue
        for i, layer in enumerate(np.asarray(leaf)):
            arrays[path.replace("/encoderblock/", f"/encoderblock_{i}/")] = layer
    return arrays


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_big_vision_layouts(golden, tmp_path, prefix, scanned, bfloat16):
    arrays = tree.flatten(golden.params) if scanned else unrolled(golden)
    arrays = {k: np.asarray(v) for k, v in arrays.items()}
    if bfloat16:
        arrays = {k: v.astype(ml_dtypes.bfloat16).view("V2") for k, v in arrays.items()}
    np.savez(tmp_path / "m.npz", **{prefix + k: v for k, v in arrays.items()})
    model = medsiglip_jax.load(tmp_path / "m.npz", dtype="bfloat16" if bfloat16 else "float32")
    assert model.config == golden.config
    want = medsiglip_jax.load(GOLDEN, dtype="bfloat16") if bfloat16 else golden
    assert_same(model.params, want.params)


def test_big_vision_image_size_of_a_border_that_is_dropped():
    """384 px in patches of 14 leaves 6 px over: the shapes alone would say 378."""
    so400m = config.named("so400m-384")
    from medsiglip_jax.model import towers as model

    shapes = {p: x.shape for p, x in tree.items(model.param_shapes(so400m))}
    assert big_vision.infer_config(shapes) == so400m


def test_big_vision_problems_come_together(golden, tmp_path):
    arrays = unrolled(golden)
    arrays["img/Transformer/encoderblock_1/LayerNorm_0/scale"] = np.ones(5, np.float32)
    arrays["txt/extra"] = np.ones(2, np.float32)
    del arrays["txt/head/bias"]
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(CheckpointError) as caught:
        medsiglip_jax.load(tmp_path / "m.npz")
    for part in ("LayerNorm_0/scale", "txt/extra", "txt/head/bias"):
        assert part in str(caught.value)


# ---------------------------------------------------------------------------------- Gemma 3


@pytest.mark.float
@pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
def test_medgemma_vision_tower(golden, tmp_path, prefix):
    tensors = {
        prefix + name: value
        for name, value in load_file(GOLDEN / "model.safetensors").items()
        if name.startswith("vision_model.") and ".head." not in name
    }
    tensors["language_model.model.embed_tokens.weight"] = np.ones((3, 4), np.float32)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    raw = json.loads((GOLDEN / "config.json").read_text())
    raw = {"model_type": "gemma3", "vision_config": raw["vision_config"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))

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


# ----------------------------------------------------------------------- broken and hostile


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_all_problems_in_one_message(folder):
    def change(tensors):
        del tensors["logit_bias"]
        del tensors["vision_model.head.attention.in_proj_weight"]
        tensors["surprise"] = np.ones(3, np.float32)
        tensors["text_model.head.bias"] = np.ones(7, np.float32)
        name = "text_model.encoder.layers.1.mlp.fc1.weight"
        tensors[name] = tensors[name].T.copy()

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        medsiglip_jax.load(folder)
    message = str(caught.value)
    assert len(caught.value.problems) == 5, caught.value.problems
    for part in ("logit_bias", "in_proj_weight", "surprise", "(7,)", "layers.1.mlp.fc1.weight"):
        assert part in message


def test_quantised_tensors_are_refused(folder):
    name = "vision_model.head.mlp.fc1.weight"
    rewrite(folder, lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(CheckpointError, match="MlpBlock_0/Dense_0/kernel.*expected a float"):
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


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


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


class Bomb:
    def __reduce__(self):
        return (Path("/tmp/medsiglip_jax_was_executed").touch, ())


def test_pickles_are_never_opened(folder, tmp_path):
    import pickle

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "m.npz", **{"img/embedding/kernel": np.array([Bomb()], object)})
    for source in (folder, folder / "pytorch_model.bin", tmp_path / "m.npz"):
        with pytest.raises(CheckpointError, match="pickle"):
            medsiglip_jax.load(source)
    assert not Path("/tmp/medsiglip_jax_was_executed").exists()


FUZZED = config.two_towers(
    image_size=4, patch_size=2, width=4, depth=1, mlp_dim=4, num_heads=2, vocab_size=8,
    context_length=4,
)  # fmt: skip


@pytest.mark.torture
@pytest.mark.parametrize("name", ["m.npz", "m/model.safetensors"])
def test_fuzzed_checkpoints_raise_one_kind_of_error(tmp_path, torture, name):
    """Random bytes overwritten, mostly in headers: a clean load or a CheckpointError."""
    file = tmp_path / name
    source = file if file.suffix == ".npz" else file.parent
    format = "big_vision" if file.suffix == ".npz" else "huggingface"
    medsiglip_jax.save(medsiglip_jax.init(FUZZED), source, format=format)
    whole, refused = file.read_bytes(), 0
    for seed in range(20 * torture):
        rng, content = np.random.default_rng(seed), bytearray(whole)
        for at in rng.integers(0, 400 if seed % 2 else len(content), 8):
            content[at] = rng.integers(256)
        file.write_bytes(content)
        try:
            medsiglip_jax.load(source)
        except CheckpointError:
            refused += 1
    assert refused > 5 * torture


def test_truncated_npz_and_orbax(golden, tmp_path):
    medsiglip_jax.save(golden, tmp_path / "m.npz", format="big_vision")
    truncate(tmp_path / "m.npz")
    with pytest.raises(CheckpointError, match="npz"):
        medsiglip_jax.load(tmp_path / "m.npz")
    medsiglip_jax.save(golden, tmp_path / "orbax", format="orbax")
    shutil.rmtree(tmp_path / "orbax" / "params")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        medsiglip_jax.load(tmp_path / "orbax")


@pytest.mark.parametrize("source, error, say", [
    ("/no/such/folder", FileNotFoundError, "no such file or folder"),
    ("nothing.npz", FileNotFoundError, "no such file"),
    ("nowhere://bucket/model", ValueError, "nowhere:// cannot be reached here"),
    (__file__, CheckpointError, "not a checkpoint"),
    (GOLDEN / "model.safetensors", CheckpointError, "give the folder"),
    (Path(__file__).parent, CheckpointError, "no config.json"),
])  # fmt: skip
def test_wrong_sources(source, error, say):
    with pytest.raises(error, match=say):
        medsiglip_jax.load(source)


@pytest.mark.parametrize("kind, error, say", [
    ("GatedRepoError", PermissionError, "Accept the terms.*hf auth login"),
    ("RepositoryNotFoundError", FileNotFoundError, "no such Hugging Face repository"),
    ("LocalEntryNotFoundError", FileNotFoundError, "cannot be reached.*--local-dir"),
    ("OfflineModeIsEnabled", ConnectionError, "cannot be reached.*--local-dir"),
])  # fmt: skip
def test_hub_failures_say_what_to_do(monkeypatch, kind, error, say):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise (made := getattr(huggingface_hub.errors, kind)).__new__(made)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(error, match=say):
        medsiglip_jax.load("google/medsiglip-448")


def test_the_hub_is_asked_for_nothing_but_data(monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repo_id, **kwargs):
        asked.update(kwargs, repo_id=repo_id)
        return str(GOLDEN)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = medsiglip_jax.load("google/medsiglip-448", token="hf_x")
    assert model.config.embed_dim == 32
    assert asked["token"] == "hf_x" and asked["repo_id"] == "google/medsiglip-448"
    assert not any(p.endswith((".bin", ".py")) for p in asked["allow_patterns"])


# --------------------------------------------------------------------- resolution and memory


@pytest.mark.float
@pytest.mark.parametrize("old, new", [(32, 16), (3, 8), (16, 27), (5, 1), (1, 4), (7, 7)])
def test_position_resampling_is_big_visions(old, new):
    zoom = pytest.importorskip("scipy.ndimage").zoom
    grid = np.random.default_rng(0).normal(size=(1, old * old, 6)).astype(np.float32)
    # mode: by default scipy writes zeros where rounding puts a corner 1e-16 outside the grid.
    want = zoom(grid.reshape(old, old, 6), (new / old, new / old, 1), order=1, mode="nearest")
    got = positions.resample(grid, new).reshape(new, new, 6)
    assert_close(got, want, terms=4)  # of the four points around


def test_another_resolution_runs(golden):
    params, new = positions.resize_positions(golden.params, golden.config, 70)
    model = api.Model(params, new)
    assert model.encode_tokens(np.zeros((1, 70, 70, 3), np.uint8)).shape == (1, 25, 32)
    same, _ = positions.resize_positions(golden.params, golden.config, 42)
    assert same["img"]["pos_embedding"] is golden.params["img"]["pos_embedding"]


MEMORY = """
import sys, threading
import jax, numpy, medsiglip_jax.api
jax.numpy.zeros(1).block_until_ready()

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

base, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch); thread.start()
model = medsiglip_jax.model.api.load(sys.argv[1])
jax.block_until_ready(model.params)
done.set(); thread.join()
print((peak - base) / medsiglip_jax.model.api.tree.nbytes(model.params))
"""


def test_loading_takes_little_more_memory_than_the_result(tmp_path):
    """The issue's bound at full size is 1.3; here 330 MB, where fixed costs weigh more.
    scripts/bench.py load measures the full size."""
    if not Path("/proc/self/status").exists():
        pytest.skip("RssAnon is Linux's")
    architecture = config.two_towers(
        image_size=224, patch_size=16, width=1024, depth=2, mlp_dim=4096, num_heads=16
    )
    medsiglip_jax.save(medsiglip_jax.init(architecture), tmp_path / "m")
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "m")]
    ratio = float(subprocess.run(code, check=True, capture_output=True, text=True).stdout)
    assert ratio < 1.3


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="so400m-448"):
        medsiglip_jax.init("so400m-449")
    with pytest.raises(ValueError, match="float32, bfloat16"):
        medsiglip_jax.load(GOLDEN, dtype="int8")
    with pytest.raises(ValueError, match="orbax, huggingface, big_vision"):
        medsiglip_jax.save(medsiglip_jax.load(GOLDEN), "x", format="onnx")
    with pytest.raises(ValueError, match="matmul_precision"):
        medsiglip_jax.load(GOLDEN, matmul_precision="tf33")


def test_init_is_the_named_architecture():
    from medsiglip_jax.model import towers as model

    assert tree.size(model.param_shapes(config.named("so400m-448"))) == 878_300_338
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


@pytest.mark.parametrize("format", ["huggingface", "orbax", "big_vision"])
def test_checkpoints_in_a_bucket_are_copied_once_and_again_when_they_change(
    bucket, checkpoint, format, monkeypatch
):
    place = f"{bucket}/models/{format}"
    model = medsiglip_jax.load(checkpoint)
    medsiglip_jax.save(model, place, format=format)
    loaded = medsiglip_jax.load(place)
    assert loaded.source == place
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)

    copy = hub.fetch(place)
    monkeypatch.setattr(hub, "_copy", None)  # nothing to do
    assert hub.fetch(place) == copy
    monkeypatch.undo()
    model.params["b"] = model.params["b"] + 1
    medsiglip_jax.save(model, place, format=format, overwrite=True)
    assert hub.fetch(place) != copy
    np.testing.assert_array_equal(medsiglip_jax.load(place).params["b"], model.params["b"])


def test_a_single_file_in_a_bucket(bucket):
    model = medsiglip_jax.init("tiny-56")
    medsiglip_jax.save(model, f"{bucket}/models/tiny.npz", format="big_vision")
    loaded = medsiglip_jax.load(f"{bucket}/models/tiny.npz")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        medsiglip_jax.load(f"{bucket}/models/nothing")
