"""Retrieval: ranks against a plain sort, recalls with intervals."""

import math

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from medsiglip_jax import metrics
from medsiglip_jax.metrics import retrieval as ranking

# ------------------------------------------------------------------------------------------ ranks


def sorted_ranks(queries, targets, query_ids, target_ids):
    """One argsort per query, ties to those that do not match."""
    queries, targets = (x.astype(np.float64) for x in (queries, targets))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    found = []
    for cosines, id in zip((queries @ targets.T).round(7), query_ids, strict=True):
        match = target_ids == id
        order = np.lexsort((match, -cosines))
        found.append(np.flatnonzero(match[order])[0] if match.any() else -1)
    # Matches that come before the best are none, so its place is one more than who is ahead.
    return np.array(found) + 1


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
@pytest.mark.parametrize("seed", range(10))
def test_ranks_are_those_of_a_sort(seed, tile, monkeypatch):
    monkeypatch.setattr(ranking, "_TILE", tile)
    zimg, ztxt, image_ids, text_ids = tied_case(seed)
    found = metrics.ranks(zimg, ztxt, image_ids, text_ids)
    want = sorted_ranks(zimg, ztxt, image_ids, text_ids)
    np.testing.assert_array_equal(found.image_to_text, want)
    want = sorted_ranks(ztxt, zimg, text_ids, image_ids)
    np.testing.assert_array_equal(found.text_to_image, want)
    assert (want > 1).any() and (want == 0).any()


@pytest.mark.parametrize("seed", range(5))
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


def test_a_query_without_a_match_has_no_rank():
    z = np.eye(3, dtype=np.float32)
    found = metrics.ranks(z, z, np.array([0, 1, 2]), np.array([0, 7, 2]))
    assert found.image_to_text.tolist() == [1, 0, 1] == found.text_to_image.tolist()
    assert metrics.recall(found.image_to_text, 1) == 1 == metrics.median_rank(found.text_to_image)
    nothing = np.zeros(3, np.int64)
    assert math.isnan(metrics.recall(nothing, 1)) and math.isnan(metrics.median_rank(nothing))


# -------------------------------------------------------------------------------------- intervals


def test_an_interval_without_groups_is_wilsons():
    for hits in ([True, False, True, True], [False] * 7, [True] * 3):
        want = metrics.wilson(sum(hits), len(hits))
        assert metrics.proportion(np.array(hits)) == want
        alone = metrics.proportion(np.array(hits), np.arange(len(hits)))
        # Of groups of one row each the variance has n - 1 below it, which only widens.
        assert alone.value == want.value and alone.low <= want.low and alone.high >= want.high
    assert math.isnan(metrics.proportion(np.zeros(0, bool)).value)
    with pytest.raises(ValueError, match=r"groups has shape \(2,\); expected \(3,\)"):
        metrics.proportion(np.ones(3, bool), [1, 2])


def test_copies_of_rows_within_groups_say_nothing_new():
    rng = np.random.default_rng(0)
    hits, groups = rng.random(60) < 0.3, np.arange(60)
    one = metrics.proportion(hits, groups)
    many = metrics.proportion(np.repeat(hits, 9), np.repeat(groups, 9))
    assert (many.low, many.high) == pytest.approx((one.low, one.high), abs=1e-12)
    order = rng.permutation(540)
    shuffled = metrics.proportion(np.repeat(hits, 9)[order], np.repeat(groups, 9)[order])
    assert (shuffled.low, shuffled.high) == pytest.approx((one.low, one.high), abs=1e-12)
    blind = metrics.wilson(int(9 * hits.sum()), 540)
    assert many.high - many.low > 2.5 * (blind.high - blind.low)
    never = metrics.proportion(np.zeros(90, bool), np.repeat(np.arange(10), 9))
    assert never.high == pytest.approx(metrics.wilson(0, 10).high)
    alike = metrics.proportion(np.tile([True, False, False], 30), np.repeat(np.arange(30), 3))
    assert alike.high == pytest.approx(metrics.wilson(10, 30).high)
    assert alike.value == pytest.approx(1 / 3)


def test_intervals_of_groups_hold_the_truth():
    """Of patients who have 1 to 8 images that are hit alike; 95 % should hold it."""
    rng, held, blind = np.random.default_rng(0), 0, 0
    for _ in range(400):
        sizes = rng.integers(1, 9, 60)
        groups = np.repeat(np.arange(60), sizes)
        hits = rng.random(len(groups)) < rng.beta(0.6, 2.4, 60)[groups]  # 0.2 on the whole
        held += 0.2 in metrics.proportion(hits, groups)
        blind += 0.2 in metrics.proportion(hits)
    assert 0.91 <= held / 400 <= 0.99 and blind / 400 < 0.88
