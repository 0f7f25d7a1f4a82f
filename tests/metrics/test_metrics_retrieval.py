"""Retrieval: ranks and recalls against a plain sort and scikit-learn; ties are no hits."""

import math

import numpy as np
import pytest
from references import sorted_ranks
from sklearn.metrics import top_k_accuracy_score

from medsiglip_jax import metrics
from medsiglip_jax.metrics import retrieval as ranking


def tied_case(seed):
    """Images and texts, some of them the very same vectors, with shared and lonely ids."""
    rng = np.random.default_rng(seed)
    n, m, d = rng.integers(20, 90), rng.integers(20, 90), rng.integers(3, 20)
    centres = rng.normal(size=(25, d)).astype(np.float32)
    image_ids, text_ids = rng.integers(0, 25, n), rng.integers(5, 30, m)
    noise = rng.integers(0, 2, (n, 1)) * rng.normal(size=(n, d))
    zimg = (centres[image_ids] + noise).astype(np.float32)
    # Powers of two, so that texts of other lengths still have the very same direction.
    ztxt = centres[rng.integers(0, 25, m)] * np.exp2(rng.integers(-2, 2, (m, 1)))
    ztxt = ztxt.astype(np.float32)
    return zimg, ztxt, image_ids, text_ids


@pytest.mark.parametrize("tile", [1, 7, 2048])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_those_of_a_sort(seed, tile, monkeypatch):
    monkeypatch.setattr(ranking, "_TILE", tile)
    zimg, ztxt, image_ids, text_ids = tied_case(seed)
    found = metrics.ranks(zimg, ztxt, image_ids, text_ids)
    want = sorted_ranks(zimg, ztxt, image_ids, text_ids)
    np.testing.assert_array_equal(found.image_to_text, want)
    want = sorted_ranks(ztxt, zimg, text_ids, image_ids)
    np.testing.assert_array_equal(found.text_to_image, want)
    assert (want > 1).any() and (want == 0).any()


@pytest.mark.parametrize("seed", range(2))
def test_order_of_rows_does_not_matter(seed, monkeypatch):
    """Not even for ties whose cosines come out of tiles of other shapes, rounded differently."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(60, 768)).astype(np.float32)
    zimg, ztxt = centres[rng.integers(60, size=101)], centres[rng.integers(60, size=100)]
    image_ids, text_ids = rng.integers(80, size=101), rng.integers(80, size=100)
    i, j = rng.permutation(101), rng.permutation(100)
    monkeypatch.setattr(ranking, "_TILE", 7)
    found = metrics.ranks(zimg, ztxt, image_ids, text_ids)
    moved = metrics.ranks(zimg[i], ztxt[j], image_ids[i], text_ids[j])
    np.testing.assert_array_equal(moved.image_to_text, found.image_to_text[i])
    np.testing.assert_array_equal(moved.text_to_image, found.text_to_image[j])


def test_ranks_of_pairs_give_the_recall_of_scikit_learn():
    rng = np.random.default_rng(0)
    zimg = rng.normal(size=(200, 16)).astype(np.float32)
    ztxt = (zimg + 1.5 * rng.normal(size=zimg.shape)).astype(np.float32)
    found = metrics.ranks(zimg, ztxt)
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (zimg, ztxt)]
    for got, cosines in (
        (found.image_to_text, unit[0] @ unit[1].T),
        (found.text_to_image, unit[1] @ unit[0].T),
    ):
        for k in (1, 5, 10):
            want = top_k_accuracy_score(np.arange(200), cosines, k=k)
            assert metrics.recall(got, k) == pytest.approx(want, abs=1e-12)
        assert metrics.median_rank(got) == np.median(got)
    recalls = metrics.recall_at_k(zimg, ztxt)
    assert recalls.image_to_text[5] == metrics.recall(found.image_to_text, 5)
    assert recalls.median_text_to_image == metrics.median_rank(found.text_to_image)


def test_a_perfect_model_a_collapsed_one_and_chance():
    rng = np.random.default_rng(0)
    z, other = rng.normal(size=(2, 2000, 32)).astype(np.float32)
    assert (metrics.ranks(z, z).image_to_text == 1).all()
    flat = metrics.ranks(z, np.ones_like(z))
    assert (flat.image_to_text == 2000).all()
    found = metrics.ranks(z, other).text_to_image
    for k in (1, 10, 200):  # five standard errors of the binomial
        p = k / 2000
        assert abs(metrics.recall(found, k) - p) < 5 * math.sqrt(p / 2000)
    assert abs(metrics.median_rank(found) - 1000) < 5 * 2000 / 2 / math.sqrt(2000)


@pytest.mark.parametrize("ids", [[0], [0, 1, 2, 3], [[0], [1], [2]]])
def test_ids_that_are_not_one_for_each_row_are_refused(ids):
    z = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"image_ids has shape .*; expected \(3,\)"):
        metrics.ranks(z, z, ids, [0, 1, 2])
    with pytest.raises(ValueError, match=r"text_ids has shape .*; expected \(3,\)"):
        metrics.recall_at_k(z, z, [0, 1, 2], ids)


def test_a_query_without_a_match_has_no_rank():
    z = np.eye(3, dtype=np.float32)
    found = metrics.ranks(z, z, np.array([0, 1, 2]), np.array([0, 7, 2]))
    assert found.image_to_text.tolist() == [1, 0, 1] == found.text_to_image.tolist()
    assert metrics.recall(found.image_to_text, 1) == 1 == metrics.median_rank(found.text_to_image)
    nothing = np.zeros(3, np.int64)
    assert math.isnan(metrics.recall(nothing, 1)) and math.isnan(metrics.median_rank(nothing))


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


def test_recall_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    image_ids, text_ids = np.arange(50), rng.permutation(np.repeat(np.arange(60), 3))
    image_ids[40:] = 100 + np.arange(10)  # images without a text, and texts without an image
    centres = rng.normal(size=(120, 16))
    zimg = (centres[image_ids] + rng.normal(size=(50, 16))).astype(np.float32)
    ztxt = (centres[text_ids] + rng.normal(size=(180, 16))).astype(np.float32)
    found = metrics.recall_at_k(zimg, 3 * ztxt, image_ids, text_ids, ks=(1, 5, 10))
    for k in (1, 5, 10):
        want = plain_recall(zimg, ztxt, image_ids, text_ids, k)
        assert (found.image_to_text[k], found.images) == want
        want = plain_recall(ztxt, zimg, text_ids, image_ids, k)
        assert (found.text_to_image[k], found.texts) == want
    assert 0 < found.image_to_text[1] < found.image_to_text[10] < 1


def test_recall_refuses():
    z = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="give image_ids and text_ids"):
        metrics.recall_at_k(z, z[:2])
    with pytest.raises(ValueError, match=r"ztxt: rows \[1\]"):
        metrics.recall_at_k(z, z * np.array([[1], [0], [1]], np.float32))
    with pytest.raises(ValueError, match="expected numbers >= 1"):
        metrics.recall_at_k(z, z, ks=(0,))
    nothing = metrics.recall_at_k(z, z, np.array([0, 1, 2]), np.array([3, 4, 5]))
    assert nothing.images == 0 and math.isnan(nothing.image_to_text[1])
