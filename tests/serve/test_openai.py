"""OpenAI's embeddings, and images in the forms of infinity and of vLLM."""

import base64
import json

import numpy as np
import pytest

from medsiglip_jax.inference.encode import encode_files

TEXTS = ["photo of a a", "scan of a b"]
LONG = "photo of a b " * 40


def ask(client, **body):
    return client.post("/v1/embeddings", body)


def vectors(answer) -> np.ndarray:
    assert answer.status == 200, answer.body
    assert [d["index"] for d in answer.body["data"]] == list(range(len(answer.body["data"])))
    assert {d["object"] for d in answer.body["data"]} == {"embedding"}
    return np.array([d["embedding"] for d in answer.body["data"]])


def data_uri(content: str) -> str:
    return f"data:image/png;base64,{content}"


@pytest.mark.parametrize("given, expected", [(TEXTS, TEXTS), (TEXTS[1], TEXTS[1:])])
def test_texts(client, model, given, expected):
    answer = ask(client, model="tiny", input=given, user="ignored")
    rows = np.asarray(model.encode_text(model.processor.texts(expected)))
    np.testing.assert_allclose(vectors(answer), rows, atol=1e-5)
    assert answer.body["object"] == "list" and answer.body["model"] == "tiny"


def test_base64_is_float32_little_endian(client):
    plain = vectors(ask(client, input=TEXTS))
    answer = ask(client, input=TEXTS, encoding_format="base64")
    rows = [base64.b64decode(d["embedding"]) for d in answer.body["data"]]
    np.testing.assert_array_equal([np.frombuffer(r, "<f4") for r in rows], plain.astype("<f4"))


def test_usage_counts_tokens_and_a_header_the_texts_that_were_cut(client, model):
    tokenizer = model.processor.tokenizer
    usage = {}
    for text in (*TEXTS, "", LONG, TEXTS[0]):  # the last is known
        answer = ask(client, input=text)
        usage[text] = answer.body["usage"]["prompt_tokens"]
        assert answer.body["usage"]["total_tokens"] == usage[text]
        assert answer.headers.get("x-texts-cut") == ("1" if text == LONG else None)
    # What a row begins with up to its first end token.
    counted = {t: tokenizer([t], warn=False)[0].tolist().index(1) + 1 for t in usage}
    assert usage == counted
    both = ask(client, input=[*TEXTS, LONG]).body["usage"]["prompt_tokens"]
    assert both == sum(usage[t] for t in (*TEXTS, LONG))


def test_images_as_infinity_takes_them(client, model, files, encoded):
    answer = ask(client, input=[*map(data_uri, encoded)], modality="image")
    np.testing.assert_allclose(vectors(answer), encode_files(model, files).vectors, atol=1e-5)
    assert answer.body["usage"]["prompt_tokens"] == 0


@pytest.mark.parametrize("empty", [[], [{"type": "text", "text": ""}]])
def test_an_image_as_vllm_takes_it(client, model, files, encoded, empty):
    part = {"type": "image_url", "image_url": {"url": data_uri(encoded[1])}}
    answer = ask(client, messages=[{"role": "user", "content": [part, *empty]}])
    np.testing.assert_allclose(vectors(answer), encode_files(model, files[1:2]).vectors, atol=1e-5)


@pytest.mark.parametrize("content", [TEXTS[0], [{"type": "text", "text": TEXTS[0]}]])
def test_a_text_as_vllm_takes_it(client, content):
    answer = ask(client, messages=[{"role": "user", "content": content}])
    np.testing.assert_array_equal(vectors(answer), vectors(ask(client, input=TEXTS[0])))


PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QQ=="}}


@pytest.mark.parametrize("body, param, said", [
    ({}, "input", "input: missing"),
    ({"input": []}, "input", "input: expected at least one"),
    ({"input": [1, 2, 3]}, "input", "input: token ids are not taken"),
    ({"input": [[1, 2], [3]]}, "input", "input: token ids are not taken"),
    ({"input": ["a", None]}, "input", "input[1]: expected a string"),
    ({"input": "a", "dimensions": 3}, "dimensions", "dimensions: vectors of this model have"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "encoding_format: expected"),
    ({"input": "a", "modality": "audio"}, "modality", "modality: expected one of text, image"),
    ({"input": ["QQ==", "data:x"], "modality": "image"}, "input", "input[1]: expected a data URI"),
    ({"input": ["***"], "modality": "image"}, "input", "input[0]: image: expected base64"),
    ({"input": ["http://127.0.0.1/x"], "modality": "image"}, "input", "input[0]: this server fet"),
    ({"input": ["a", "\ud800"]}, "input", "input[1]: the text cannot be written as UTF-8"),
    ({"messages": [{"role": "user", "content": [PART, PART]}]}, "messages",
     "messages: expected one text or one image_url, got 2"),
    ({"messages": [{"role": "user", "content": [PART]}]}, "messages",
     "messages[0].content[0]: not an image"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages",
     "messages[0].content[0].type: expected one of"),
])  # fmt: skip
def test_a_request_that_is_wrong_gets_openais_error(client, body, param, said):
    answer = ask(client, **body)
    assert answer.status == 400 and len(json.dumps(answer.body)) < 1024
    error = answer.body["error"]
    assert error["message"].startswith(said)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param and error["code"] is None


def test_dimensions_of_the_model_are_no_error(client, model):
    answer = ask(client, input="a", dimensions=model.config.embed_dim)
    assert vectors(answer).shape == (1, model.config.embed_dim)


def test_models(client):
    [found] = client.get("/v1/models").body["data"]
    assert found["id"] == "tiny" and found["object"] == "model"
    assert client.get("/v1/models/tiny").body == found
    for answer in (client.get("/v1/models/gpt"), ask(client, model="gpt", input="a")):
        assert answer.status == 404
        assert answer.body["error"]["code"] == "model_not_found"
