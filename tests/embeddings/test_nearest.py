"""Nearest vectors: exactly the float64 ranking, whatever the blocks."""

import jax
import numpy as np
import pytest
from embedding_runs import crowd, ranking, write_run

from medsiglip_jax.embeddings import cosines as products
from medsiglip_jax.embeddings import nearest
from medsiglip_jax.embeddings.near_duplicates import near_duplicates
from medsiglip_jax.embeddings.nearest import top_k
from medsiglip_jax.embeddings.store import BLOCK_ROWS, ArrayVectors, Embeddings


def played_by_cpu() -> list[str]:
    """The types of vectors with which this CPU can stand in for an accelerator: one without F16C
    has no products of float16 in XLA."""
    try:
        jax.jit(lambda x: x @ x.T)(np.ones((2, 4), np.float16)).block_until_ready()
    except jax.errors.JaxRuntimeError:
        return ["f4"]
    return ["f2", "f4"]


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


@pytest.mark.parametrize("normalized", [True, False])
def test_what_is_no_vector_comes_last(normalized):
    x = np.array([[0, 0], [-1, 0], [np.nan, 1], [0.6, 0.8], [np.inf, 0]], np.float32)
    vectors = ArrayVectors(x, normalized, block_rows=2)
    scores, rows = top_k(np.array([[1.0, 0]], np.float32), vectors, 9)
    assert rows.tolist() == [[3, 1, 0, 2, 4]]
    assert scores[0, 2:].tolist() == [-np.inf] * 3 and scores[0, 1] == -1


@pytest.mark.parametrize("normalized", [True, False])
def test_what_is_no_vector_takes_no_place_of_a_hit(normalized):
    """A product of float32 gives 0 for zeros, which is above many cosines, and infinity or NaN for
    what is not finite. Orthogonal vectors have the same 0, and are hits."""
    angles = np.arccos([-0.9, -0.8, 0, 0, -0.1, -0.2])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    x[2:4], query = 0, np.array([[1, 0]], np.float32)
    assert top_k(query, ArrayVectors(x, normalized), 2)[1].tolist() == [[4, 5]]
    for value in np.inf, -np.inf, np.nan:
        x[2] = 0.5, value
        assert top_k(query, ArrayVectors(x, normalized), 1)[1].tolist() == [[4]]
    x[3] = 0, -1
    assert top_k(query, ArrayVectors(x, normalized), 2)[1].tolist() == [[3, 4]]


@pytest.mark.float
@pytest.mark.parametrize("accelerator", [False, True])
def test_rows_without_a_direction_change_no_hit_whatever_the_blocks(accelerator, monkeypatch):
    """Beside queries that they resemble little, where 0 would be a good score."""
    monkeypatch.setattr(products, "_on_cpu", lambda: not accelerator)
    dtypes = played_by_cpu() if accelerator else ["f2", "f4"]
    for seed in range(5 if accelerator else 25):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((rng.integers(1, 40), 4))
        x[:, 0] = -np.abs(x[:, 0]) * rng.integers(1, 4)
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(rng.choice(dtypes))
        for row in np.flatnonzero(rng.random(len(x)) < rng.random()):
            value = rng.choice([0, -0.0, np.inf, -np.inf, np.nan])
            x[row, rng.integers(4) if value else slice(None)] = value
        queries = np.eye(4, dtype=np.float32)[: rng.integers(1, 4)]
        k, normalized = int(rng.integers(1, 12)), seed % 4 > 0
        want_scores, want = ranking(queries, x, k)
        for block_rows in (1, int(rng.integers(2, 12)), len(x)):
            scores, rows = top_k(queries, ArrayVectors(x, normalized, block_rows), k)
            np.testing.assert_array_equal(rows, want)
            np.testing.assert_allclose(scores, want_scores, rtol=0, atol=1e-15)


def test_vectors_of_any_length_are_ranked():
    nothing = np.array([[0, 0], [np.nan, 1], [np.inf, 0], [0.6, 0.8]], np.float32)
    assert near_duplicates(ArrayVectors(nothing), 0.5).rows.size == 0
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
    x, queries = crowd(300, 48, unit=normalized, dtype=np.dtype(played_by_cpu()[0]))
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


def misplaced(x, numbers):
    """A copy that begins so many numbers after a multiple of 64 bytes."""
    buffer = np.empty(x.size + 32, x.dtype)
    start = -buffer.ctypes.data % 64 // x.itemsize + numbers
    place = buffer[start : start + x.size].reshape(x.shape)
    place[:] = x
    return place


@pytest.mark.float
@pytest.mark.parametrize("numbers", [0, 1, 4, 15])
def test_xla_reads_vectors_from_wherever_they_begin(numbers):
    """Each cosine within the margin, but where the next row is no vector: there NaN may be."""
    x, queries = crowd(2 * products._XLA_ROWS + 5, 40, unit=True)
    x[products._XLA_ROWS] = np.inf
    queries = products.unit(queries)
    vectors, scores = misplaced(x, numbers), np.empty((len(x), len(queries)), np.float32)
    with np.errstate(invalid="ignore"):
        products._XlaProduct(queries)(vectors, scores)
        exact = x.astype(np.float64) @ queries.T.astype(np.float64)
    no_vector = ~np.isfinite(x).all(axis=1)
    unknown = no_vector | np.roll(no_vector, -1)
    assert np.abs(scores - exact)[~unknown].max() < products.margin(x)
    assert np.isnan(scores[no_vector]).all() or not np.isfinite(scores[no_vector]).any()
    near = np.isfinite(scores) & np.isfinite(exact)
    assert np.abs(scores - exact)[near].max() < products.margin(x)


@pytest.mark.parametrize("order", ["C", "F", "strided", "odd bytes", "few numbers"])
@pytest.mark.parametrize("normalized", [True, False])
def test_top_k_by_xla_is_the_float64_ranking_too(order, normalized, monkeypatch):
    monkeypatch.setattr(products, "_XLA_ROWS", 256)
    x, queries = crowd(1500, 9 if order == "few numbers" else 24, unit=normalized)
    want = ranking(queries, x, 10)
    if order == "F":
        x = np.asfortranarray(x)
    elif order == "strided":
        x = np.repeat(x, 2, axis=0)[::2]
    elif order == "odd bytes":
        x = np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    scores, rows = top_k(queries, ArrayVectors(x, normalized, 700), 10)
    np.testing.assert_array_equal(rows, want[1])
    np.testing.assert_allclose(scores, want[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_blocks_from_files_are_multiplied_by_xla(tmp_path, dtype, monkeypatch):
    x, queries = crowd(2 * BLOCK_ROWS, 32, dtype=dtype)
    run, rows, matmul = (
        Embeddings(write_run(tmp_path, [x], row_group_size=len(x))),
        [],
        products._matmul,
    )

    def counted(vectors, queries):
        rows.append(len(vectors) + 1)  # the last of a piece is multiplied by itself
        return matmul(vectors, queries)

    monkeypatch.setattr(products, "_matmul", counted)
    top_k(queries, run, 3)
    assert sum(rows) == len(x)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_only_what_cannot_be_among_the_best_is_left_out(k):
    """Whatever the errors within the margin are; NaN may be any number."""
    rng = np.random.default_rng(k)
    scores, queries = rng.random(200).astype(np.float32), rng.integers(6, size=200)
    queries[queries == 4], scores[::23] = 5, np.nan
    margin = 0.01
    keep = nearest._contenders(scores, queries, k, margin)
    for query in range(6):
        own, kept = scores[queries == query], keep[queries == query]
        above = (own[None] - margin > own[:, None] + margin).sum(axis=1)
        np.testing.assert_array_equal(kept, above < k)
