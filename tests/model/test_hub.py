"""Local copies of checkpoints on the Hugging Face hub and in buckets."""

import fsspec
import jax
import numpy as np
import pytest
from checkpoint_files import GOLDEN

import medsiglip_jax
from medsiglip_jax.model.weights import hub


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


def test_a_bucket_writes_nothing_outside_of_the_cache(tmp_path, monkeypatch):
    """An object's name may be "../x", which is no path there and is one on a disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage = fsspec.filesystem("memory")
    storage.pipe_file("/evil/model/config.json", b"{}")
    monkeypatch.setattr(type(storage), "find", lambda *_, **__: {"/evil/model/../../x": {}})
    with pytest.raises(ValueError, match="'../../x' leads out of .*; expected a path below it"):
        hub.fetch("memory://evil/model")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_single_file_in_a_bucket(bucket):
    model = medsiglip_jax.init("tiny-56")
    medsiglip_jax.save(model, f"{bucket}/models/tiny.npz", format="big_vision")
    loaded = medsiglip_jax.load(f"{bucket}/models/tiny.npz")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        medsiglip_jax.load(f"{bucket}/models/nothing")
