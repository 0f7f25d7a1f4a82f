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
    got = medsiglip_jax.encode_files(model, paths, "serving", batch_size=2, on_batch=done.append)
    want = model.encode_image(model.processor.images(paths, "serving"))
    assert got.dtype == np.float32 and got.shape == (5, 16) and sum(done) == 5
    references.assert_close(got, want, references.model_terms(model.config))
    raw = medsiglip_jax.encode_files(model, paths[:1], normalize=False)
    assert abs(np.linalg.norm(raw) - 1) > 1e-3
    assert medsiglip_jax.encode_files(model, []).shape == (0, 16)


def test_unreadable_files_are_all_named_or_nan(model, pictures):
    paths = [pictures / "gone.png", pictures / "0.png", pictures / "sub/damaged.jpg"]
    with pytest.raises(ValueError, match="2 of 3 images .*gone.png: no such file; .*damaged.jpg: "):
        medsiglip_jax.encode_files(model, paths)
    got = medsiglip_jax.encode_files(model, paths, unreadable="nan")
    assert np.isnan(got).all(axis=1).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="30 of 30 .*; and 10 more"):
        medsiglip_jax.encode_files(model, [pictures / "gone.png"] * 30)
    for wrong in (dict(unreadable="skip"), dict(batch_size=0), dict(preprocess="clip")):
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


def test_an_orientation_that_is_not_applied_is_told_once(model, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(3):
        Image.new("RGB", (9, 7), "red").save(tmp_path / f"{i}.jpg", exif=turned)
    with pytest.warns(UserWarning, match="3 of 3 images carry an EXIF orientation") as told:
        medsiglip_jax.encode_files(model, sorted(tmp_path.iterdir()), batch_size=1)
    assert len(told) == 1
