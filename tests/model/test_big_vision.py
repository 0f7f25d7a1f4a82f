"""big_vision .npz files: every form in which they have been published."""

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import GOLDEN, assert_same

import medsiglip_jax
from medsiglip_jax.model import config, towers, tree
from medsiglip_jax.model.weights import big_vision
from medsiglip_jax.model.weights.checkpoint import CheckpointError


def unrolled(model) -> dict[str, np.ndarray]:
    arrays = {}
    for path, leaf in tree.items(model.params):
        if "/encoderblock/" not in path:
            arrays[path] = np.asarray(leaf)
            continue
        for i, layer in enumerate(np.asarray(leaf)):
            arrays[path.replace("/encoderblock/", f"/encoderblock_{i}/")] = layer
    return arrays


@pytest.mark.parametrize("prefix, scanned, bfloat16", [
    ("", False, False), ("params/", False, True), ("params/", True, True),
    ("opt/target/", True, False),
])  # fmt: skip
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


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_other_ways_to_write_the_same_arrays(golden, tmp_path, save):
    """Compressed, in Fortran order, and at odd places of the file, as an odd name makes them."""
    arrays = {k: np.asfortranarray(v) for k, v in unrolled(golden).items()}
    save(tmp_path / "m.npz", **{f"params/{k}": v for k, v in arrays.items()})
    assert_same(medsiglip_jax.load(tmp_path / "m.npz").params, golden.params)


@pytest.mark.parametrize("key", ["txt/head/kernel", "img/pos_embedding"])
def test_a_changed_value_is_noticed_by_its_checksum(golden, tmp_path, key):
    medsiglip_jax.save(golden, tmp_path / "m.npz", format="big_vision")
    content = bytearray((tmp_path / "m.npz").read_bytes())
    at = content.index(np.asarray(tree.flatten(golden.params)[key]).tobytes())
    content[at + 3] ^= 1
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{key}.*CRC-32|CRC-32.*{key}") as caught:
        medsiglip_jax.load(tmp_path / "m.npz")
    assert "\n" not in str(caught.value)


def test_an_archive_is_opened_once(golden, tmp_path, monkeypatch):
    medsiglip_jax.save(golden, tmp_path / "m.npz", format="big_vision")
    opened, archive = [], zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a, **k: opened.append(a) or archive(*a, **k))
    medsiglip_jax.load(tmp_path / "m.npz")
    # `outputs` has opened the file before, to see whether it is something else.
    assert sum(isinstance(file, Path) for file, *_ in opened) == 1


def test_big_vision_image_size_of_a_border_that_is_dropped():
    """384 px in patches of 14 leaves 6 px over: the shapes alone would say 378."""
    so400m = config.named("so400m-384")
    shapes = {p: x.shape for p, x in tree.items(towers.param_shapes(so400m))}
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
