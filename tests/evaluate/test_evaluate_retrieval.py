"""Retrieval: ranks against a plain sort, recalls with intervals, texts of a data set, the file."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from medsiglip_jax.evaluate.vectors import Vectors
from sklearn.metrics import top_k_accuracy_score

import medsiglip_jax
from medsiglip_jax import metrics
from medsiglip_jax.evaluate import retrieval, tasks
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.files import places
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


# ---------------------------------------------------------------------------------- of a data set

TEXTS = ["photo of a a", "scan of a b", "Photo of a A!", "drawing of a c", "", "scan of a b"]
TASK = {
    "title": "Pairs", "kind": "pairs",
    "data": {"adapter": "csv", "text": "caption", "tables": [], "images": {}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


def dataset(texts, groups=None):
    """Images of those texts, of which nothing else is known."""
    ids = [f"{i}.png" for i in range(len(texts))]
    labels = np.zeros((len(texts), 0), np.float32)
    return Dataset(ids, ids, labels, (), groups, texts=list(texts))


def embedded(model, texts, rows=None):
    """Images that lie where their texts do."""
    rows = np.arange(len(texts)) if rows is None else np.asarray(rows)
    tokens, _ = model.processor.tokenizer.ids_and_cut([texts[i] or "nothing" for i in rows])
    return Vectors(rows, 3 * np.asarray(model.encode_text(tokens)), {})


def test_every_text_is_searched_once(model):
    task = tasks.parse("pairs", TASK)
    table = retrieval.compute(model, task, dataset(TEXTS), embedded(model, TEXTS))
    assert table.to_pydict() == {
        "query": ["0.png", "1.png", "2.png", "3.png", "5.png",
                  "0.png", "1.png", "3.png"],
        "direction": ["image_to_text"] * 5 + ["text_to_image"] * 3,
        "rank": [1] * 8,
        "group": [None] * 8,
    }  # fmt: skip
    found = retrieval.summary(table)
    assert (found["images"], found["texts"], found["without_text"], found["truncated"]) == (
        5, 3, 1, 0
    )  # fmt: skip
    for direction, n in (("image_to_text", 5), ("text_to_image", 3)):
        assert found[direction]["median_rank"] == 1
        want = metrics.wilson(n, n)
        assert found[direction]["recall@1"] == {"value": 1, "low": want.low, "high": 1}


def test_ranks_are_of_the_images_that_were_embedded(model):
    """One of them, in the middle, has no text."""
    rng, task = np.random.default_rng(0), tasks.parse("pairs", TASK)
    texts = [f"{what} of a {part}" for what in ("photo", "scan") for part in "abcdef"]
    texts[6] = ""
    rows = np.delete(np.arange(12), 3)
    z = rng.normal(size=(11, model.config.embed_dim)).astype(np.float32)
    table = retrieval.compute(model, task, dataset(texts), Vectors(rows, z, {}))
    left = [texts[i] for i in rows if texts[i]]
    ztxt, z = np.asarray(model.encode_text(model.processor.texts(left))), z[rows != 6]
    numbers = np.arange(10)
    want = [
        *sorted_ranks(z, ztxt, numbers, numbers),
        *sorted_ranks(ztxt, z, numbers, numbers),
    ]
    assert table["rank"].to_pylist() == want and max(want) > 3
    assert table["query"].to_pylist() == [f"{i}.png" for i in rows if i != 6] * 2


def test_all_texts_go_through_one_program(model, monkeypatch):
    shapes, calls = set(), []
    encode = model._text

    def counted(params, tokens):
        calls.append(len(tokens))
        shapes.add(tokens.shape)
        return encode(params, tokens)

    monkeypatch.setattr(model, "_text", counted)
    texts = [" ".join(np.base_repr(i, 6).translate(str.maketrans("012345", "abcdef")))
             for i in range(700)]  # fmt: skip
    rng = np.random.default_rng(0)
    z = rng.normal(size=(700, model.config.embed_dim)).astype(np.float32)
    task = tasks.parse("pairs", TASK)
    retrieval.compute(model, task, dataset(texts), Vectors(np.arange(700), z, {}))
    assert len(shapes) == 1 and len(calls) == -(-700 // calls[0]) < 10


def test_long_texts_are_counted(model):
    texts = ["a " * 80, "b " * 80, "photo of a a"]
    task = tasks.parse("pairs", TASK)
    found = retrieval.summary(
        retrieval.compute(model, task, dataset(texts), embedded(model, texts))
    )
    assert found["truncated"] == 2
    assert "2 texts were longer" in retrieval.section(found).text


def test_prompts_of_classes_are_texts(model):
    content = {
        "title": "Classes", "kind": "multi_class", "score": "cosine", "retrieval": "prompts",
        "data": {"adapter": "csv"},
        "classes": [{"name": "one", "present": ["photo of a a", "scan"]},
                    {"name": "two", "present": ["scan of a b"]}],
    }  # fmt: skip
    labels = np.array([[1, 0], [0, 1], [1, 0], [0, np.nan]], np.float32)
    ids = list("pqrs")
    found = Dataset(ids, ids, labels, ("one", "two"))
    shown = ["photo of a a", "scan of a b", "scan of a b", "drawing of a f"]
    table = retrieval.compute(model, tasks.parse("c", content), found, embedded(model, shown))
    assert table["query"].to_pylist() == ["p", "q", "r", "p", "q"]
    # The third image shows one class and lies at the other: for that one it ties.
    assert table["rank"].to_pylist() == [1, 1, 2, 1, 2]


def test_groups_are_patients(model):
    task, groups = tasks.parse("pairs", TASK), ["p", "p", "q", "q", "q", "p"]
    table = retrieval.compute(model, task, dataset(TEXTS, groups), embedded(model, TEXTS))
    assert table["group"].to_pylist() == ["p", "p", "q", "q", "p", "text 0", "p", "q"]
    found = retrieval.summary(table)
    # All were found, so patients are all that is known: 2, not 5.
    assert found["image_to_text"]["recall@1"]["low"] == metrics.wilson(2, 2).low
    assert found["text_to_image"]["recall@1"]["low"] == metrics.wilson(3, 3).low


def test_what_is_written_is_read(model, tmp_path):
    task = tasks.parse("pairs", TASK)
    table = retrieval.compute(model, task, dataset(TEXTS, list("pqrstu")), embedded(model, TEXTS))
    path = places.at(tmp_path / retrieval.FILE)
    retrieval.write(path, table)
    again = retrieval.read(path)
    assert again.equals(table) and retrieval.summary(again) == retrieval.summary(table)
    with pytest.raises(FileNotFoundError, match="expected the --output of evaluate"):
        retrieval.read(places.at(tmp_path / "no.parquet"))
    (tmp_path / "text.parquet").write_text("no Parquet")
    pq.write_table(table.select(["query"]), tmp_path / "query.parquet")
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "bare.parquet")
    for name in ("text", "query", "bare"):
        with pytest.raises(ValueError, match=f"{name}.parquet: not ranks that evaluate wrote"):
            retrieval.read(places.at(tmp_path / f"{name}.parquet"))


def test_nothing_to_search(model):
    task = tasks.parse("pairs", TASK)
    with pytest.raises(ValueError, match="task pairs: none of the 2 images has a text"):
        retrieval.compute(model, task, dataset(["", " .! "]), embedded(model, ["", ""]))
    content = {"title": "x", "kind": "multi_label", "score": "cosine",
               "data": {"adapter": "csv"}, "classes": [{"name": "a"}]}  # fmt: skip
    with pytest.raises(ValueError, match="no texts for retrieval"):
        retrieval.compute(model, tasks.parse("x", content), dataset(TEXTS), embedded(model, TEXTS))


def test_the_section(model):
    task = tasks.parse("pairs", TASK)
    table = retrieval.compute(model, task, dataset(TEXTS), embedded(model, TEXTS))
    section = retrieval.section(retrieval.summary(table))
    assert len(section.header) == len(section.rows[0]) == len(section.rows[1]) == 8
    low = metrics.wilson(5, 5).low
    assert section.rows[0][:3] == ("text for image", "1.000", f"{low:.3f} to 1.000")
    assert section.rows[1][-1] == "1.0" and "5 images and 3 different texts" in section.text
    assert "1 images without a text" in section.text and "longer" not in section.text
