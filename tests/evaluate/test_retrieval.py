"""Retrieval of a data set: which texts are searched, groups, the file, the table of the report."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from references import sorted_ranks

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import retrieval, tasks
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.evaluate.image_embeddings import ImageEmbeddings
from medsiglip_jax.evaluate.report import sections
from medsiglip_jax.files import places
from medsiglip_jax.inference.manifest import Manifest, Weights

TEXTS = ["photo of a a", "scan of a b", "Photo of a A!", "drawing of a c", "", "scan of a b"]
TASK = {
    "title": "Pairs", "kind": "pairs",
    "data": {"adapter": "csv", "text": "caption", "tables": [], "images": {"path": ["{image}"]}},
}  # fmt: skip


def dataset(texts, groups=None):
    """Images of those texts, of which nothing else is known."""
    ids = [f"{i}.png" for i in range(len(texts))]
    labels = np.zeros((len(texts), 0), np.float32)
    return Dataset(ids, ids, labels, (), groups, texts=list(texts))


def of_model(rows, vectors):
    manifest = Manifest(
        model=Weights(None, None), preprocess="big_vision", normalized=True, dim=1, parts=()
    )
    return ImageEmbeddings(dataset([]), rows, vectors, manifest)


def compute(model, task, found, embedded):
    return retrieval.compute(model, task, replace(embedded, whole=found))


def embedded(model, texts, rows=None):
    """Images that lie where their texts do."""
    rows = np.arange(len(texts)) if rows is None else np.asarray(rows)
    tokens, _ = model.processor.tokenizer.ids_and_cut([texts[i] or "nothing" for i in rows])
    return of_model(rows, 3 * np.asarray(model.encode_text(tokens)))


def test_every_text_is_searched_once(model):
    task = tasks.parse("pairs", TASK)
    table = compute(model, task, dataset(TEXTS), embedded(model, TEXTS))
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
    table = compute(model, task, dataset(texts), of_model(rows, z))
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
    compute(model, task, dataset(texts), of_model(np.arange(700), z))
    assert len(shapes) == 1 and len(calls) == -(-700 // calls[0]) < 10


def test_long_texts_are_counted(model):
    texts = ["a " * 80, "b " * 80, "photo of a a"]
    task = tasks.parse("pairs", TASK)
    found = retrieval.summary(compute(model, task, dataset(texts), embedded(model, texts)))
    assert found["truncated"] == 2
    assert "2 texts were longer" in sections.recalls({"retrieval": found}).text


def test_prompts_of_classes_are_texts(model):
    content = {
        "title": "Classes", "kind": "multi_class", "score": "cosine", "retrieval": "prompts",
        "data": {"adapter": "folders"},
        "classes": [{"name": "one", "present": ["photo of a a", "scan"]},
                    {"name": "two", "present": ["scan of a b"]}],
    }  # fmt: skip
    labels = np.array([[1, 0], [0, 1], [1, 0], [0, np.nan]], np.float32)
    ids = list("pqrs")
    found = Dataset(ids, ids, labels, ("one", "two"))
    shown = ["photo of a a", "scan of a b", "scan of a b", "drawing of a f"]
    table = compute(model, tasks.parse("c", content), found, embedded(model, shown))
    assert table["query"].to_pylist() == ["p", "q", "r", "p", "q"]
    # The third image shows one class and lies at the other: for that one it ties.
    assert table["rank"].to_pylist() == [1, 1, 2, 1, 2]


def test_groups_are_patients(model):
    task, groups = tasks.parse("pairs", TASK), ["p", "p", "q", "q", "q", "p"]
    table = compute(model, task, dataset(TEXTS, groups), embedded(model, TEXTS))
    assert table["group"].to_pylist() == ["p", "p", "q", "q", "p", "text 0", "p", "q"]
    found = retrieval.summary(table)
    # All were found, so patients are all that is known: 2, not 5.
    assert found["image_to_text"]["recall@1"]["low"] == metrics.wilson(2, 2).low
    assert found["text_to_image"]["recall@1"]["low"] == metrics.wilson(3, 3).low


def test_what_is_written_is_read(model, tmp_path):
    task = tasks.parse("pairs", TASK)
    table = compute(model, task, dataset(TEXTS, list("pqrstu")), embedded(model, TEXTS))
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
        compute(model, task, dataset(["", " .! "]), embedded(model, ["", ""]))
    content = {"title": "x", "kind": "multi_label", "score": "cosine",
               "data": {"adapter": "folders"}, "classes": [{"name": "a"}]}  # fmt: skip
    with pytest.raises(ValueError, match="no texts for retrieval"):
        compute(model, tasks.parse("x", content), dataset(TEXTS), embedded(model, TEXTS))


def test_the_section(model):
    task = tasks.parse("pairs", TASK)
    table = compute(model, task, dataset(TEXTS), embedded(model, TEXTS))
    section = sections.recalls({"retrieval": retrieval.summary(table)})
    assert len(section.header) == len(section.rows[0]) == len(section.rows[1]) == 8
    low = metrics.wilson(5, 5).low
    assert section.rows[0][:3] == ("text for image", "1.000", f"{low:.3f} to 1.000")
    assert section.rows[1][-1] == "1.0" and "5 images and 3 different texts" in section.text
    assert "1 images without a text" in section.text and "longer" not in section.text
