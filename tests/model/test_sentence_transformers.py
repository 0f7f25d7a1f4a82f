"""A Hugging Face folder for others: sentence-transformers' vectors are ours, and the hub's metadata
are there."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from references import SMALL

import medsiglip_jax
from medsiglip_jax.model.config import NAMED, ClassifierConfig, ModelConfig
from medsiglip_jax.model.weights import hub, readme
from medsiglip_jax.model.weights.checkpoint import Checkpoint

# The longest is longer than 64 tokens; a SigLIP's tokenizer makes small letters of the capitals.
TEXTS = ["a photo of a b", "SCAN, of a C!", "d", "", "drawing of a f and " * 30]
FILES = {"modules.json", "sentence_bert_config.json"}


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


def _text_settings(folder):
    content = json.loads((folder / "sentence_bert_config.json").read_text())
    return content["processing_kwargs"]["text"]


@pytest.mark.slow  # importing it takes longer than all the other tests here
@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers_gives_our_vectors(checkpoint, model):
    reason = "needs sentence-transformers, which .ci/run installs"
    library = pytest.importorskip("sentence_transformers", reason=reason)
    theirs = library.SentenceTransformer(str(checkpoint), device="cpu")
    rng = np.random.default_rng(0)
    shapes = (40, 60, 3), (31, 20, 3), (28, 28, 3)
    images = [Image.fromarray(rng.integers(0, 256, s).astype(np.uint8)) for s in shapes]
    pixels = model.processor.images(images, "huggingface")
    with pytest.warns(UserWarning, match="1 of 5 texts are longer"):
        ztxt = model.encode_text(TEXTS)
    zimg = model.encode_image(pixels)
    for got, want in ((theirs.encode(TEXTS), ztxt), (theirs.encode(images), zimg)):
        cosines = np.sum(np.asarray(want) * got, axis=1) / np.linalg.norm(got, axis=1)
        assert cosines.min() >= 0.999999
    alone = theirs.encode(TEXTS[:1])  # whatever else is in the batch
    np.testing.assert_allclose(alone, theirs.encode(TEXTS)[:1], rtol=0, atol=1e-4)


def test_its_settings_give_our_token_ids(checkpoint, model):
    """What sentence-transformers hands to transformers, without it."""
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    settings = {"padding": True, "truncation": "longest_first", **_text_settings(checkpoint)}
    got = processor(text=TEXTS, return_tensors="np", **settings)
    with pytest.warns(UserWarning, match="1 of 5 texts are longer"):
        np.testing.assert_array_equal(got["input_ids"], model.processor.texts(TEXTS))
    assert "attention_mask" not in got


def test_texts_are_padded_to_the_context_of_the_model(model, tmp_path):
    text = dataclasses.replace(SMALL.text, context_length=16)
    params = medsiglip_jax.init(ModelConfig(SMALL.vision, text)).params
    tokenizer = model.processor.tokenizer_files()
    tokenizer = {name: tokenizer[name] for name in ("spiece.model",)}
    short = medsiglip_jax.Model(params, ModelConfig(SMALL.vision, text), tokenizer=tokenizer)
    medsiglip_jax.save(short, tmp_path / "short")
    said = _text_settings(tmp_path / "short")
    assert (said["padding"], said["max_length"]) == ("max_length", 16)
    again = medsiglip_jax.load(tmp_path / "short")
    medsiglip_jax.save(again, tmp_path / "again")
    for name in FILES:
        content = (tmp_path / "again" / name).read_bytes()
        assert content == (tmp_path / "short" / name).read_bytes()


def test_only_folders_with_both_towers_have_them(model, tmp_path):
    """One that was made of such a folder, too: its files would name a tower that is not there."""
    labels = ClassifierConfig(("a", "b"), preprocess="huggingface")
    config = ModelConfig(model.config.vision, None, labels)
    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(16, 2)).astype("f4"), "bias": np.zeros(2, "f4")}
    params = {"img": model.params["img"], "classifier": head}
    cards = [file for file in model.companions if file.name != "README.md"]
    one = medsiglip_jax.Model(params, config, companions=cards)
    medsiglip_jax.save(one, tmp_path / "labels")
    medsiglip_jax.save(model, tmp_path / "orbax", "orbax")
    medsiglip_jax.save(model, tmp_path / "both")
    for name, there in (("labels", set()), ("orbax", set()), ("both", FILES)):
        assert {file.name for file in (tmp_path / name).iterdir()} & FILES == there
    card = ModelCard.load(tmp_path / "labels" / "README.md")
    assert card.data.pipeline_tag == "image-classification"


def test_a_folder_says_what_the_hub_reads(checkpoint):
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "medsiglip" in card.data.tags and card.data.license is None
    assert "64 tokens" in card.text and "sentence_transformers" in card.text


def test_convert_keeps_the_card_of_the_source(checkpoint, tmp_path, run):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert run("convert", str(source), str(tmp_path / "to"), "--format", "huggingface")[0] == 0
    assert (tmp_path / "to" / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"


class _Card:
    def __init__(self, text):
        self.name, self.text = "README.md", text

    def read_text(self, encoding, errors):
        return self.text


def test_the_terms_of_medsiglip_are_stated(tmp_path):
    """By its architecture, where no file says them; weights that began at random have none."""
    config, other = NAMED["so400m-448"], NAMED["so400m-384"]
    terms = readme.terms((), config, "models/local")
    origin = Checkpoint("google/medsiglip-448", config, {}, (), repo="google/medsiglip-448")
    text = readme.written(config, origin, terms)
    (tmp_path / "README.md").write_text(text)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_name) == ("other", "health-ai-developer-foundations")
    assert data.license_link.startswith("https://developers.google.com/health-ai-developer-")
    assert data.base_model == "google/medsiglip-448"
    assert readme.terms((), config, None) == readme.terms((), other, "models/local") == {}
    said = _Card('---\nlicense: "mit"\n---\n')
    assert readme.terms([said], config, "models/local") == {"license": "mit"}


def test_only_what_the_hub_gave_is_a_base_on_the_hub(tmp_path, monkeypatch):
    """Not a folder whose relative path looks like a name there, though it is gone by now."""
    vision = ModelConfig(NAMED["tiny-56"].vision)
    medsiglip_jax.save(medsiglip_jax.init(vision), tmp_path / "runs" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda repo, token: tmp_path / "runs" / "model")
    models = {name: medsiglip_jax.load(name) for name in ("runs/model", "someone/model")}
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    for name, model in models.items():
        model.companions = ()
        medsiglip_jax.save(model, tmp_path / name / "again")
        written = (tmp_path / name / "again" / "README.md").read_text()
        assert ("base_model" in written) == (name == "someone/model")
