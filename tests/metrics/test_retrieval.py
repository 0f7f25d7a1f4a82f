"""Recall against a plain loop; ties are no hits."""

import math

import numpy as np
import pytest

from medsiglip_jax.metrics import recall_at_k, retrieval


def plain_recall(queries, targets, query_ids, target_ids, k):
    """Of one query after the other; no ties."""
    cosines = queries @ targets.T
    cosines /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(targets, axis=1)
    hits = [
        (target_ids[np.argsort(-row)[:k]] == id).any()
        for row, id in zip(cosines, query_ids, strict=True)
        if id in target_ids
    ]
    return np.mean(hits), len(hits)


@pytest.mark.parametrize("tile", [7, 64, 2048])
def test_recall_is_that_of_a_plain_loop(tile, monkeypatch):
    monkeypatch.setattr(retrieval, "_TILE", tile)
    rng = np.random.default_rng(0)
    image_ids, text_ids = np.arange(50), rng.permutation(np.repeat(np.arange(60), 3))
    image_ids[40:] = 100 + np.arange(10)  # images without a text, and texts without an image
    centres = rng.normal(size=(120, 16))
    zimg = (centres[image_ids] + rng.normal(size=(50, 16))).astype(np.float32)
    ztxt = (centres[text_ids] + rng.normal(size=(180, 16))).astype(np.float32)
    found = recall_at_k(zimg, 3 * ztxt, image_ids, text_ids, ks=(1, 5, 10))
    for k in (1, 5, 10):
        want = plain_recall(zimg, ztxt, image_ids, text_ids, k)
        assert (found.image_to_text[k], found.images) == want
        want = plain_recall(ztxt, zimg, text_ids, image_ids, k)
        assert (found.text_to_image[k], found.texts) == want
    assert 0 < found.image_to_text[1] < found.image_to_text[10] < 1


def test_recall_of_pairs_and_of_a_collapsed_model():
    z = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    found = recall_at_k(z, z)
    assert found.image_to_text == found.text_to_image == {1: 1, 5: 1, 10: 1}
    flat = recall_at_k(np.ones((30, 8), np.float32), z)
    assert flat.image_to_text[10] < 1 and flat.text_to_image == {1: 0, 5: 0, 10: 0}
    flat = recall_at_k(z, np.ones((30, 8), np.float32))
    assert flat.image_to_text == {1: 0, 5: 0, 10: 0} and flat.text_to_image[10] < 1


def test_recall_refuses():
    z = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="give image_ids and text_ids"):
        recall_at_k(z, z[:2])
    with pytest.raises(ValueError, match=r"ztxt: rows \[1\]"):
        recall_at_k(z, z * np.array([[1], [0], [1]], np.float32))
    with pytest.raises(ValueError, match="expected numbers >= 1"):
        recall_at_k(z, z, ks=(0,))
    nothing = recall_at_k(z, z, np.array([0, 1, 2]), np.array([3, 4, 5]))
    assert nothing.images == 0 and math.isnan(nothing.image_to_text[1])
