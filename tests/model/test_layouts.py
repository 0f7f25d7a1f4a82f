"""Checkpoints of every layout: lossless round trips, strict checks, where they may lie."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import GOLDEN, assert_same, rewrite, truncate
from jax.sharding import NamedSharding
from references import assert_close, model_terms

import medsiglip_jax
from medsiglip_jax.model import api, config, sharding, towers, tree
from medsiglip_jax.model.weights import copies, layouts, reading
from medsiglip_jax.model.weights.checkpoint import CheckpointError
from medsiglip_jax.train.checkpoints import Checkpoints


@pytest.mark.parametrize("format, dtype", [
    *((format, dtype) for format in layouts.WRITABLE for dtype in ("float32", "bfloat16")),
    ("huggingface", "float16"),  # spelt out there; the others keep numpy's own names
])  # fmt: skip
def test_round_trip(tmp_path, format, dtype):
    model = medsiglip_jax.load(GOLDEN, dtype=dtype)
    medsiglip_jax.save(model, tmp_path / "out", format=format)
    again = medsiglip_jax.load(tmp_path / "out", dtype=dtype)
    assert again.config == model.config
    assert again.checkpoint.dtype == dtype
    assert_same(again.params, model.params)


def test_casting_equals_numpy(golden):
    half = medsiglip_jax.load(GOLDEN, dtype="bfloat16")
    for path, leaf in tree.items(golden.params):
        want = np.asarray(leaf).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(tree.flatten(half.params)[path]), want)


@pytest.mark.float
@pytest.mark.parametrize("fsdp", [False, True])
def test_loading_onto_a_mesh(golden, monkeypatch, fsdp):
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 256)
    mesh = sharding.make_mesh()
    model = medsiglip_jax.load(GOLDEN, mesh=mesh, fsdp=fsdp)
    assert_same(model.params, golden.params)
    kernel = model.params["txt"]["Encoder_0"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert kernel.sharding.is_fully_replicated != fsdp
    if fsdp:  # replicated: test_one_device_equals_eight
        pixels = np.resize(np.load(GOLDEN / "expected.npz")["pixels"], (11, 42, 42, 3))
        z, want = model.encode_image(pixels), golden.encode_image(pixels)
        assert_close(z, want, model_terms(golden.config))


def test_a_process_copies_only_the_shards_of_its_devices(golden, monkeypatch):
    """As the third of eight hosts with a device each, which JAX is made to believe here."""
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 256)
    mesh, copied, copy = sharding.make_mesh(), [], copies.copy
    own, everywhere = mesh.devices.flat[2], NamedSharding.devices_indices_map

    def addressable(place, shape):
        return {own: everywhere(place, shape)[own]}

    def assemble(shape, place, shard):
        return jax.device_put(shard(addressable(place, shape)[own]))

    def counted(target, source):
        copied.append(target.size)
        return copy(target, source)

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", addressable)
    monkeypatch.setattr(jax, "make_array_from_callback", assemble)
    monkeypatch.setattr(reading, "copy", counted)
    shards = tree.flatten(medsiglip_jax.load(GOLDEN, mesh=mesh, fsdp=True).params)
    places = tree.flatten(sharding.param_shardings(golden.params, mesh, fsdp=True))
    for path, leaf in tree.items(golden.params):
        index = addressable(places[path], leaf.shape)[own]
        np.testing.assert_array_equal(shards[path], np.asarray(leaf)[index], err_msg=path)
    assert (
        sum(copied) == sum(shard.size for shard in shards.values()) < tree.size(golden.params) / 4
    )


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


@pytest.mark.parametrize("name", ["../../evil", "/evil", r"..\evil"])
def test_names_of_arrays_are_no_paths(golden, tmp_path, name):
    """orbax opens a file for each name in its metadata; those of checkpoints of training, too."""
    medsiglip_jax.save(golden, tmp_path / "model", format="orbax")
    folder = tmp_path / "model" / "params"
    metadata = json.loads((folder / "_METADATA").read_text())
    array = next(iter(metadata["tree_metadata"].values()))
    array["key_metadata"][-1]["key"] = name
    (folder / "_METADATA").write_text(json.dumps(metadata))
    say = "_METADATA names an array .*evil'; expected names, not paths"
    with pytest.raises(CheckpointError, match=f"model: cannot be opened: .*{say}"):
        medsiglip_jax.load(tmp_path / "model")
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(3, {"a": np.arange(3.0)})
        shutil.copy(folder / "_METADATA", tmp_path / "run" / "3" / "default")
        with pytest.warns(match=say), pytest.raises(ValueError, match=say):
            checkpoints.restore({"a": jax.ShapeDtypeStruct((3,), np.float32)})


@pytest.mark.parametrize("key, value", [
    ("vision.depth", 10**6), ("vision.image_size", 10**9), ("text.context_length", 10**9),
    ("text.vocab_size", 3),
])  # fmt: skip
def test_numbers_that_contradict_an_orbax_tree(golden, tmp_path, monkeypatch, key, value):
    medsiglip_jax.save(golden, tmp_path / "orbax", format="orbax")
    marker = tmp_path / "orbax" / "medsiglip_jax.json"
    content, (tower, name) = json.loads(marker.read_text()), key.split(".")
    content["config"][tower][name] = value
    marker.write_text(json.dumps(content))
    monkeypatch.setattr(towers, "param_shapes", pytest.fail)
    with pytest.raises(CheckpointError, match=rf"medsiglip_jax.json: {key} is {value}, and"):
        medsiglip_jax.load(tmp_path / "orbax")


@pytest.mark.parametrize("name, value", [
    ("image_size", 10**9), ("depth", 10**6), ("vocab_size", 10**9), ("context_length", 10**9),
    ("width", 10**7), ("mlp_dim", 10**12),
])  # fmt: skip
def test_what_no_tensors_contradict_has_limits(name, value):
    sizes = dict(image_size=28, patch_size=14, width=16, depth=1, mlp_dim=16, num_heads=2)
    absurd = config.two_towers(**sizes | {name: value})
    with pytest.raises(ValueError, match=f"{name} is {value}; expected at most"):
        medsiglip_jax.init(absurd)


@pytest.mark.parametrize("damage", ["missing", "{}", "[]", '{"tree_metadata": 3}', "null", "{"])
def test_a_damaged_orbax_tree_is_one_line(golden, tmp_path, damage):
    medsiglip_jax.save(golden, tmp_path / "orbax", format="orbax")
    metadata = tmp_path / "orbax" / "params" / "_METADATA"
    metadata.unlink() if damage == "missing" else metadata.write_text(damage)
    with pytest.raises(CheckpointError, match="cannot be opened: params") as caught:
        medsiglip_jax.load(tmp_path / "orbax")
    assert "NoneType" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("format", layouts.WRITABLE)
def test_info_names_a_tensor_that_is_not_finite(tmp_path, value, format):
    model = medsiglip_jax.init(FUZZED)
    model.params["img"]["embedding"]["bias"] = jax.numpy.full(4, value)
    medsiglip_jax.save(model, tmp_path / "m", format)
    with pytest.raises(
        CheckpointError, match="img/embedding/bias has 4 values that are NaN or inf"
    ):
        api.describe(tmp_path / "m")


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


MEMORY = """
import sys
import jax, orbax.checkpoint, medsiglip_jax.model.api
jax.numpy.zeros(1).block_until_ready()

def kilobytes(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1])

base = kilobytes("VmRSS")
model = medsiglip_jax.model.api.load(sys.argv[1])
jax.block_until_ready(model.params)
result = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(1024 * (kilobytes("VmHWM") - base) / result)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", layouts.WRITABLE)
def test_loading_takes_little_more_memory_than_the_result(tmp_path, format):
    """Pages of mapped files included. The bound at full size is 1.1 with all imports; here are 330
    MB, where what does not grow with the model weighs more. scripts/bench.py load measures it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("VmHWM is Linux's")
    architecture = config.two_towers(
        image_size=224, patch_size=16, width=1024, depth=2, mlp_dim=4096, num_heads=16
    )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), towers.param_shapes(architecture))
    medsiglip_jax.save(api.Model(zeros, architecture), tmp_path / "m", format=format)
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "m")]
    ratio = float(subprocess.run(code, check=True, capture_output=True, text=True).stdout)
    assert 1 < ratio < 1.3


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="so400m-448"):
        medsiglip_jax.init("so400m-449")
    with pytest.raises(ValueError, match="float32, bfloat16"):
        medsiglip_jax.load(GOLDEN, dtype="int8")
    with pytest.raises(ValueError, match="orbax, huggingface, big_vision"):
        medsiglip_jax.save(medsiglip_jax.load(GOLDEN), "x", format="onnx")
    with pytest.raises(ValueError, match="matmul_precision"):
        medsiglip_jax.load(GOLDEN, matmul_precision="tf33")
