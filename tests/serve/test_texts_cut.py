"""A text that is longer than the model reads: every route says so in a header."""

import pytest

LONG = "photo of a b " * 40
TENSOR = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a", LONG]}
# With an image where there has to be one.
REQUESTS = {
    "/predict": {"instances": [{"text": "a"}, {"text": LONG}]},
    "/v1/classify": {"images": ["IMAGE"], "texts": ["a", LONG]},
    "/v1/embeddings": {"input": ["a", LONG]},
    "/": {"inputs": ["a", LONG]},
    "/v2/models/tiny/infer": {"inputs": [TENSOR]},
    "/vectorize": {"texts": ["a", LONG]},
}


@pytest.mark.parametrize("path", REQUESTS)
def test_the_header_counts_texts_that_were_cut(client, encoded, path):
    body = dict(REQUESTS[path])
    if "images" in body:
        body["images"] = encoded[:1]
    for _ in range(2):  # the second time from the cache of texts
        answer = client.post(path, body)
        assert answer.status == 200
        assert answer.headers["x-texts-cut"] == "1"


def test_our_own_answer_has_the_count(client, encoded):
    body = {"images": encoded[:1], "texts": [LONG, "a", LONG + "c"]}
    assert client.post("/v1/classify", body).body["cut"] == 2
    answer = client.post("/v1/classify", {**body, "texts": ["a", "b"]})
    assert answer.body["cut"] == 0 and "x-texts-cut" not in answer.headers
