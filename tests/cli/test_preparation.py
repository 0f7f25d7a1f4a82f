"""A model remembers how images were prepared in its training, and every command does the same."""

import argparse
import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import medsiglip_jax
from medsiglip_jax.cli import reading
from medsiglip_jax.data import inputs
from medsiglip_jax.embeddings.elsewhere.formats import open_embeddings
from medsiglip_jax.embeddings.search import search
from medsiglip_jax.files import json as json_files
from medsiglip_jax.inference.classify import classify
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.model.config import ClassifierConfig, ModelConfig, Preparation
from medsiglip_jax.model.weights.checkpoint import CheckpointError
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.train import build, finetune
from medsiglip_jax.train.recipe import from_dict
from medsiglip_jax.trust import explanation

TRAINED = Preparation("serving", Rules("official", grey16="stretch"))
SAID = "images are prepared as in the training of the model: preprocess serving, dicom_rules "
SAID += "official, grey16 stretch\n"


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """The folder of a model that was trained with other pixels than the default."""
    model = medsiglip_jax.load(checkpoint)
    model.config = dataclasses.replace(model.config, preparation=TRAINED)
    folder = tmp_path_factory.mktemp("tuned") / "model"
    medsiglip_jax.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An image of 16-bit grey, of which every preset and every scaling makes something else."""
    path = tmp_path_factory.mktemp("wide") / "wide.png"
    levels = np.linspace(300, 40000, 40 * 90).astype(np.uint16).reshape(40, 90)
    Image.fromarray(levels).save(path)
    return path


def _pixels(model, path, preset, **rules):
    return model.processor.images(path, preset, Rules(**rules))


@pytest.mark.parametrize("format", ["huggingface", "orbax", "big_vision"])
def test_every_layout_keeps_it(tuned, tmp_path, format):
    model = medsiglip_jax.load(tuned)
    assert model.config.preparation == TRAINED
    medsiglip_jax.save(model, tmp_path / "to", format)
    assert medsiglip_jax.load(tmp_path / "to").config == model.config


def test_convert_keeps_it(tuned, tmp_path, run):
    to = tmp_path / "to"
    assert (
        run("convert", str(tuned), str(to), "--format", "huggingface", "--dtype", "float16")[0] == 0
    )
    assert (to / "preparation.json").read_bytes() == (tuned / "preparation.json").read_bytes()


def test_a_file_of_weights_alone_says_that_it_cannot(tuned, tmp_path):
    with pytest.warns(UserWarning, match="prepared with 'serving' when this model was trained"):
        medsiglip_jax.save(medsiglip_jax.load(tuned), tmp_path / "model.npz", "big_vision")
    assert medsiglip_jax.load(tmp_path / "model.npz").config.trained is None


@pytest.mark.parametrize(
    "content", ["[]", '{"preprocess": "clip"}', '{"dicom": {"name": "x"}}', '{"pixels": 1}', "{"]
)
def test_a_damaged_record_is_an_error_of_one_line(tuned, tmp_path, content):
    folder = shutil.copytree(tuned, tmp_path / "model")
    (folder / "preparation.json").write_text(content)
    with pytest.raises(CheckpointError, match="preparation.json: .*prepared in training") as error:
        medsiglip_jax.load(folder)
    assert len(str(error.value).splitlines()) == 1


def test_python_takes_it_where_nothing_is_asked(tuned, checkpoint, wide):
    model, plain = medsiglip_jax.load(tuned), medsiglip_jax.load(checkpoint)
    want = _pixels(model, wide, "serving", name="official", grey16="stretch")
    np.testing.assert_array_equal(model.processor.images(wide), want)
    usual = plain.processor.images(wide)
    assert (usual != want).any()
    np.testing.assert_array_equal(usual, _pixels(plain, wide, "big_vision"))
    asked = model.processor.images(wide, "big_vision", Rules())
    np.testing.assert_array_equal(asked, usual)
    zimg = np.asarray(model.encode_image(want))
    got = medsiglip_jax.encode_files(model, [wide])
    np.testing.assert_allclose(got.vectors, zimg, rtol=0, atol=1e-6)
    scores = classify(model, [wide], ["photo of a b"])[0]["scores"]
    asked = classify(model, [wide], ["photo of a b"], "serving", dicom=TRAINED.dicom)
    assert scores == asked[0]["scores"]
    assert explanation.rules_of(model, None) == Rules("official", grey16="stretch")
    targets = explanation.targets_of(model, ["scan"], None, None, None, None)
    assert explanation.Explainer(targets).preprocess == "serving"
    assert explanation.Explainer(targets, "big_vision").preprocess == "big_vision"


def test_frames_limits_and_labels_are_not_taken_from_training():
    trained = Preparation("serving", Rules("official", frame=3, slide_labels=True, max_pixels=5))
    config = ModelConfig(medsiglip_jax.init("tiny-56").config.vision, preparation=trained)
    assert config.prepared().dicom == Rules("official")
    assert config.prepared(dicom=Rules(frame=1), asked=()).dicom == Rules("official", frame=1)
    assert config.prepared(dicom=Rules(frame=1)).dicom == Rules(frame=1)
    assert config.prepared(dicom=Rules(window=2), asked=["name"]).dicom == Rules(window=2)
    labels = ClassifierConfig(("a",), preprocess="big_vision_pad", dicom=Rules(volume="ct"))
    assert dataclasses.replace(config, classifier=labels).prepared() == Preparation(
        "big_vision_pad", Rules(volume="ct")
    )


@pytest.mark.filterwarnings("ignore:--dicom-rules. without effect")
def test_classify_uses_it_and_says_what_contradicts(tuned, checkpoint, wide, run):
    def scores(folder, *flags):
        asked = "--model", str(folder), "--text", "photo of a b", "--json", str(wide), *flags
        code, out, err = run("classify", *asked)
        assert code == 0
        return json.loads(out)[0]["scores"], err

    got, said = scores(tuned)
    asked = "--preprocess", "serving", "--dicom-rules", "official", "--grey16", "stretch"
    want, _ = scores(checkpoint, *asked)
    assert got == want and said == SAID
    assert scores(tuned, *asked) == (want, "")
    other, said = scores(tuned, "--preprocess", "big_vision", "--dicom-rules", "dicom")
    assert other == scores(checkpoint, "--grey16", "stretch")[0] and other != want
    assert said.splitlines() == [
        "images are prepared as in the training of the model: grey16 stretch",
        "as asked, but unlike the training of the model (in brackets): --preprocess big_vision "
        "(serving), --dicom-rules dicom (official)",
    ]


def test_embed_records_it_and_search_reads_queries_like_it(tuned, wide, tmp_path, run):
    out = tmp_path / "out"
    code, _, err = run("embed", "--model", str(tuned), "--output", str(out), str(wide))
    assert code == 0 and SAID in err
    manifest = json_files.read(out / "manifest.json")
    assert manifest["preprocess"] == "serving"
    assert (manifest["dicom"]["name"], manifest["dicom"]["grey16"]) == ("official", "stretch")
    code, text, err = run(
        "search", "--embeddings", str(out), "--model", str(tuned), "--image", str(wide), "--json"
    )
    hit = json.loads(text)[0]["hits"][0]
    assert code == 0 and hit["score"] == pytest.approx(1, abs=1e-6)


def test_embedding_from_python_takes_it_as_the_command_does(tuned, wide, tmp_path):
    model, rows = medsiglip_jax.load(tuned), inputs.rows([wide])
    made = embed(model, rows, tmp_path / "a").to_dict()
    assert {"preprocess": made["preprocess"], "dicom": made["dicom"]} == TRAINED.to_dict()
    got = open_embeddings(tmp_path / "a").gather(np.array([0]))
    want = medsiglip_jax.encode_files(model, [str(wide)]).complete()
    np.testing.assert_allclose(got, want, atol=1e-6)  # batches of 8 and of 1
    asked = EmbedOptions(preprocess="huggingface", dicom=Rules())
    made = embed(model, rows, tmp_path / "b", asked).to_dict()
    assert (made["preprocess"], made["dicom"]) == ("huggingface", Rules().to_dict())


@pytest.mark.filterwarnings("ignore:.*which preprocessing made them is not recorded")
@pytest.mark.filterwarnings("ignore:query images are prepared")
def test_queries_beside_vectors_of_another_program_are_read_as_in_training(
    tuned, wide, tmp_path, run
):
    model = medsiglip_jax.load(tuned)
    vectors = medsiglip_jax.encode_files(model, [str(wide)]).complete()
    np.savez(tmp_path / "v.npz", id=["wide"], vectors=vectors)
    flags = "--embeddings", tmp_path / "v.npz", "--model", tuned
    code, text, err = run("search", *flags, "--image", wide, "--json")
    assert code == 0 and SAID in err
    assert json.loads(text)[0]["hits"][0]["score"] == pytest.approx(1, abs=1e-6)
    assert SAID not in run("search", *flags, "--text", "a b")[2]
    with pytest.warns(UserWarning, match="by the preset serving"):
        (found,) = search(model, open_embeddings(tmp_path / "v.npz"), [], [str(wide)])
    assert found["hits"][0]["score"] == pytest.approx(1, abs=1e-6)


def test_of_tiles_of_slides_only_the_preset_is_told(capsys):
    """No rule is for them."""
    config = ModelConfig(medsiglip_jax.init("tiny-56").config.vision, preparation=TRAINED)
    assert reading.prepared(argparse.Namespace(), None, config).preprocess == "serving"
    assert capsys.readouterr().err.endswith("training of the model: preprocess serving\n")
    asked = argparse.Namespace(preprocess="big_vision")
    assert reading.prepared(asked, None, config).preprocess == "big_vision"
    assert capsys.readouterr().err.endswith(": --preprocess big_vision (serving)\n")


def test_fine_tuning_further_with_other_pixels_is_told():
    config = ModelConfig(medsiglip_jax.init("tiny-56").config.vision, preparation=TRAINED)
    data = [{"path": "rows.csv"}]
    same = from_dict(dict(init="old", data=data, total_steps=1, **TRAINED.to_dict()))
    assert finetune.unlike_before(same, config) is None
    other = dataclasses.replace(same, preprocess="big_vision", dicom=Rules("official", window=1))
    line = finetune.unlike_before(other, config)
    assert line is not None and line.endswith(
        "of old: preprocess big_vision instead of serving, dicom.window 1 instead of 0, "
        "dicom.grey16 None instead of stretch"
    )
    assert finetune.unlike_before(other, dataclasses.replace(config, preparation=None)) is None
    classifier = ClassifierConfig(("a", "b"), preprocess=TRAINED.preprocess, dicom=TRAINED.dicom)
    old = medsiglip_jax.init(ModelConfig(config.vision, classifier=classifier))
    with pytest.warns(UserWarning, match="is a classifier"):
        start = build._without_classifier(old).config
    assert start.classifier is None
    assert finetune.unlike_before(other, start) == line
    assert finetune.unlike_before(same, start) is None


def test_serve_uses_it():
    pytest.importorskip("starlette")
    from medsiglip_jax.serve.settings import MAX_PIXELS, Settings

    config = ModelConfig(medsiglip_jax.init("tiny-56").config.vision, preparation=TRAINED)
    own = Settings().prepared(config)
    assert own.preprocess == "serving" and own.dicom.max_pixels == MAX_PIXELS
    assert (own.dicom.name, own.dicom.grey16) == ("official", "stretch")
    asked = Settings(preprocess="big_vision", asked=frozenset(["name"])).prepared(config)
    assert (asked.preprocess, asked.dicom.name, asked.dicom.grey16) == (
        "big_vision", "dicom", "stretch",
    )  # fmt: skip
    plain = dataclasses.replace(config, preparation=None)
    assert Settings().prepared(plain).preprocess == "big_vision"
