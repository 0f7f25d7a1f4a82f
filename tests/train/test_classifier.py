"""A fine-tuned classifier from the recipe to every command that reads it, and in transformers."""

import csv
import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from dicom_files import made
from PIL import Image
from references import assert_close, tower_terms

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.inference import classifier
from medsiglip_jax.inference.classifier import classify_labels
from medsiglip_jax.model import api, config
from medsiglip_jax.model.config import ClassifierConfig, ModelConfig, VisionConfig
from medsiglip_jax.model.weights import hub as weights_hub
from medsiglip_jax.pages import card
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.train import finetune, recipe

VISION = dict(image_size=8, patch_size=2, width=32, depth=1, mlp_dim=32, num_heads=2, pool="map")
FINDINGS = {"loop": {0, 6, 8, 9}, "Even": {0, 2, 4, 6, 8}, "five or more": {5, 6, 7, 8, 9}}
TASK = """
title = "Digits: three findings"
source = "scikit-learn"
kind = "multi_label"
score = "cosine"
prompts_source = "none"

[data]
adapter = "csv"

[[data.tables]]
file = ["test.csv"]

[data.images]
path = ["{image}"]

[parts.validation]
[[parts.validation.tables]]
file = ["validation.csv"]

[[classes]]
name = "loop"

[[classes]]
name = "even"

[[classes]]
name = "five_or_more"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Real digits as images, with three findings each, in three splits."""
    datasets = pytest.importorskip("sklearn.datasets")
    folder, raw = tmp_path_factory.mktemp("digits"), datasets.load_digits()
    names = ("image", *FINDINGS, "digit", "split", "group")
    rows = []
    for i, (pixels, digit) in enumerate(zip(raw.images[:420], raw.target[:420], strict=True)):
        Image.fromarray(np.uint8(pixels * (255 / 16))).save(folder / f"{i}.png")
        split = "train" if i < 240 else "validation" if i < 320 else "test"
        findings = [int(digit in of) for of in FINDINGS.values()]
        rows.append([f"{i}.png", *findings, f"d{digit}", split, f"g{i // 2}"])
    for split in ("all", "validation", "test"):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            out = csv.writer(file)
            # The task and the model's labels differ in capitals and underscores.
            head = (
                names if split == "all" else ["image", "loop", "even", "five_or_more", *names[4:]]
            )
            out.writerow(head)
            out.writerows(row for row in rows if split in ("all", row[5]))
    (folder / "task.toml").write_text(TASK)
    return folder


def asked(folder, **changes):
    values = {
        "model": {"vision": VISION, "text": None}, "loader": "pil", "batch_size": 32,
        "data": {"path": str(folder / "all.csv"), "label": tuple(FINDINGS)},
        "objective": {"name": "classification", "pool": "mean"}, "validation": "validation",
        "total_steps": 80, "learning_rate": 1e-2, "log_every": 40, "mesh": {"data": 1},
    }  # fmt: skip
    return recipe.from_dict(values | changes)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, finetune.run(asked(data), folder)


def table(data, name):
    with open(data / name, newline="") as file:
        return list(csv.DictReader(file))


def logits_of_transformers(export, images):
    """And its probabilities, from the files, by the classes and processor that a user would take"""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForImageClassification.from_pretrained(export)
    assert type(model).__name__ == "SiglipForImageClassification"
    make = transformers.SiglipImageProcessorPil.from_pretrained(export)
    pixels = make([Image.open(image).convert("RGB") for image in images], return_tensors="pt")
    with torch.no_grad():
        return model(**pixels).logits.numpy(), model


@pytest.mark.float
def test_transformers_has_equal_logits(data, run):
    """The images are 8 x 8, the model's size: no preset resizes them."""
    export = run[1]["export"]
    images = [str(data / f"{i}.png") for i in range(320, 420)]
    theirs, model = logits_of_transformers(export, images)
    assert list(model.config.id2label.values()) == list(FINDINGS)
    assert model.config.problem_type == "multi_label_classification"
    ours = medsiglip_jax.load(export)
    logits = ours.classify(ours.processor.images(images))
    assert_close(logits, theirs, tower_terms(ours.config.vision) + ours.config.vision.width)
    assert np.abs(np.asarray(logits) - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.float
def test_evaluate_has_the_auc_of_transformers_logits(data, run, tmp_path, capsys):
    from sklearn.metrics import roc_auc_score

    export, rows = run[1]["export"], table(data, "test.csv")
    command = ["evaluate", "--task", str(data / "task.toml"), "--data", str(data),
               "--model", export, "--output", str(tmp_path / "out"), "--learn", "thresholds",
               "--resamples", "20"]  # fmt: skip
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    theirs, _ = logits_of_transformers(export, [data / row["image"] for row in rows])
    for column, scored in enumerate(result["classes"]):
        labels = [int(row[scored["class"]]) for row in rows]
        assert scored["auc"] == pytest.approx(roc_auc_score(labels, theirs[:, column]), abs=1e-6)
    assert result["provenance"]["score"] == "classifier"
    assert "by the model's own classifier" in (tmp_path / "out" / "report.md").read_text()
    # The test split of the training's own table is the same: so is what finetune reports of it.
    test = run[1]["test"]["classes"]
    for scored, own in zip(result["classes"], test.values(), strict=True):
        assert scored["auc"] == pytest.approx(own["auc"], abs=1e-6)


def test_the_report_judges_test_rows_at_thresholds_of_validation_rows(data, run):
    """Against scikit-learn, from the probabilities that the export gives."""
    from sklearn import metrics

    folder, result = run
    model = medsiglip_jax.load(result["export"])
    assert model.config.classifier is not None
    assert result["metrics"]["val_auc"] > 0.8  # it has learned something
    for column, (name, own) in enumerate(result["test"]["classes"].items()):
        scores = {}
        for split in ("validation", "test"):
            rows = table(data, f"{split}.csv")
            images = model.processor.images([str(data / row["image"]) for row in rows])
            probability = 1 / (1 + np.exp(-np.asarray(model.classify(images))[:, column]))
            key = {"loop": "loop", "Even": "even", "five or more": "five_or_more"}[name]
            scores[split] = probability, np.array([int(row[key]) for row in rows])
        false, true, thresholds = metrics.roc_curve(*reversed(scores["validation"]))
        assert own["threshold"] == pytest.approx(thresholds[np.argmax(true - false)], rel=1e-5)
        assert model.config.classifier.thresholds[column] == own["threshold"]
        probability, label = scores["test"]
        called = probability >= own["threshold"] * (1 - 1e-6)
        assert own["sensitivity"] == pytest.approx(called[label == 1].mean())
        assert own["specificity"] == pytest.approx(1 - called[label == 0].mean())
        assert own["low"] < own["auc"] < own["high"] or own["auc"] == 1
    report = (folder / "report.html").read_text()
    assert "Test rows" in report and "five or more" in report


def test_classify_and_probe_predict_give_its_labels(data, run, capsys):
    export, image = run[1]["export"], str(data / "330.png")
    assert cli.main(["classify", "--model", export, "--labels", image, str(data / "no.png"),
                     "--json"]) == 3  # fmt: skip
    first, second = json.loads(capsys.readouterr().out)
    assert [score["label"] for score in first["scores"]] == list(FINDINGS)
    assert "error" in second
    model = medsiglip_jax.load(export)
    logits = np.asarray(model.classify(model.processor.images([image])))[0]
    for score, logit, t in zip(
        first["scores"], logits, model.config.classifier.thresholds, strict=True
    ):
        assert score["logit"] == pytest.approx(float(logit), rel=1e-5)
        assert score["probability"] == pytest.approx(1 / (1 + np.exp(-float(logit))), rel=1e-5)
        assert score["positive"] == (score["probability"] >= t)
    assert cli.main(["probe", "predict", "--model", export, image, "--json"]) == 0
    (predicted,) = json.loads(capsys.readouterr().out)
    assert [score["probability"] for score in predicted["scores"]] == [
        score["probability"] for score in first["scores"]
    ]
    assert [score["class"] for score in predicted["scores"]] == list(FINDINGS)
    assert cli.main(["classify", "--model", export, "--labels", image]) == 0
    assert "probability" in capsys.readouterr().out


def test_embed_takes_its_image_tower(data, run, tmp_path):
    command = ["embed", "--model", run[1]["export"], "--output", str(tmp_path / "e"),
               str(data / "1.png")]  # fmt: skip
    assert cli.main(command) == 0


@pytest.mark.parametrize("flags, say", [
    (["--text", "a loop"], "no text tower"),
    ([], "expected either --text"),
    (["--text", "a", "--labels"], "expected either --text"),
])  # fmt: skip
def test_what_a_classifier_cannot_do(data, run, capsys, flags, say):
    image = str(data / "1.png")
    assert cli.main(["classify", "--model", run[1]["export"], *flags, image]) == 2
    assert say in capsys.readouterr().err


@pytest.mark.parametrize("name, flags, say", [
    ("six_or_more", [], "asks for six_or_more"),
    ("five_or_more", ["--grid"], "--grid cannot apply"),
    ("five_or_more", ["--score", "cosine"], "--score cannot apply"),
    ("five_or_more", ["--temperature", "none"], "--temperature cannot apply"),
    ("five_or_more", ["--prompts", "PROMPTS"], "no --prompts"),
])  # fmt: skip
def test_a_task_that_it_does_not_fit(data, run, tmp_path, capsys, name, flags, say):
    text = TASK.replace("five_or_more", name).replace("{image}", "digits/{image}")
    (tmp_path / "digits").symlink_to(data)
    (tmp_path / "task.toml").write_text(text)
    rows = (data / "test.csv").read_text()
    (tmp_path / "test.csv").write_text(rows.replace("five_or_more", name))
    (tmp_path / "prompts.toml").write_text(f'loop = ["a"]\neven = ["b"]\n{name} = ["c"]\n')
    flags = [flag.replace("PROMPTS", str(tmp_path / "prompts.toml")) for flag in flags]
    command = ["evaluate", "--task", str(tmp_path / "task.toml"), "--data", str(tmp_path),
               "--model", run[1]["export"], "--output", str(tmp_path / "out"), *flags]  # fmt: skip
    assert cli.main(command) == 2
    assert say in capsys.readouterr().err


# ------------------------------------------------------------------------------- in every layout


def small(pool="mean", multi_label=False, thresholds=(), dicom=Rules()):
    vision = VisionConfig(**VISION)
    own = ClassifierConfig(("a", "b", "c"), pool, multi_label, thresholds, "serving", dicom)
    model = medsiglip_jax.init(ModelConfig(vision, None, own), seed=1)
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(32, 3)), jnp.float32)
    model.params["classifier"] = {"kernel": kernel, "bias": jnp.arange(3.0)}
    return model


IMAGES = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("pool, format, thresholds", [
    ("mean", "huggingface", ()), ("mean", "huggingface", (0.25, None, 0.5)),
    ("mean", "orbax", ()), ("map", "orbax", (0.25, None, 0.5)),
])  # fmt: skip
def test_layouts_keep_labels_and_thresholds(tmp_path, pool, format, thresholds):
    model = small(pool, thresholds=thresholds, dicom=Rules("official", (350, 40), grey16="full"))
    medsiglip_jax.save(model, tmp_path / "m", format=format)
    again = medsiglip_jax.load(tmp_path / "m")
    assert again.config.classifier == model.config.classifier
    np.testing.assert_array_equal(again.classify(IMAGES), model.classify(IMAGES))
    assert api.describe(tmp_path / "m")["config"]["classifier"]["labels"] == ("a", "b", "c")


def test_images_are_read_as_in_training_unless_asked_otherwise(tmp_path):
    """16-bit grey with few of its values in use, and a CT in one window."""
    grey = np.random.default_rng(2).integers(0, 900, (8, 8)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    ct = made(grey, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024)
    (tmp_path / "b.dcm").write_bytes(ct)
    names = [f"{tmp_path}/{name}" for name in ("a.png", "b.dcm")]
    trained = Rules(grey16="stretch", ct_window=(350, -700), frame=3)
    score = lambda own, asked: classify_labels(small(dicom=own), names, dicom=asked)  # noqa: E731
    found = score(trained, None)
    assert found == score(Rules(), trained) and "error" not in found[0] | found[1]
    asked = score(trained, Rules(grey16="full").as_trained(trained))
    assert asked[0]["scores"] != found[0]["scores"] and asked[1] == found[1]
    with pytest.warns(UserWarning, match="1 of 2 images of 16 bits come out dark"):
        plain = score(trained, Rules())  # which asks for all of them
    assert plain[1]["scores"] != found[1]["scores"]


@pytest.mark.float
@pytest.mark.parametrize("pool", config.POOLS)
def test_the_classifier_reads_what_its_pool_says(pool):
    """The mean of the patch tokens, or the head's output, times the kernel."""
    model = small(pool)
    z = model.encode_image(IMAGES, normalize=False)
    z = np.asarray(model.encode_tokens(IMAGES)).mean(axis=1) if pool == "mean" else np.asarray(z)
    kernel, bias = (np.asarray(model.params["classifier"][k]) for k in ("kernel", "bias"))
    assert_close(model.classify(IMAGES), z @ kernel + bias, tower_terms(model.config.vision), 10)


@pytest.mark.parametrize("pool, format, say", [
    ("map", "huggingface", "pool='map' cannot be a Hugging Face folder"),
    ("mean", "big_vision", "cannot hold the labels"),
])  # fmt: skip
def test_layouts_that_cannot_hold_a_classifier_say_so(tmp_path, pool, format, say):
    with pytest.raises(ValueError, match=say):
        medsiglip_jax.save(small(pool), tmp_path / "m", format=format)
    assert not (tmp_path / "m").exists()


@pytest.mark.float
@pytest.mark.parametrize("labels, several", [(2, False), (5, True)])
def test_classifiers_that_transformers_wrote(tmp_path, labels, several):
    """Two labels without names of their own are not in config.json at all."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    tower = dict(image_size=8, patch_size=2, hidden_size=32, intermediate_size=32,
                 num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    kind = "multi_label_classification" if several else "single_label_classification"
    made = transformers.SiglipForImageClassification(
        transformers.SiglipConfig(vision_config=tower, num_labels=labels, problem_type=kind)
    ).eval()
    made.save_pretrained(tmp_path / "m")
    pixels = torch.tensor(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        theirs = made(pixels).logits.numpy()
    model = medsiglip_jax.load(tmp_path / "m")
    assert model.config.classifier.labels == tuple(f"LABEL_{i}" for i in range(labels))
    assert model.config.classifier.multi_label == several
    assert_close(model.classify(IMAGES), theirs, tower_terms(model.config.vision), 10)


@pytest.mark.parametrize("change, say", [
    ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "expected the numbers from 0 on"),
    ({"id2label": {"0": "a", "1": "b", "5": "c"}}, "expected the numbers from 0 on"),
    ({"problem_type": "regression"}, "problem_type is 'regression'"),
    ({"medsiglip_jax": {"thresholds": [0.5, -1.0, 0.5]}}, "expected probabilities"),
])  # fmt: skip
def test_classifiers_that_cannot_be_meant(tmp_path, capsys, change, say):
    medsiglip_jax.save(small(), tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw | change))
    assert cli.main(["info", str(tmp_path / "m")]) == 2
    err = capsys.readouterr().err.strip()
    assert say in err and "\n" not in err


def test_labels_of_a_config_without_names(tmp_path):
    """transformers names them by their number."""
    medsiglip_jax.save(small(), tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text()) | {"num_labels": 3}
    del raw["id2label"], raw["label2id"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    labels = medsiglip_jax.load(tmp_path / "m").config.classifier.labels
    assert labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_a_single_label_has_a_sigmoid(tmp_path):
    """As in transformers' pipeline: the softmax of one number says nothing."""
    model = small()
    kernel, bias = (model.params["classifier"][k][..., :1] for k in ("kernel", "bias"))
    model.params["classifier"] = {"kernel": kernel, "bias": bias}
    own = dataclasses.replace(model.config.classifier, labels=("a",))
    model.config = dataclasses.replace(model.config, classifier=own)
    medsiglip_jax.save(model, tmp_path / "m")
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    again = medsiglip_jax.load(tmp_path / "m")
    (result,) = classifier.classify_labels(again, [tmp_path / "a.png"])
    logit = result["scores"][0]["logit"]
    assert result["scores"][0]["probability"] == pytest.approx(1 / (1 + np.exp(-logit)))


def test_a_model_without_classifier_says_how_to_get_one(tmp_path, capsys):
    vision = VisionConfig(**VISION)
    model = medsiglip_jax.init(ModelConfig(vision, None))
    medsiglip_jax.save(model, tmp_path / "m")
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    asked = ["--model", str(tmp_path / "m"), str(tmp_path / "a.png")]
    for command in (["classify", "--labels"], ["probe", "predict"]):
        assert cli.main([*command, *asked]) == 2
        assert "finetune --config classification trains one" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- in training


@pytest.mark.filterwarnings("ignore:.*is a classifier; training goes on:UserWarning")
def test_one_class_per_image_on_the_pooling_head(data, run, tmp_path):
    """Exported with orbax, since transformers' class reads the mean; from another classifier."""
    changes = {
        "data": {"path": str(data / "all.csv"), "label": "digit"}, "total_steps": 4, "model": None,
        "init": run[1]["export"], "objective": {"name": "classification", "pool": "map"},
    }  # fmt: skip
    result = finetune.run(asked(data, **changes), tmp_path)
    model = medsiglip_jax.load(result["export"])
    assert model.config.classifier.labels == tuple(f"d{i}" for i in range(10))
    assert model.checkpoint.format == "orbax" and not model.config.classifier.multi_label
    assert set(result["test"]["classes"]) == {f"d{i}" for i in range(10)}


def test_a_group_in_training_and_test_is_refused(data, tmp_path):
    rows = (data / "all.csv").read_text().replace(",test,g200\n", ",test,g0\n")
    (data / "leak.csv").write_text(rows)
    changes = {"data": {"path": str(data / "leak.csv"), "label": tuple(FINDINGS)}}
    with pytest.raises(ValueError, match="g0"):
        finetune.run(asked(data, **changes), tmp_path)


def test_a_finding_named_twice_is_said_before_training(data, tmp_path):
    changes = {"data": {"path": str(data / "all.csv"), "label": ("loop", "Even", "loop")}}
    with pytest.raises(ValueError, match="names a finding twice: loop, Even, loop"):
        finetune.run(asked(data, **changes), tmp_path / "run")


def test_a_config_is_what_it_was(tmp_path):
    for model in (small("map"), small(multi_label=True, thresholds=(0.1, 0.2, None))):
        tree = json.loads(json.dumps(model.config.to_dict()))
        assert ModelConfig.from_dict(tree) == model.config
    with pytest.raises(ValueError, match="each once"):
        dataclasses.replace(small().config.classifier, labels=("a", "a"))


# --------------------------------------------------------------------------------- card and hub


def test_the_card_says_what_was_recorded(run, data):
    folder, result = run
    text = (folder / "export" / "README.md").read_text()
    test = result["test"]
    for said in (
        "fine-tuned with medsiglip-jax from random weights", "`all.csv`",
        "240 examples to train, 80 to validate, 100 to test", "3 labels: loop, Even, five or more",
        f"macro AUC {test['macro_auc']:.4f}", "Not a medical device", "--labels",
        f"| {test['classes']['loop']['auc']:.4f} |", "no other model's terms",
        "| total_steps | 80 |", 'pipeline_tag: "image-classification"',
    ):  # fmt: skip
        assert said.lower() in text.lower(), said
    assert str(data) not in text, "a path says where somebody works"


def test_the_model_card_of_a_run_has_its_data_scores_and_hashes(run, tmp_path):
    output, (folder, result) = tmp_path / "card.md", run
    assert cli.main(["card", str(folder), "--output", str(output)]) == 0
    text, recorded = output.read_text(), json.loads((folder / "config.json").read_text())
    sha256 = medsiglip_jax.load(result["export"]).sha256
    assert text.count(sha256) == 2 and recorded["data_sha256"] in text
    assert "240 examples to train, 80 to validate" in text
    assert f"a score for each of {', '.join(FINDINGS)}" in text
    for name, value in result["metrics"].items():
        if name.startswith("val_"):
            assert f"| {name.removeprefix('val_')} | {value:.4f} |" in text


def test_labels_are_no_markup_in_a_card(run):
    """The hub shows it as a page."""
    recorded = json.loads((run[0] / "config.json").read_text())
    hostile = ("<script>x</script>", "a|b", "two\nlines", 'say "no"')
    cells = {**dict.fromkeys(("auc", "low", "high", "sensitivity", "specificity", "threshold")),
             "positives": 1, "negatives": 1}  # fmt: skip
    test = {"macro_auc": 0.5, "classes": dict.fromkeys(hostile, cells)}
    classifier = ModelConfig(config.NAMED["tiny-56"].vision, None, ClassifierConfig(hostile))
    text = card.of_run(recorded | {"classes": hostile}, 1, {}, test, {}, "t", classifier)
    assert "<script" not in text and "4 labels: &lt;script" in text and "two lines" in text
    for row in (line for line in text.splitlines() if "not defined to" in line):
        assert len(re.findall(r"(?<!\\)\|", row)) == 9, row


def test_the_base_models_terms_and_card_are_kept(data, run, tmp_path, monkeypatch):
    base = tmp_path / "base"
    medsiglip_jax.save(medsiglip_jax.load(run[1]["export"]).features, base)
    metadata = '---\nlicense: other\nlicense_name: "some-terms"\nlicense_link: https://e.org\n---\n'
    (base / "README.md").write_text(f"{metadata}# Base")
    monkeypatch.setattr(weights_hub, "download", lambda repo, token: base)
    finetune.run(asked(data, model=None, init="someone/model", total_steps=1), tmp_path / "run")
    export = tmp_path / "run" / "export"
    text = (export / "README.md").read_text()
    assert "apply to this one too: some-terms (https://e.org)" in text
    assert 'license_name: "some-terms"' in text and "from `someone/model`" in text
    assert 'base_model: "someone/model"' in text
    assert (export / "README.base.md").read_text().endswith("# Base")


@pytest.mark.parametrize("repo", [None, "google/medsiglip-448"])
def test_a_card_names_a_base_on_the_hub_and_of_a_folder_only_the_last_part(run, repo):
    facts = json.loads((run[0] / "config.json").read_text())
    facts["recipe"]["init"], facts["init_repo"] = repo or "runs/base", repo
    written = card.of_run(facts, 1, {}, None, {}, "model", config.NAMED["tiny-56"])
    assert ('base_model: "google/medsiglip-448"' in written) == bool(repo)
    assert f"from `{repo or 'base'}`" in written and "runs/base" not in written


@pytest.mark.parametrize(
    ("changes", "task", "command"),
    [
        ({}, "zero-shot-image-classification", 'classify --model FOLDER --text "a caption"'),
        ({"text": None}, "image-feature-extraction", "embed --model FOLDER --output vectors"),
        ({"classifier": ClassifierConfig(("a",))}, "image-classification", "FOLDER --labels"),
    ],
)
def test_a_card_says_what_the_model_can_do(run, changes, task, command):
    facts = json.loads((run[0] / "config.json").read_text())
    model = dataclasses.replace(config.NAMED["tiny-56"], **changes)
    written = card.of_run(facts, 1, {}, None, {}, "model", model)
    assert f'pipeline_tag: "{task}"\n' in written and command in written


@pytest.fixture
def hub(monkeypatch):
    """The hub's client, which notes what it is asked to do."""
    huggingface_hub, calls = pytest.importorskip("huggingface_hub"), []

    class Client:
        def __init__(self, token=None):
            pass

        def whoami(self):
            calls.append("whoami")

        def create_repo(self, name, private, exist_ok):
            calls.append(("create", name, private))
            if name == "me/refused":
                raise OSError("no space left in the account")
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    return calls


def test_an_export_is_uploaded_with_its_card(run, hub, capsys):
    push = ["finetune", "--workdir", str(run[0]), "--export-only", "--push-to-hub", "me/digits"]
    assert cli.main([*push, "--json"]) == 0
    assert "me/digits" in json.loads(capsys.readouterr().out)["hub"]
    assert hub[:2] == ["whoami", ("create", "me/digits", True)]
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub[2][2])


@pytest.mark.parametrize("name, code, say", [
    ("digits", 2, "expected user/model"), ("me/refused", 1, "is complete, but uploading it"),
])  # fmt: skip
def test_an_upload_that_fails_loses_nothing(run, hub, capsys, name, code, say):
    push = ["finetune", "--workdir", str(run[0]), "--export-only", "--push-to-hub", name]
    assert cli.main(push) == code
    assert say in capsys.readouterr().err
    assert (run[0] / "export" / "model.safetensors").is_file()


def test_nobody_logged_in_is_said_before_training(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def whoami(self):
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
    command = ["finetune", "--config", "classification", "--workdir", str(tmp_path / "run"),
               "--push-to-hub", "me/digits"]  # fmt: skip
    assert cli.main(command) == 2
    assert "hf auth login" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.float
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_peft_loads_the_adapter_of_a_classifier(data, run, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "base"
    medsiglip_jax.save(medsiglip_jax.load(run[1]["export"]).features, base)
    changes = {"model": None, "init": str(base), "total_steps": 5, "lora": {"rank": 2}}
    result = finetune.run(asked(data, **changes), tmp_path / "run")
    head = transformers.SiglipForImageClassification.from_pretrained(result["export"])
    torch.nn.init.zeros_(head.classifier.weight)
    for name, x in transformers.SiglipVisionModel.from_pretrained(base).named_parameters():
        dict(head.vision_model.named_parameters())[name.removeprefix("vision_model.")].data = x.data
    adapted = peft.PeftModel.from_pretrained(head, result["adapter"]).eval()
    model = medsiglip_jax.load(result["export"])
    pixels = torch.tensor(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        theirs = adapted(pixel_values=pixels).logits.numpy()
    assert_close(model.classify(IMAGES), theirs, tower_terms(model.config.vision), 10)


def test_labels_that_differ_in_capitals_alone_are_told_apart():
    from medsiglip_jax.evaluate.scoring import label_columns

    labels = ("Edema", "edema", "Pleural_Effusion")
    expected = {"edema": [1], "Edema": [0], "EDEMA": [0, 1], "pleural effusion": [2], "x": []}
    assert {name: label_columns(name, labels) for name in expected} == expected


def test_a_score_of_classifiers_needs_one(data, run, tmp_path, capsys):
    medsiglip_jax.save(medsiglip_jax.load(run[1]["export"]).features, tmp_path / "tower")
    command = ["evaluate", "--task", str(data / "task.toml"), "--data", str(data)]
    command += ["--model", str(tmp_path / "tower"), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--score", "classifier"]) == 2
    assert "--score classifier is of models with a classifier" in capsys.readouterr().err
