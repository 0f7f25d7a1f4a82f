"""/v1/classify: scores equal those of `classify`, `probe predict` and a model's own classifier."""

import base64

import numpy as np
import pytest

import medsiglip_jax
from medsiglip_jax.embeddings import provenance
from medsiglip_jax.embeddings.probe import linear, prediction
from medsiglip_jax.inference.classifier import classify_labels
from medsiglip_jax.inference.classify import classify
from medsiglip_jax.model.api import Model
from medsiglip_jax.model.config import ClassifierConfig, ModelConfig
from medsiglip_jax.serve.settings import Settings
from medsiglip_jax.serve.state import State

TEXTS = ["photo of a a", "scan of a b", "drawing of a c"]
SETTINGS = Settings(port=0, max_batch=4, drain_delay=0.0)


def columns(results, *names):
    return [[[score[name] for name in names] for score in r["scores"]] for r in results]


def test_texts_are_scored_as_by_the_command(client, model, files, encoded):
    sent = [encoded[0], f"data:image/png;base64,{encoded[1]}", {"bytes": encoded[2]}, "*"]
    answer = client.post("/v1/classify", {"images": sent, "texts": TEXTS})
    *found, wrong = answer.body["results"]
    expected = classify(model, [str(file) for file in files[:3]], TEXTS)
    names = ("logit", "sigmoid", "softmax")
    np.testing.assert_allclose(columns(found, *names), columns(expected, *names), atol=1e-5)
    assert columns(found, "text") == columns(expected, "text")
    assert wrong["error"]["code"] == "INVALID_REQUEST_FIELD_ERROR"


@pytest.fixture(scope="module")
def probe(model) -> linear.Probe:
    """Of vectors that were made with another preset than the server's, and not normalised."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, model.config.embed_dim)).astype(np.float32)
    labels = (vectors[:, :2] > 0).astype(np.float32)
    made = provenance.of_model(model, "serving", False)
    rows = vectors[:40], labels[:40], vectors[40:], labels[40:]
    return linear.fit(*rows, ("effusion", "nodule"), provenance=made)


def test_a_probe_scores_images_read_as_in_its_training(model, files, encoded, probe, serving):
    expected = prediction.predict_inputs(probe, model, [str(file) for file in files])
    with serving(model, SETTINGS, probes={"findings": probe}) as client:
        assert client.get("/v1/info").body["probes"] == ["findings"]
        found = client.post("/v1/classify", {"images": encoded, "probe": "findings"})
        other = client.post("/v1/classify", {"images": encoded, "probe": "other"})
    assert columns(found.body["results"], "label") == columns(expected, "class")
    for name in ("probability", "positive"):
        given, wanted = columns(found.body["results"], name), columns(expected, name)
        np.testing.assert_allclose(given, wanted, atol=1e-5)
    assert other.status == 400 and "findings" in other.body["error"]["message"]


@pytest.mark.parametrize("pool", ["map", "mean"])
def test_a_classifier_scores_images_by_its_own_pooling(model, files, encoded, serving, pool):
    own = ClassifierConfig(("a", "b", "c"), pool, True, (0.5, None, 0.2), "serving")
    rng, width = np.random.default_rng(0), model.config.embed_dim
    head = {"kernel": rng.normal(size=(width, 3)).astype(np.float32), "bias": np.zeros(3, "f4")}
    params = {"img": model.params["img"], "classifier": head}
    classifying = Model(params, ModelConfig(model.config.vision, None, own))
    expected = classify_labels(classifying, [str(file) for file in files])
    with serving(classifying, SETTINGS) as client:
        assert client.get("/v1/info").body["probes"] == ["classifier"]
        found = client.post("/v1/classify", {"images": encoded, "probe": "classifier"})
        texts = client.post("/v1/classify", {"images": encoded, "texts": TEXTS})
    for name in ("logit", "probability", "positive"):
        given, wanted = columns(found.body["results"], name), columns(expected, name)
        np.testing.assert_allclose(given, wanted, atol=1e-5)
    assert texts.status == 400 and "no text tower" in texts.body["error"]["message"]


def test_probes_of_other_models_and_a_second_classifier_are_refused(model, probe):
    other = medsiglip_jax.init(model.config, seed=7)
    with pytest.raises(ValueError, match="probe findings: "):
        State(SETTINGS, "x", probes={"findings": probe}).check(other)
    own = ClassifierConfig(("a", "b"))
    with_classifier = Model(model.params, ModelConfig(model.config.vision, None, own))
    with pytest.raises(ValueError, match="probe classifier: the model has one of its own"):
        State(SETTINGS, "x", probes={"classifier": probe}).check(with_classifier)


@pytest.mark.parametrize("body, said", [
    ({"images": []}, "expected either texts, or the name of a probe"),
    ({"images": [], "texts": ["a"], "probe": "b"}, "expected either texts"),
    ({"images": [], "texts": []}, "texts: expected at least one"),
    ({"images": [], "texts": [" "]}, "none of them empty"),
    ({"images": [3], "texts": ["a"]}, "images[0]: expected a string"),
    ({"images": [{"bytes": "a", "url": "b"}], "texts": ["a"]}, "expected either bytes or url"),
    ({"texts": ["a"]}, "images: missing"),
    ({"images": [], "texts": ["a"], "top": 3}, "a field that is not known"),
])  # fmt: skip
def test_what_is_wrong_with_a_request_is_told(client, body, said):
    answer = client.post("/v1/classify", body)
    assert answer.status == 400 and said in answer.body["error"]["message"]


def test_an_image_of_an_address_is_refused_where_none_is_allowed(client):
    body = {"images": [{"url": "https://example.org/a.png"}], "texts": ["a"]}
    [result] = client.post("/v1/classify", body).body["results"]
    assert result["error"]["code"] == "UNAPPROVED_SOURCE_ERROR"


def test_base64_may_be_that_of_addresses_without_padding(client, encoded):
    plain = base64.b64decode(encoded[0])
    other = base64.urlsafe_b64encode(plain).decode().rstrip("=")
    asked = {"images": [encoded[0], other], "texts": TEXTS}
    first, second = client.post("/v1/classify", asked).body["results"]
    assert first == second
