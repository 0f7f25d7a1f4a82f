"""Zero-shot classification: scores of every image, and a reason for those that cannot be read."""

import numpy as np
import pytest
import references
from scipy import special

import medsiglip_jax
from medsiglip_jax.inference.classify import classify, probabilities


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


def test_scores_are_those_of_the_model_in_order(model, pictures):
    names = ["3.png", "gone.png", "0.png", "sub/damaged.jpg", "sub/4.jpg"]
    paths, texts = [pictures / name for name in names], ["photo of a b", "scan of a c"]
    done = []
    results = classify(model, paths, texts, batch_size=2, on_batch=done.append)
    assert [r["image"] for r in results] == [str(path) for path in paths] and sum(done) == 5
    assert results[1]["error"] == "no such file" and "truncated" in results[3]["error"].lower()
    readable = [results[i]["scores"] for i in (0, 2, 4)]
    assert [[score["text"] for score in scores] for scores in readable] == [texts] * 3
    zimg = model.encode_image(model.processor.images([paths[i] for i in (0, 2, 4)]))
    ztxt = model.encode_text(model.processor.texts(texts))
    logits = np.asarray(model.similarity(zimg, ztxt), np.float64)
    got = np.array([[score["logit"] for score in scores] for scores in readable])
    terms = references.model_terms(model.config)
    references.assert_close(got, logits, terms, largest=float(np.exp(model.params["t"].max())))
    for scores, row in zip(readable, got, strict=True):
        np.testing.assert_allclose([s["sigmoid"] for s in scores], 1 / (1 + np.exp(-row)))
        np.testing.assert_allclose([s["softmax"] for s in scores], special.softmax(row))


def test_only_unreadable_images_are_an_answer_too(model, pictures):
    (result,) = classify(model, [pictures / "gone.png"], ["a"])
    assert result == {"image": str(pictures / "gone.png"), "error": "no such file"}


def test_small_sigmoids_keep_their_digits():
    sigmoid, softmax = probabilities(np.array([[-80.0, -90.0]], np.float32))
    np.testing.assert_allclose(sigmoid[0, 0] / np.exp(-80.0), 1, rtol=1e-12)
    np.testing.assert_allclose(softmax.sum(), 1, rtol=1e-15)
