"""Embedding files in one call: order, unreadable files, batches that waste little."""

import numpy as np
import pytest
import references
from PIL import Image

import medsiglip_jax
from medsiglip_jax.inference import encode
from medsiglip_jax.inference.engine import Engine


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


def test_files_have_the_vectors_of_their_pixels(model, pictures):
    paths = [pictures / "sub/5.jpg", *(pictures / f"{i}.png" for i in range(4))]
    done = []
    encoded = medsiglip_jax.encode_files(
        model, paths, "serving", batch_size=2, on_batch=done.append
    )
    got, indices, errors = encoded
    want = model.encode_image(model.processor.images(paths, "serving"))
    assert got.dtype == np.float32 and got.shape == (5, 16) and sum(done) == 5
    assert indices.tolist() == [0, 1, 2, 3, 4] and errors == [] and encoded.complete() is got
    references.assert_close(got, want, references.model_terms(model.config))
    raw = medsiglip_jax.encode_files(model, paths[0], normalize=False).vectors
    assert abs(np.linalg.norm(raw) - 1) > 1e-3
    nothing = medsiglip_jax.encode_files(model, [])
    assert nothing.vectors.shape == (0, 16) and nothing.indices.shape == (0,)


def test_unreadable_files_are_named_and_the_others_have_their_vectors(model, pictures):
    paths = [pictures / "gone.png", pictures / "0.png", pictures / "sub/damaged.jpg"]
    got = medsiglip_jax.encode_files(model, paths)
    assert got.indices.tolist() == [1]
    assert [path for path, _ in got.errors] == [str(paths[0]), str(paths[2])]
    assert got.errors[0][1] == "no such file" and all(reason for _, reason in got.errors)
    want = model.encode_image(model.processor.images(paths[1]))
    references.assert_close(got.vectors, want, references.model_terms(model.config))
    with pytest.raises(ValueError, match="2 of 3 images .*gone.png: no such file; .*damaged.jpg: "):
        got.complete()
    gone = medsiglip_jax.encode_files(model, [pictures / "gone.png"] * 30)
    assert gone.vectors.shape == (0, 16) and len(gone.errors) == 30
    with pytest.raises(ValueError, match="30 of 30 .*; and 10 more"):
        gone.complete()
    for wrong in (dict(batch_size=0), dict(preprocess="clip")):
        with pytest.raises(ValueError, match="expected"):
            medsiglip_jax.encode_files(model, paths[1:2], **wrong)


@pytest.mark.parametrize("count, batch_size, size", [(9, 8, 5), (3, 8, 3), (16, 8, 8), (5, 1, 1)])
def test_batches_are_equal(model, pictures, monkeypatch, count, batch_size, size):
    sizes = []

    class Spied(Engine):
        def run(self, batches):
            sizes.append(self._size)
            return super().run(batches)

    monkeypatch.setattr(encode, "Engine", Spied)
    medsiglip_jax.encode_files(model, [pictures / "0.png"] * count, batch_size=batch_size)
    assert sizes == [size]


def test_paths_are_asked_for_as_they_are_needed(model, pictures, monkeypatch):
    """A generator of many paths is never far ahead of what is done."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    given, done, ahead = 0, 0, []

    def paths():
        nonlocal given
        for i in range(120):
            given += 1
            yield pictures / ("gone.png" if i % 10 == 9 else f"{i % 4}.png")

    def on_batch(count):
        nonlocal done
        done += count
        ahead.append(given - done)

    got = medsiglip_jax.encode_files(model, paths(), batch_size=2, on_batch=on_batch)
    assert done == 120 and len(got.vectors) == 108 and len(got.errors) == 12
    assert got.indices.tolist() == [i for i in range(120) if i % 10 != 9]
    assert max(ahead) <= 2 * (2 + 2 // 2 + 1 + 2 + 1)  # read ahead, running, and the one yielded


def test_an_orientation_that_is_not_applied_is_told_once(model, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(3):
        Image.new("RGB", (9, 7), "red").save(tmp_path / f"{i}.jpg", exif=turned)
    with pytest.warns(UserWarning, match="3 of 3 images carry an EXIF orientation") as told:
        medsiglip_jax.encode_files(model, sorted(tmp_path.iterdir()), batch_size=1)
    assert len(told) == 1
