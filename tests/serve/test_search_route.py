"""Search in embeddings through the server, and what it shows of them."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from medsiglip_jax.data import inputs
from medsiglip_jax.embeddings import index, store
from medsiglip_jax.embeddings import search as searching
from medsiglip_jax.inference import embed
from medsiglip_jax.serve.corpus import Corpus
from medsiglip_jax.serve.settings import Settings


@pytest.fixture(scope="module")
def run_folder(model, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "run"
    embed.embed(model, inputs.rows([str(file) for file in files]), folder, embed.EmbedOptions())
    return folder


@pytest.fixture(scope="module")
def searched(model, run_folder, serving):
    chosen = Settings(port=0, max_batch=2, drain_delay=0.0)
    with serving(model, chosen, corpus=Corpus(run_folder)) as client:
        yield client


def test_hits_are_those_of_the_command(searched, model, run_folder, files, encoded):
    embeddings = store.Embeddings(run_folder)
    texts, images = ["photo of a a"], [str(files[1])]
    by_text, by_image = searching.search(model, embeddings, texts, images, 3)
    for query, expected in (({"text": texts[0]}, by_text), ({"image": encoded[1]}, by_image)):
        answer = searched.post("/v1/search", {**query, "top_k": 3})
        assert answer.status == 200
        hits = answer.body["hits"]
        assert [h["id"] for h in hits] == [h["id"] for h in expected["hits"]]
        scores = [h["score"] for h in expected["hits"]]
        np.testing.assert_allclose([h["score"] for h in hits], scores, atol=1e-5)
    assert searched.get("/v1/info").body["search"] is True


def test_a_row_is_most_similar_to_itself_and_has_a_picture(searched, files):
    found = searched.post("/v1/search", {"text": "a", "top_k": 4}).body["hits"]
    [row] = [hit["row"] for hit in found if hit["id"].endswith("grey.png")]  # unlike all others
    [first, *_] = searched.post("/v1/search", {"row": row, "top_k": 2}).body["hits"]
    assert first["row"] == row and first["score"] == pytest.approx(1, abs=1e-5)
    answer = searched.get(first["thumbnail"])
    assert answer.headers["content-type"] == "image/png"
    assert max(Image.open(io.BytesIO(answer.body)).size) <= 256


@pytest.mark.parametrize("body, said", [
    ({}, "exactly one of text, image, row"), ({"text": "a", "row": 1}, "exactly one of"),
    ({"row": 99}, "there is no such row"), ({"row": -1}, "whole number"),
    ({"text": "a", "top_k": 100_000}, "at most 1000"), ({"image": "!"}, "base64"),
    ({"text": "a", "extra": 1}, "not known"),
])  # fmt: skip
def test_a_query_that_is_wrong_is_told(searched, body, said):
    answer = searched.post("/v1/search", body)
    assert answer.status == 400 and said in answer.body["error"]["message"]


def test_pictures_are_of_rows_only(searched):
    for path in ("/v1/thumbnails/99", "/v1/thumbnails/-1", "/v1/thumbnails/..%2f..%2fetc%2fpasswd"):
        assert searched.get(path).status == 404


def test_there_is_no_search_without_embeddings(client):
    assert client.post("/v1/search", {"text": "a"}).status == 404
    assert client.get("/v1/info").body["search"] is False


def test_embeddings_of_another_model_are_refused(run_folder):
    import references

    import medsiglip_jax
    from medsiglip_jax.serve.state import State

    other = medsiglip_jax.init(references.SMALL, seed=7)
    with pytest.raises(ValueError):
        State(Settings(), "x", corpus=Corpus(run_folder)).check(other)


def test_the_page_is_for_this_machine_or_for_those_with_a_key(searched):
    from medsiglip_jax.serve import page
    from medsiglip_jax.serve.state import State

    assert searched.get("/ui").headers["content-security-policy"].startswith("default-src 'none'")
    outside = Settings(host="0.0.0.0")
    assert not page.routes(State(outside, "x"))
    keyed = Settings(host="0.0.0.0", api_keys=frozenset(["0123456789abcdef"]))
    assert page.routes(State(keyed, "x"))


def test_an_index_that_cannot_be_used_is_told_and_not_used(run_folder, tmp_path):
    pytest.importorskip("usearch")
    folder = tmp_path / "indexed"
    shutil.copytree(run_folder, folder)
    index.build(store.Embeddings(folder))
    assert Corpus(folder)._top_k is index.top_k
    with open(folder / index.INDEX, "r+b") as file:
        file.write(b"damaged")
    with pytest.warns(UserWarning, match="damaged or not the one.*; until then all vectors are"):
        damaged = Corpus(folder)
    assert len(damaged.find(damaged.vector(0), 2)) == 2


def test_a_picture_that_a_failing_disk_holds_may_be_asked_for_again(searched, monkeypatch):
    def fails(self, row):
        raise OSError(5, "Input/output error", "/secret/a.png")

    monkeypatch.setattr(Corpus, "thumbnail", fails)
    answer = searched.get("/v1/thumbnails/0")
    assert answer.status == 503 and "retry-after" in answer.headers
    assert "secret" not in str(answer.body)
