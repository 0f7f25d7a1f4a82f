"""Hugging Face's inference API: zero-shot image classification, and feature extraction."""

import numpy as np
import pytest

from medsiglip_jax.inference.classify import probabilities
from medsiglip_jax.inference.encode import encode_files

LABELS = ["a a", "a b", "a c"]
FEATURES = "/models/tiny/pipeline/feature-extraction"
IMAGES = "/models/tiny/pipeline/image-feature-extraction"


@pytest.mark.parametrize(
    "path", ["/", "/models/tiny", "/models/tiny/pipeline/zero-shot-image-classification"]
)
@pytest.mark.parametrize("template", [None, "scan of {}"])
def test_zero_shot_scores_are_sigmoids_the_highest_first(
    client, model, files, encoded, path, template
):
    parameters = {"candidate_labels": LABELS, "hypothesis_template": template}
    answer = client.post(path, {"inputs": encoded[0], "parameters": parameters})
    assert answer.status == 200
    texts = [(template or "This is a photo of {}.").format(label) for label in LABELS]
    ztxt = model.encode_text(model.processor.texts(texts))
    logits = np.asarray(model.similarity(encode_files(model, files[:1]).vectors, ztxt))
    expected = dict(zip(LABELS, probabilities(logits)[0][0], strict=True))
    scores = [found["score"] for found in answer.body]
    assert scores == sorted(scores, reverse=True)
    assert {f["label"]: f["score"] for f in answer.body} == pytest.approx(expected, rel=1e-4, abs=0)


@pytest.mark.parametrize("given", [LABELS, LABELS[0]])
@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("path", ["/", FEATURES, "/pipeline/feature-extraction/tiny"])
def test_features_of_texts(client, model, given, normalize, path):
    answer = client.post(path, {"inputs": given, "normalize": normalize})
    texts = [given] if isinstance(given, str) else given
    ids = model.processor.texts(texts)
    expected = model.encode_text(ids, normalize=normalize is not False)
    np.testing.assert_allclose(answer.body, expected, atol=1e-5)


def test_features_of_images(client, model, files, encoded):
    answer = client.post(IMAGES, {"inputs": encoded})
    np.testing.assert_allclose(answer.body, encode_files(model, files).vectors, atol=1e-5)


def test_a_text_that_is_cut(client):
    long = {"inputs": ["a", "photo of a b " * 40]}
    assert client.post("/", long).headers["x-texts-cut"] == "1"
    answer = client.post("/", {**long, "truncate": False})
    assert answer.status == 400 and answer.body["error"].startswith("truncate: 1 of the texts")


@pytest.mark.parametrize("path, body, status, said", [
    ("/", {}, 400, "inputs: missing"),
    ("/", {"inputs": 3}, 400, "inputs: expected a list"),
    ("/", {"inputs": "a", "prompt_name": "query"}, 400, "prompt_name: this model has no prompts"),
    ("/", {"inputs": "a", "dimensions": 3}, 400, "dimensions: vectors of this model have"),
    ("/", {"inputs": "a", "truncation_direction": "left"}, 400, "truncation_direction: expected"),
    ("/", {"inputs": "!", "parameters": {"candidate_labels": ["a"]}}, 400,
     "inputs: image: expected base64"),
    ("/", {"inputs": "!", "parameters": {"candidate_labels": []}}, 400,
     "parameters.candidate_labels: expected at least one"),
    ("/", {"inputs": "!", "parameters": {"candidate_labels": [3]}}, 400,
     "parameters.candidate_labels[0]: expected a string"),
    ("/", {"inputs": "!", "parameters": {"candidate_labels": ["a"], "hypothesis_template": "b"}},
     400, "parameters.hypothesis_template: expected {} in it"),
    ("/models/bert", {"inputs": "a"}, 404, "model: not served here"),
    ("/models/tiny/pipeline/summarization", {"inputs": "a"}, 404, "task: expected"),
])  # fmt: skip
def test_a_request_that_is_wrong(client, path, body, status, said):
    answer = client.post(path, body)
    assert answer.status == status
    assert answer.body["error"].startswith(said), answer.body
