"""explain(): what it takes, what it gives, and what it refuses."""

import numpy as np
import pytest
from PIL import Image

import medsiglip_jax
from medsiglip_jax.embeddings import provenance
from medsiglip_jax.embeddings.probe import linear
from medsiglip_jax.model import api
from medsiglip_jax.model.config import ClassifierConfig, ModelConfig, VisionConfig
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.trust.explanation import explain

RNG = np.random.default_rng(0)
TEXTS = ["photo of a a", "scan of a b"]
PICTURE = RNG.integers(0, 256, (20, 33, 3), dtype=np.uint8)

pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients for:UserWarning")


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


def logits(model, preprocess="big_vision"):
    z = model.encode_image(model.processor.images([PICTURE], preprocess))
    return np.asarray(model.similarity(z, model.encode_text(model.processor.texts(TEXTS))))[0]


def test_every_pair_in_order_with_the_scores_of_classify(model, tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    other = np.zeros((9, 9), np.uint8)
    made = medsiglip_jax.explain(model, [tmp_path / "a.png", other], TEXTS)
    names = str(tmp_path / "a.png"), "uint8 array (9, 9)"
    assert [(e.image, e.text) for e in made] == [(name, text) for name in names for text in TEXTS]
    assert [e.map.shape for e in made] == [(20, 33)] * 2 + [(9, 9)] * 2
    assert all(e.map.dtype == np.float32 for e in made)
    np.testing.assert_allclose([e.score for e in made[:2]], logits(model), rtol=1e-4)
    for e in made:
        difference = e.score - e.baseline_score
        error = abs(e.map.sum(dtype=float) - difference) / max(abs(difference), 0.1)
        assert e.completeness == pytest.approx(error, abs=1e-3)
        keys = {"method", "steps", "completeness", "insertion_minus_deletion", "random"}
        assert keys <= set(e.record)


def test_contrast_explains_the_difference(model):
    first, second = explain(model, PICTURE, TEXTS, steps=8)
    (made,) = explain(model, PICTURE, TEXTS[0], contrast=TEXTS[1], steps=8)
    assert made.score == pytest.approx(first.score - second.score, abs=1e-4)
    assert (made.steps, made.contrast) == (8, TEXTS[1])
    scale = np.abs(first.map).max()
    np.testing.assert_allclose(made.map, first.map - second.map, atol=1e-4 * scale)


@pytest.mark.parametrize("method", ["ig", "occlusion", "rollout"])
@pytest.mark.parametrize("preprocess", ["big_vision", "serving"])
def test_methods_and_presets(model, method, preprocess):
    (made,) = explain(model, PICTURE, TEXTS[0], method=method, preprocess=preprocess)
    assert made.map.shape == PICTURE.shape[:2] and np.isfinite(made.map).all()
    assert made.score == pytest.approx(logits(model, preprocess)[0], rel=1e-4)
    assert (made.completeness is None) == (method != "ig")
    assert (made.on_padding == 0) == (preprocess == "big_vision")
    assert made.better == (made.insertion_minus_deletion > max(made.faithfulness.random_maps))


def test_weights_in_half_precision_are_computed_with_in_float32(model, checkpoint):
    half = medsiglip_jax.load(checkpoint, dtype="bfloat16")
    tokenizer = model.processor.tokenizer_source
    wide = api.Model(half.params, model.config, tokenizer=tokenizer)  # computes in float32
    (got,), (want,) = (explain(m, PICTURE, TEXTS[0], steps=8) for m in (half, wide))
    correlation = np.corrcoef(got.map.ravel(), want.map.ravel())[0, 1]
    assert got.map.dtype == np.float32 and correlation > 0.99  # the text is in bfloat16


# ------------------------------------------------------------------------ probes and classifiers


def fitted(model, exclusive=True, scale="standard", hidden=0):
    """A probe of 40 images, with the class of a row or two findings."""
    images = np.random.default_rng(1).integers(0, 256, (40, 28, 28, 3), dtype=np.uint8)
    vectors = np.asarray(model.encode_image(images))
    labels = np.arange(40) % 3 if exclusive else np.stack([np.arange(40) % 2] * 2, 1) * 1.0
    made = provenance.of_model(model, "big_vision", True, Rules())
    names = ["a", "b", "c"][: 3 if exclusive else 2]
    return linear.fit(
        vectors, labels, vectors, labels, names, scale=scale, hidden=hidden, provenance=made
    )


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("kind", [{"scale": "standard"}, {"scale": "unit"}, {"hidden": 4}])
def test_the_logit_of_a_label_of_a_probe(model, exclusive, kind):
    probe = fitted(model, exclusive, **kind)
    method = "ig" if exclusive else "rollout"  # compiling gradients takes long
    (made,) = explain(model, PICTURE, probe=probe, label="b", method=method)
    vector = np.asarray(model.encode_image(model.processor.images([PICTURE])))
    p = probe.predict(vector)[0, 1]
    assert made.score == pytest.approx(np.log(p / (1 - p)), abs=2e-3)
    assert made.text == "b" and made.contrast is None


def test_a_label_of_the_classifier(model):
    classifier = ClassifierConfig(("x", "y"), "map", multi_label=True, preprocess="huggingface")
    kernel = np.random.default_rng(2).normal(size=(model.config.embed_dim, 2)).astype(np.float32)
    params = {**model.params, "classifier": {"kernel": kernel, "bias": np.ones(2, np.float32)}}
    own = api.Model(params, ModelConfig(model.config.vision, model.config.text, classifier))
    (made,) = explain(own, PICTURE, label="y", method="occlusion")
    images = own.processor.images([PICTURE], "huggingface")
    features = np.asarray(own.features.encode_image(images, normalize=False))
    assert made.score == pytest.approx((features @ kernel)[0, 1] + 1, rel=1e-4)


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "expected either texts, or a label"),
        (dict(texts=TEXTS, label="a"), "expected either texts, or a label"),
        (dict(texts=" "), "none of them empty"),
        (dict(texts=TEXTS, contrast=TEXTS[1]), "one of the texts; expected another text"),
        (dict(texts=TEXTS, method="gradcam"), "method is 'gradcam'; expected one of ig, occl"),
        (dict(texts=TEXTS, steps=0), "steps is 0; expected at least 1"),
        (dict(texts=TEXTS, max_steps=3), "max_steps is 3; expected at least 4"),
        (dict(texts=TEXTS, preprocess="squash"), "unknown preprocess 'squash'"),
        (dict(texts=TEXTS, images="gone.png"), "gone.png: no such file"),
        (dict(label="a"), "this model has no classifier"),
    ],
)
def test_what_is_wrong_is_said(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        explain(model, **{"images": PICTURE, **arguments})


def test_what_does_not_fit_a_probe(model):
    probe = fitted(model)
    for more, message in (
        (dict(label="z"), "label is 'z'; the probe has 'a', 'b', 'c'"),
        ({}, "which label to explain is missing .* the probe has 'a', 'b', 'c'"),
        (dict(label="a", contrast="b"), "contrast is for texts"),
        (dict(label="a", preprocess="serving"), "fitted to 'big_vision'"),
        (dict(label="a", dicom=Rules("official")), "dicom is"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, PICTURE, probe=probe, **more)
    other = medsiglip_jax.init(model.config, seed=5)
    with pytest.raises(ValueError, match="sha256 of the model"):
        explain(other, PICTURE, probe=probe, label="a")


def test_a_map_that_is_not_complete_warns(model):
    with pytest.warns(UserWarning, match="after 1 steps the map's sum is off by"):
        (made,) = explain(model, PICTURE, TEXTS[0], steps=1)
    assert made.completeness > 0.01


def test_on_several_devices_as_on_one(model, checkpoint):
    mesh = medsiglip_jax.make_mesh()
    split = medsiglip_jax.load(checkpoint, mesh=mesh, fsdp=True)
    for method in ("ig", "occlusion", "rollout"):
        (one,), (several,) = (
            explain(m, PICTURE, TEXTS[0], method=method, batch_size=16) for m in (model, split)
        )
        scale = np.abs(one.map).max()
        np.testing.assert_allclose(several.map, one.map, atol=1e-3 * scale)
        assert several.score == pytest.approx(one.score, rel=1e-4)


def test_a_tower_without_a_pooling_head():
    vision = VisionConfig(28, 14, width=16, depth=2, mlp_dim=16, num_heads=2, pool="mean")
    headless = medsiglip_jax.init(ModelConfig(vision))
    probe = fitted(headless)
    for method in ("ig", "rollout"):
        (made,) = explain(headless, PICTURE, probe=probe, label="c", method=method)
        assert np.isfinite(made.map).all() and made.map.std() > 0
