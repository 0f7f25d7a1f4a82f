"""Nearest vectors: exactly the float64 ranking, whatever the blocks."""

import numpy as np
import pytest
from embedding_runs import crowd, ranking

from medsiglip_jax.embeddings import cosines as products
from medsiglip_jax.embeddings.near_duplicates import near_duplicates
from medsiglip_jax.embeddings.nearest import top_k
from medsiglip_jax.embeddings.store import ArrayVectors


@pytest.mark.float
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("unit", [True, False])
def test_top_k_is_the_float64_ranking_whatever_the_blocks(dtype, unit):
    x, queries = crowd(3000, 48, dtype=dtype, unit=unit)
    if not unit:
        x *= np.linspace(0.01, 5, len(x), dtype=np.float32)[:, None].astype(dtype)
    for k in (1, 10, 700):
        want_scores, want = ranking(queries, x, k)
        for block_rows in (64, 1000, 3000):
            scores, rows = top_k(queries, ArrayVectors(x, unit, block_rows), k)
            np.testing.assert_array_equal(rows, want)
            np.testing.assert_allclose(scores, want_scores, rtol=0, atol=1e-15)
    one = top_k(queries[2:3], ArrayVectors(x, unit, 512), 10)
    for part, whole in zip(one, top_k(queries, ArrayVectors(x, unit, 64), 10), strict=True):
        np.testing.assert_array_equal(part[0], whole[2])  # to the bit


def test_float32_alone_would_not_do():
    """Or the test above could not fail."""
    x, queries = crowd(3000, 48, unit=True)
    plain = np.argsort(-(queries @ np.nan_to_num(x).T), axis=1, kind="stable")[:, :700]
    assert (plain != ranking(queries, x, 700)[1]).any()


def test_what_is_no_vector_comes_last():
    x = np.array([[0, 0], [-1, 0], [np.nan, 1], [1, 1], [np.inf, 0]], np.float32)
    scores, rows = top_k(np.array([[1.0, 0]], np.float32), ArrayVectors(x, block_rows=2), 9)
    assert rows.tolist() == [[3, 1, 0, 2, 4]]
    assert scores[0, 2:].tolist() == [-np.inf] * 3 and scores[0, 1] == -1
    assert near_duplicates(ArrayVectors(x), 0.5).rows.size == 0
    huge = np.array([[1e30, 1e30], [-3e38, 3e38], [1e-30, 0]], np.float32)
    for block_rows in (1, 3):
        scores, rows = top_k(
            np.array([[1.0, 0]], np.float32), ArrayVectors(huge, False, block_rows), 1
        )
        assert rows.tolist() == [[2]] and scores[0, 0] == 1
        _, rows = top_k(np.array([[1.0, 1]], np.float32), ArrayVectors(huge, False, block_rows), 1)
        assert rows.tolist() == [[0]]
    huge = np.concatenate([huge, huge * np.float32(0.5)])
    assert near_duplicates(ArrayVectors(huge), 0.999).rows.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_queries_are_checked():
    x = ArrayVectors(np.eye(4, dtype=np.float32))
    for query, k, say in (
        (np.ones((1, 3), np.float32), 1, r"expected \[q, 4\]"),
        (np.zeros((1, 4), np.float32), 1, "zero or not finite"),
        (np.full((1, 4), np.nan, np.float32), 1, "zero or not finite"),
        (np.ones((1, 4), np.float32), 0, "k is 0"),
    ):
        with pytest.raises(ValueError, match=say):
            top_k(query, x, k)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_products_of_accelerators_are_those_of_the_cpu(normalized, monkeypatch):
    x, queries = crowd(300, 48, unit=normalized, dtype=np.float16)
    want = [
        top_k(queries, ArrayVectors(x, normalized, 128), 20),
        near_duplicates(ArrayVectors(x), 0.99),
    ]
    monkeypatch.setattr(products, "_on_cpu", lambda: False)
    got = [
        top_k(queries, ArrayVectors(x, normalized, 128), 20),
        near_duplicates(ArrayVectors(x), 0.99),
    ]
    for one, other in zip(want, got, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
