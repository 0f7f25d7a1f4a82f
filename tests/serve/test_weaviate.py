"""What Weaviate's module multi2vec-clip asks."""

import numpy as np
import pytest

from medsiglip_jax.inference.encode import encode_files

TEXTS = ["photo of a a", "scan of a b"]


def test_vectors_of_texts_and_images(client, model, files, encoded):
    answer = client.post("/vectorize", {"texts": TEXTS, "images": encoded})
    assert answer.status == 200 and set(answer.body) == {"textVectors", "imageVectors"}
    ztxt = model.encode_text(model.processor.texts(TEXTS))
    np.testing.assert_allclose(answer.body["textVectors"], ztxt, atol=1e-5)
    zimg = encode_files(model, files).vectors
    np.testing.assert_allclose(answer.body["imageVectors"], zimg, atol=1e-5)


@pytest.mark.parametrize("absent", [{}, {"images": None}, {"images": []}])
def test_lists_may_be_absent_as_go_sends_them(client, absent):
    answer = client.post("/vectorize", {"texts": TEXTS, **absent})
    assert len(answer.body["textVectors"]) == 2 and answer.body["imageVectors"] == []


def test_what_it_asks_at_its_start(client):
    assert client.get("/.well-known/live").status == 204
    assert client.get("/.well-known/ready").status == 204
    assert client.get("/meta").body["model"] == "tiny"


@pytest.mark.parametrize("body, said", [
    ({"texts": [3]}, "texts[0]: expected a string"),
    ({"images": ["QUFB"]}, "images[0]: "),
    ({"texts": ["a"], "images": ["!"]}, "images[0]: image: expected base64"),
])  # fmt: skip
def test_an_error_is_a_string(client, body, said):
    answer = client.post("/vectorize", body)
    assert answer.status == 400 and answer.body["error"].startswith(said)
