"""Near duplicates: exactly the pairs that float64 gives."""

import numpy as np
import pytest
from embedding_runs import all_pairs, crowd

from medsiglip_jax.embeddings import near_duplicates as pairwise
from medsiglip_jax.embeddings.near_duplicates import count_groups, near_duplicates
from medsiglip_jax.embeddings.store import ArrayVectors


@pytest.mark.float
@pytest.mark.parametrize("threshold", [0.99999999, 0.999, 1.0])
@pytest.mark.parametrize("second", [False, True])
def test_near_duplicates_are_all_pairs(threshold, second, monkeypatch):
    monkeypatch.setattr(pairwise, "_TILE_ROWS", 100)
    monkeypatch.setattr(pairwise, "_STRIP_PAIRS", 1500)
    x, y = crowd(300, 24)[0], crowd(200, 24, seed=1)[0] if second else None
    if y is not None:
        y[60:100] = 2 * x[100:140]
    want, exact = all_pairs(x, y, threshold)
    done = []
    other = None if y is None else ArrayVectors(y, block_rows=64)
    found = near_duplicates(ArrayVectors(x, block_rows=48), threshold, other, on_pairs=done.append)
    assert len(want) > 10 and not found.cut and sum(done) > len(want)
    np.testing.assert_array_equal(found.rows, want)
    np.testing.assert_array_equal(found.cosines, exact)


def test_the_limit_keeps_the_nearest_pairs(monkeypatch):
    monkeypatch.setattr(pairwise, "_STRIP_PAIRS", 512)
    x, _ = crowd(200, 24)
    want, exact = all_pairs(x, None, 0.5)
    for limit in (1, 7, len(want) - 1, len(want)):
        found = near_duplicates(ArrayVectors(x, block_rows=32), 0.5, limit=limit)
        np.testing.assert_array_equal(found.rows, want[:limit])
        np.testing.assert_array_equal(found.cosines, exact[:limit])
        assert found.cut == (limit < len(want))
    for wrong in (dict(threshold=0.0), dict(threshold=1.1), dict(threshold=0.5, limit=0)):
        with pytest.raises(ValueError, match="expected"):
            near_duplicates(ArrayVectors(x), **wrong)


def test_groups():
    assert count_groups(np.array([[1, 2], [5, 9], [2, 3], [9, 1], [7, 8]])) == 2
    assert count_groups(np.empty((0, 2), np.int64)) == 0


def test_strips_without_a_pair_take_no_memory():
    kept, none = pairwise._NearestPairs(0.9, 10), np.empty((0, 2), np.int64)
    for _ in range(100):
        kept.add(none, np.empty(0))
        kept.add(np.array([[0, 1]]), np.array([0.5]))
    assert not kept._waiting and not len(kept.pairs().rows)
