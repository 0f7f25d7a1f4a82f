"""Fine-tuning from recipe to exported model: every objective, interrupted, on several devices."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import medsiglip_jax
from medsiglip_jax.files import places, storage
from medsiglip_jax.model import devices, sharding, tree
from medsiglip_jax.preprocess import text
from medsiglip_jax.train import build, finetune, loop, recipe, run_record
from medsiglip_jax.train.objectives.objective import Labels

MODEL = dict(
    vision=dict(image_size=8, patch_size=4, width=16, depth=2, mlp_dim=16, num_heads=2, pool="map"),
    text=dict(vocab_size=19, context_length=24, width=16, depth=1, mlp_dim=16, num_heads=2,
              embed_dim=16),
)  # fmt: skip
CLASSES = ("dark", "grey", "bright")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """48 pictures of three brightnesses, a manifest and a tokenizer."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    with open(folder / "rows.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["image", "text", "label", "bright", "grey", "split", "group"])
        for i in range(48):
            kind = i % 3
            pixels = rng.integers(0, 60, (9, 9, 3)) + 90 * kind
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
            split = "validation" if i % 4 == 3 else "train"
            caption = f"a {CLASSES[kind]} scan"
            out.writerow([f"{i}.png", caption, CLASSES[kind], int(kind == 2), int(kind == 1), split,
                          f"p{i // 12}-{split}"])  # fmt: skip
    corpus = [f"a {name} scan" for name in CLASSES] * 3
    (folder / "spiece.model").write_bytes(text.train(corpus, 40))
    return folder


def config(folder, **changes):
    """Keys of `data` and of the recipe; nested ones by "__".

    A test that changes none of total_steps, learning_rate, batch_size and mesh trains with the
    program that others have compiled.
    """
    values = {
        "model": MODEL, "tokenizer": str(folder / "spiece.model"), "loader": "pil",
        "data": {"path": str(folder / "rows.csv"), "positives": "text"}, "batch_size": 8,
        "total_steps": 6, "learning_rate": 3e-3, "log_every": 1, "checkpoint_every": 0,
        "bias": -1.0, "mesh": {"data": 1},
    }  # fmt: skip
    for name, value in changes.items():
        *groups, key = name.split("__")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
        target[key] = value
    return recipe.from_dict(values)


def losses(folder):
    return [line["loss"] for line in storage.read_lines(folder / loop.METRICS)]


# --------------------------------------------------------------------------------- end to end


def test_a_run_is_the_same_whoever_loads(data, tmp_path):
    """Metrics to the bit and the list of the unreadable, with augmentation, of two tables. What
    cannot be read is masked, and listed once."""
    pytest.importorskip("tensorflow")
    (tmp_path / "data").mkdir()
    for file in data.iterdir():
        shutil.copy(file, tmp_path / "data")
    (tmp_path / "data" / "4.png").write_bytes(b"broken")
    (tmp_path / "data" / "5.png").unlink()
    shutil.copy(data / "rows.csv", tmp_path / "data" / "again.csv")
    changes = dict(
        augment={"crop": [0.3, 1.0], "flip": True, "colour": 0.2},
        data=[{"path": str(tmp_path / "data" / name), "positives": "text"}
              for name in ("rows.csv", "again.csv")],
        tokenizer=str(tmp_path / "data"), validation="validation",
    )  # fmt: skip
    lines = {}
    for name in ("pil", "tfdata", "threads"):
        folder = tmp_path / name
        result = finetune.run(config(tmp_path / "data", loader=name, **changes), folder)
        assert result["unreadable"] == 2 and np.isfinite(losses(folder)).all()
        assert (folder / "export" / "spiece.model").is_file(), "of a tokenizer given as a folder"
        metrics = storage.read_lines(folder / loop.METRICS)
        metrics = [{k: v for k, v in x.items() if k not in loop.TIMES} for x in metrics]
        listed = storage.read_lines(folder / finetune.UNREADABLE)
        assert sorted(line["image"][-5:] for line in listed) == ["4.png", "5.png"]
        lines[name] = metrics, listed
    assert lines["pil"] == lines["tfdata"] == lines["threads"]


@pytest.mark.slow
def test_from_scratch_to_a_checkpoint_that_transformers_reads(data, tmp_path):
    labels = dict(data__captions="a {label} scan", data__label="label")
    asked = config(
        data, total_steps=60, log_every=20, eval_every=30, validation="validation", **labels
    )
    result = finetune.run(asked, tmp_path)
    assert result["metrics"]["val_accuracy"] > 0.9 and result["metrics"]["val_auc"] > 0.95
    assert result["metrics"]["val_positive"] > result["metrics"]["val_negative"] + 1
    assert result["steps"] == 60 and result["unreadable"] == 0
    assert result["trained"] == result["parameters"]
    names = {p.name for p in tmp_path.iterdir()}
    written = "config.json metrics.jsonl checkpoints export exported.json report.html"
    assert names == set(written.split())

    model = medsiglip_jax.load(result["export"])
    images = model.processor.images([str(data / f"{i}.png") for i in range(3)])
    prompts = model.processor.texts([f"a {name} scan" for name in CLASSES])
    logits = model.similarity(model.encode_image(images), model.encode_text(prompts))
    assert list(np.asarray(logits).argmax(1)) == [0, 1, 2]
    report = (tmp_path / "report.html").read_text()
    assert report.count("<polyline") >= 6 and "val_auc" in report and "http" not in report
    run = json.loads((tmp_path / "config.json").read_text())
    assert run["recipe"]["total_steps"] == 60 and run["versions"]["jax"] == jax.__version__

    transformers = pytest.importorskip("transformers")
    import torch

    theirs = transformers.SiglipModel.from_pretrained(result["export"]).eval()
    values = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = theirs(pixel_values=values, input_ids=torch.from_numpy(np.asarray(prompts)).long())
    np.testing.assert_allclose(out.logits_per_image.numpy(), logits, rtol=1e-4, atol=1e-4)


ORDINARY = dict(checkpoint_every=2, augment__crop=(0.5, 1.0))


@pytest.fixture(scope="module")
def ordinary(data, tmp_path_factory):
    """The folder of an uninterrupted run on one device."""
    folder = tmp_path_factory.mktemp("ordinary")
    finetune.run(config(data, **ORDINARY), folder)
    return folder


@pytest.fixture(scope="module")
def start(ordinary):
    """An exported model to go on from."""
    return str(ordinary / "export")


def params_of(folder):
    return tree.flatten(jax.tree.map(np.asarray, medsiglip_jax.load(folder).params))


@pytest.mark.parametrize("changes, moves", [
    ({"freeze": ("img/(embedding.*|pos_embedding|Transformer/encoderblock_0/.*)",)},
     lambda path: "embedding/" not in path.replace("Embed_0/embedding", "") and
     path != "img/pos_embedding"),
    ({"lora": {"rank": 2}}, lambda path: "encoderblock" in path and "/kernel" in path
     or path in ("t", "b")),
])  # fmt: skip
def test_what_is_frozen_does_not_move(data, start, tmp_path, changes, moves):
    asked = config(data, init=start, model=None, tokenizer=None, **changes)
    result = finetune.run(asked, tmp_path)
    assert result["trained"] < result["parameters"]
    before, after = params_of(start), params_of(result["export"])
    for path, x in after.items():
        changed = not np.array_equal(x, before[path])
        assert not changed or moves(path), path
    first = "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"
    if "encoderblock_0" in str(changes):
        assert np.array_equal(before[first][0], after[first][0])
        assert not np.array_equal(before[first][1], after[first][1])
    if "lora" in changes:
        adapted = params_of(tmp_path / "adapter")
        assert all(np.array_equal(x, adapted[path]) for path, x in after.items())
    assert (tmp_path / "adapter").exists() == ("lora" in changes)
    assert sum(not np.array_equal(x, before[p]) for p, x in after.items()) > 5


@pytest.mark.parametrize(
    "label", ["label", pytest.param(("bright", "grey"), marks=pytest.mark.slow)]
)
def test_classification(data, start, tmp_path, label):
    """From a checkpoint, and several findings from random weights without a tokenizer."""
    init = {"init": start, "model": None} if isinstance(label, str) else {"init": None}
    asked = config(
        data, **init, tokenizer=None, objective__name="classification",
        objective__pos_weight=None if isinstance(label, str) else "balanced",
        objective__pool="map" if isinstance(label, str) else "mean", data__label=label,
        total_steps=40, learning_rate=1e-2, best="val_auc", eval_every=20, log_every=10,
        validation="validation", checkpoint_every=20,
        objective__accumulate=2,
    )  # fmt: skip
    result = finetune.run(asked, tmp_path)
    assert result["metrics"]["val_auc"] > 0.9
    shown = {name for name in result["metrics"] if name.startswith("val_")}
    several = Labels(multi_label=not isinstance(label, str))
    assert shown == set(asked.objective.metric_names(several, False)), "what `best` may be"
    exported = medsiglip_jax.load(tmp_path / "export").config
    assert exported.classifier is not None and exported.text is None
    assert len(exported.classifier.labels) == (3 if isinstance(label, str) else 2)


def test_labels_that_teach_nothing_are_told_before_training(data, tmp_path):
    """And -1 in a finding is what the recipe says."""
    (tmp_path / "m.csv").write_text(
        "image,a,b,c\n" + "".join(f"{i}.png,{i % 2},0,{-(i % 2)}\n" for i in range(4))
    )
    asked = config(
        data, data__path=f"{tmp_path}/m.csv", data__label=("a", "b", "c"),
        data__uncertain={"c": "positive"}, objective__name="classification", tokenizer=None,
        data__positives=None,
    )  # fmt: skip
    with pytest.warns(UserWarning) as told:
        prepared = build.prepare(asked)
    assert [str(w.message) for w in told] == ["training examples: no positive of the finding b"]
    assert prepared.labels.values is not None
    assert prepared.labels.values[:, 2].tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="uncertain is 'perhaps'; expected one of ignore"):
        config(data, data__uncertain="perhaps")


def one_valued(data, folder, label, train, held_out):
    """A recipe whose training rows alternate between the cells of `train`."""
    rows = [f"{i}.png,train,{train[i % 2]}\n" for i in range(8)]
    rows += [f"{i}.png,validation,{held_out}\n" for i in range(8, 12)]
    (folder / "m.csv").write_text("image,split,a,b\n" + "".join(rows))
    return config(
        data, data__path=f"{folder}/m.csv", data__label=label, data__positives=None,
        objective__name="classification", tokenizer=None, validation="validation",
    )  # fmt: skip


FINDINGS = ("a", "b")


@pytest.mark.parametrize("label, train, held_out, lines", [
    ("a", ["x,", "y,"], "x,", ["no image of the class y", "all images are of one class, x"]),
    (FINDINGS, ["1,0", "0,1"], "1,0",
     ["no positive of the finding b", "no negative of the finding a"]),
    (FINDINGS, ["1,0", "0,1"], ",1",
     ["no known label of the finding a", "no negative of the finding b"]),
])  # fmt: skip
def test_validation_labels_of_one_value_are_told_at_the_start(
    data, tmp_path, label, train, held_out, lines
):
    """And refused if the best checkpoint is to be chosen by a metric that they leave undefined."""
    asked = one_valued(data, tmp_path, label, train, held_out)
    with pytest.warns(UserWarning) as told:
        build.prepare(asked)
    assert [str(w.message) for w in told] == [f"validation examples: {line}" for line in lines]
    with pytest.raises(ValueError, match=f"{'; '.join(lines)}; so that best='val_auc' is undef"):
        build.prepare(dataclasses.replace(asked, best="val_auc"))


@pytest.mark.parametrize("label, train, held_out, say", [
    ("a", ["x,", "x,"], "y,", "no image of the class y; all images are of one class, x"),
    (FINDINGS, ["1,0", "1,0"], "0,1", "no positive of the finding b; no negative of the finding a"),
    (FINDINGS, ["1,", "1,"], "0,1", "no known label of the finding b; no negative of the findi"),
])  # fmt: skip
def test_training_labels_of_one_value_are_refused(data, tmp_path, label, train, held_out, say):
    with pytest.raises(ValueError, match=f"training examples: {say}.*nothing to learn"):
        finetune.run(one_valued(data, tmp_path, label, train, held_out), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label, cells", [("a", "4.png,,1"), (("a", "b"), "4.png,,")])
def test_rows_without_a_label_are_counted(data, tmp_path, label, cells):
    rows = "".join(f"{i}.png,{i % 2},{i // 2}\n" for i in range(4))
    (tmp_path / "m.csv").write_text(f"image,a,b\n{rows}{cells}\n")
    changes = {"data__classes": ("0", "1")} if label == "a" else {}
    asked = config(
        data, data__path=f"{tmp_path}/m.csv", data__label=label, data__positives=None,
        objective__name="classification", tokenizer=None, **changes,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="1 of 5 have no label"):
        build.prepare(asked)


@pytest.mark.slow
def test_an_adafactor_step_with_layer_decay_in_bfloat16(data, start, tmp_path):
    asked = config(
        data, init=start, model=None, tokenizer=None, dtype="bfloat16", remat="block",
        optimizer__name="adafactor", optimizer__schedule="rsqrt", optimizer__warmup_steps=1,
        optimizer__layer_decay=0.5, optimizer__rates=(("txt/.*", 0.0),), objective__accumulate=4,
        loss_chunk=3, augment__crop=(0.6, 1.0), augment__colour=0.2,
    )  # fmt: skip
    result = finetune.run(asked, tmp_path)
    before, after = params_of(start), params_of(result["export"])
    assert np.array_equal(before["txt/head/kernel"], after["txt/head/kernel"])
    kernel = "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"
    moved = np.abs(after[kernel] - before[kernel]).mean((1, 2))
    assert 0.2 < moved[0] / moved[1] < 0.9


@pytest.mark.slow
def test_epochs_are_counted_in_steps_and_a_long_warm_up_is_shortened(data, tmp_path):
    """36 rows of training and batches of 8: 1.5 epochs are 54 rows, or 7 steps."""
    asked = config(data, epochs=1.5, optimizer__warmup_steps=500, total_steps=40)
    with pytest.warns(UserWarning) as told:
        result = finetune.run(asked, tmp_path)
    said = " ".join(str(warning.message) for warning in told)
    assert "epochs=1.5 over 36 examples are 7 steps, instead of total_steps=40" in said
    assert "a warm-up of 500 and a cool-down of 0 steps do not fit into a run of 7" in said
    assert result["steps"] == 7 and len(losses(tmp_path)) == 7
    with pytest.warns(UserWarning):  # and two more, in the same folder
        assert finetune.run(dataclasses.replace(asked, epochs=2.0), tmp_path)["steps"] == 9


@pytest.mark.slow
def test_the_best_is_what_is_exported(data, tmp_path):
    """By the lowest loss, found between checkpoints: the state of that step, not of the last."""
    asked = config(data, total_steps=12, eval_every=3, checkpoint_every=5, learning_rate=1.0,
                   validation="validation", best="val_loss")  # fmt: skip
    result = finetune.run(asked, tmp_path)
    log = [x for x in storage.read_lines(tmp_path / loop.METRICS) if "val_loss" in x]
    best = min(log, key=lambda x: x["val_loss"])
    assert best["step"] != 12, "the comparison would be empty"
    assert result["exported_step"] == best["step"]
    assert result["metrics"]["val_loss"] == best["val_loss"]
    t = saved_state(tmp_path, best["step"])["params"]["t"]
    assert params_of(result["export"])["t"] == t
    assert f"step {best['step']};" in (tmp_path / "report.html").read_text()


def test_what_is_not_finite_is_said_with_its_step(tmp_path):
    """Which updates were skipped between two lines, also after a run that was resumed."""
    lines = [
        {"step": 10, "loss": 2.0, "skipped": 0.0, "skipped_in_row": 0.0},
        {"step": 20, "loss": "nan", "skipped": 3.0, "skipped_in_row": 1.0},
        {"step": 30, "loss": 2.0, "skipped": 3.0, "skipped_in_row": 0.0, "val_auc": None},
        {"step": 40, "loss": 1.5, "skipped": 4.0, "skipped_in_row": 0.0, "val_auc": None},
    ]
    tell = finetune.NotFinite(tmp_path, 5)
    said = [list(tell(line)) for line in lines]
    assert [len(one) for one in said] == [0, 1, 1, 1]
    assert said[1][0].startswith("step 20: ") and "(3 since" in said[1][0] and "nan" in said[1][0]
    assert said[2][0].startswith("step 30: undefined") and "val_auc" in said[2][0]
    assert "(1 since the last such line; loss now 1.5); 5 in a row" in said[3][0]
    (tmp_path / loop.METRICS).write_text(json.dumps(lines[1]) + "\n")
    assert not list(finetune.NotFinite(tmp_path, 5)(lines[2] | {"val_auc": 0.5}))


def test_a_share_is_held_out_of_the_training_split_alone(data, tmp_path):
    """Rows of other splits are neither trained nor validated on, which is said; two sources keep
    apart."""
    other = (data / "rows.csv").read_text().replace("scan", "picture").replace(",p", ",q")
    for i in range(48):
        if not (data / f"c{i}.png").exists():
            shutil.copy(data / f"{i}.png", data / f"c{i}.png")
        other = other.replace(f"\n{i}.png", f"\nc{i}.png")
    (data / "other.csv").write_text(other)
    sources = [
        {"path": str(data / name), "positives": "text"} for name in ("rows.csv", "other.csv")
    ]
    asked = config(data, data=sources, validation=0.3)
    unused = "(rows|other).csv: rows of these splits are not used: 'validation' 12$"
    with pytest.warns(UserWarning, match=unused):
        prepared = build.prepare(asked)
    assert [len(x) for x in prepared.training] == [27, 27] and [
        len(x) for x in prepared.held_out
    ] == [9, 9]
    for rows in (*prepared.training, *prepared.held_out):
        assert set(rows.splits) == {"train"}
    groups = [
        set(g for x in part for g in x.groups) for part in (prepared.training, prepared.held_out)
    ]
    assert not groups[0] & groups[1]


@pytest.mark.slow
def test_a_row_met_twice_is_no_negative_of_itself(data, tmp_path):
    """One row, eight times in every batch: all pairs are positive."""
    header, first, *_ = (data / "rows.csv").read_text().splitlines()
    (data / "single.csv").write_text(f"{header}\n{first}\n")
    asked = config(data, data={"path": str(data / "single.csv")}, total_steps=40, bias=0.0)
    finetune.run(asked, tmp_path)
    # With the 7 copies as negatives the loss of a batch of 8 cannot fall below 3.0.
    assert losses(tmp_path)[-1] < 2.0


# ------------------------------------------------------------------------------- interrupted


class Crash(Exception):
    pass


def test_resumed_is_uninterrupted_to_the_bit(data, ordinary, tmp_path):
    asked = config(data, **ORDINARY)

    def crash(done, values):
        if done == 5:
            raise Crash

    with pytest.raises(Crash):
        finetune.run(asked, tmp_path, on_step=crash)
    assert not (tmp_path / "export").exists()
    with pytest.raises(ValueError, match="has exported no model yet; .*--export-only"):
        medsiglip_jax.load(tmp_path)
    result = finetune.export_last(tmp_path)
    assert result["steps"] == result["exported_step"] == 4
    notes = medsiglip_jax.load(tmp_path).checkpoint.notes
    assert notes[0].startswith(
        f"the export of the fine-tuning run {tmp_path}, which stopped at ste"
    )
    finetune.run(asked, tmp_path)
    assert_same_run(tmp_path, ordinary, 6)


@pytest.mark.slow
def test_an_average_is_resumed_to_the_bit_evaluated_and_exported(data, start, tmp_path):
    """That of adapters, and of what trains in full beside them."""
    asked = config(
        data, init=start, model=None, tokenizer=None, lora={"rank": 2}, ema=0.9, learning_rate=0.1,
        checkpoint_every=2, validation="validation", data__label="label",
        data__captions="a {label} scan",
    )  # fmt: skip

    def crash(done, values):
        if done == 5:
            raise Crash

    result = finetune.run(asked, tmp_path / "whole")
    with pytest.raises(Crash):
        finetune.run(asked, tmp_path / "cut", on_step=crash)
    finetune.run(asked, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole", 6)

    saved = saved_state(tmp_path / "whole", 6)
    assert tree.flatten(saved["ema"]).keys() == tree.flatten(saved["params"]).keys()
    assert saved["ema"]["t"] != saved["params"]["t"]
    assert params_of(result["export"])["t"] == saved["ema"]["t"]
    exported = dataclasses.replace(asked, init=result["export"], lora=None, ema=None)
    prepared = build.prepare(exported)
    scores = prepared.evaluate(pytest.fail, prepared.state)
    logged = {k: v for k, v in result["metrics"].items() if k.startswith("val_")}
    assert logged == pytest.approx(scores, rel=1e-4)
    assert set(logged) == set(asked.objective.metric_names(prepared.labels, True))
    with pytest.raises(FileExistsError, match="another config .ema: 0.9 -> None"):
        finetune.run(dataclasses.replace(asked, ema=None), tmp_path / "whole")


@pytest.mark.slow
def test_the_best_of_a_stopped_run_is_exported_on_any_machine(data, tmp_path):
    """With what only the run itself knows; and with nothing that has changed since."""
    asked = config(data, best="val_loss", validation="validation", eval_every=2)

    def crash(done, values):
        if done == 5:
            raise Crash

    with pytest.raises(FileNotFoundError, match="no fine-tuning run here"):
        finetune.export_last(tmp_path)
    with pytest.raises(Crash):
        finetune.run(asked, tmp_path, on_step=crash)
    run = json.loads((tmp_path / "config.json").read_text())

    def recorded(**changes):
        gone = {"mesh": {"data": 64, "fsdp": False}, "data_service": "grpc://gone:1"}
        changed = run | {"recipe": run["recipe"] | gone | {"loader": "tf"}}
        (tmp_path / "config.json").write_text(json.dumps(changed | changes))

    recorded()
    result = finetune.export_last(tmp_path)
    scores = {x["step"]: x.get("val_loss") for x in storage.read_lines(tmp_path / loop.METRICS)}
    assert scores[result["exported_step"]] == min(scores[2], scores[4])
    recorded(classes=["grey"])
    with pytest.raises(ValueError, match="classes of this run have changed"):
        finetune.export_last(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    recorded()
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        finetune.export_last(tmp_path)


def test_a_run_of_an_earlier_version_is_resumed(data, ordinary, tmp_path):
    """Its config lacks a key of the data, whose default is what it did."""
    shutil.copytree(ordinary, folder := tmp_path / "run")
    before = json.loads((folder / "config.json").read_text())
    del before["recipe"]["data"][0]["uncertain"]
    (folder / "config.json").write_text(json.dumps(before))
    told = []
    finetune.run(config(data, **ORDINARY), folder, warn=told.append)
    assert not told
    with pytest.raises(FileExistsError, match="holds a run of another config .data:"):
        finetune.run(config(data, **ORDINARY, data__uncertain="positive"), folder)


@pytest.mark.slow
def test_dtype_auto_is_what_the_run_began_with(data, tmp_path, monkeypatch):
    asked = config(data, **ORDINARY, dtype="auto")

    def crash(done, values):
        if done in (3, 5):  # there is a checkpoint of step 2, or of step 4
            raise Crash

    def crashed(folder):
        with pytest.raises(Crash):
            finetune.run(asked, folder, on_step=crash)
        return json.loads((folder / finetune.CONFIG).read_text())["recipe"]["dtype"]

    assert crashed(tmp_path / "cpu") == "float32"
    monkeypatch.setattr(devices, "auto_dtype", lambda device: "bfloat16")
    assert crashed(tmp_path / "cpu") == "float32"
    assert crashed(tmp_path / "gpu") == "bfloat16"


def assert_same_run(one, two, step):
    logs = [
        [{k: v for k, v in x.items() if k not in loop.TIMES} for x in storage.read_lines(
            folder / loop.METRICS)] for folder in (one, two)
    ]  # fmt: skip
    assert logs[0] == logs[1] and logs[0][-1]["step"] == step
    a, b = (folder / "export" / "model.safetensors" for folder in (one, two))
    assert a.read_bytes() == b.read_bytes()
    a, b = (saved_state(folder, step) for folder in (one, two))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def saved_state(folder, step):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / loop.CHECKPOINTS / str(step) / "default").absolute())


def command(data, workdir, **changes):
    """The same run as a process; its config as JSON, since a ConfigDict file only wraps it."""
    asked = json.dumps(
        {"workdir": str(workdir), "recipe": dataclasses.asdict(config(data, **changes))}
    )
    code = (
        "import json, sys\n"
        "from medsiglip_jax.train import finetune; from medsiglip_jax.train import recipe\n"
        "asked = json.loads(sys.argv[1])\n"
        "clean = lambda x: {k: clean(v) for k, v in x.items()} if isinstance(x, dict) else x\n"
        "finetune.run(recipe.from_dict(clean(asked['recipe'])), asked['workdir'],\n"
        "             on_step=lambda done, _: print(done, flush=True))\n"
    )
    return [sys.executable, "-c", code, asked]


@pytest.mark.slow
@pytest.mark.torture
def test_kill_9_at_any_time_changes_nothing(data, tmp_path, torture):
    """Kills a run of 60 steps that saves after every one, so that most hit a save."""
    changes = dict(total_steps=60, checkpoint_every=1, eval_every=20, validation="validation")
    subprocess.run(command(data, tmp_path / "whole", **changes), check=True, capture_output=True)
    rng, kills = np.random.default_rng(0), 0
    run = command(data, tmp_path / "cut", **changes)
    while kills < 5 * torture:
        with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.readline()  # it has started: the rest of its life is steps and saves
            time.sleep(rng.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
        kills += process.returncode != 0
        if process.returncode == 0:  # it was done already: from the start again
            assert_same_run(tmp_path / "cut", tmp_path / "whole", 60)
            shutil.rmtree(tmp_path / "cut")
    subprocess.run(run, check=True, capture_output=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole", 60)


# --------------------------------------------------------------------------------- several devices


SHARDED = {"data": 8, "fsdp": True}


@pytest.fixture
def shard_everything(monkeypatch):
    """Or parameters as small as these stay whole."""
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 0)


def is_split(prepared):
    """Whether parameters lie in parts on the devices."""
    block = prepared.state["params"]["img"]["Transformer"]["encoderblock"]
    return "data" in block["MlpBlock_0"]["Dense_0"]["kernel"].sharding.spec


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"mesh": {"data": 8}, "loss_chunk": 2}, {"mesh": SHARDED},
])  # fmt: skip
def test_eight_devices_give_the_same_curve(data, ordinary, tmp_path, changes, shard_everything):
    runs = []
    finetune.run(config(data, **ORDINARY, **changes), tmp_path, runs.append)
    assert is_split(runs[0]) == ("fsdp" in changes["mesh"])
    np.testing.assert_allclose(losses(tmp_path), losses(ordinary), atol=1e-5)


def test_eight_devices_begin_and_one_goes_on(data, ordinary, tmp_path, shard_everything):
    """The curve of the first steps is that of eight, whose checkpoint one device restores."""
    split = []

    def crash(done, values):
        if done == 4:
            raise Crash

    with pytest.raises(Crash):
        finetune.run(
            config(data, mesh=SHARDED, **ORDINARY), tmp_path,
            lambda prepared: split.append(is_split(prepared)), crash,
        )  # fmt: skip
    assert split == [True] and len(losses(tmp_path)) == 4
    changed = []
    finetune.run(config(data, **ORDINARY), tmp_path, warn=changed.append)
    assert len(changed) == 1 and "mesh" in changed[0]
    np.testing.assert_allclose(losses(tmp_path), losses(ordinary), atol=1e-5)


def both(run):
    """Runs the two processes of a prepared to their ends -> [(process, stderr)]."""
    pair = [
        subprocess.Popen([*run, str(i)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    return [(process, process.communicate(timeout=300)[1].decode()) for process in pair]


@pytest.mark.slow
def test_two_processes_give_the_same_curve(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # With a missing image that only the second process meets, and prompts to evaluate on.
    rows = (data / "rows.csv").read_text().replace("\n47.png", "\nnot/there.png")
    (data / "two.csv").write_text(rows)
    changes = dict(total_steps=5, mesh={"data": 2, "fsdp": True}, data__path=str(data / "two.csv"),
                   validation="validation", data__captions="a {label} scan",
                   data__label="label", objective__accumulate=2)  # fmt: skip
    finetune.run(config(data, **changes | {"mesh": {"data": 1}}), tmp_path / "one")
    run = command(data, tmp_path / "two", **changes)
    run[2] = (
        "import jax, sys\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "jax.config.update('jax_num_cpu_devices', 1)\n"
        "from medsiglip_jax.model import sharding; sharding.FSDP_MIN_BYTES = 0\n"
        f"jax.distributed.initialize({address!r}, 2, int(sys.argv[2]))\n" + run[2]
    )
    for process, err in both(run):
        assert process.returncode == 0, err[-2000:]
    logs = [storage.read_lines(tmp_path / name / loop.METRICS) for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        for key in one.keys() - set(loop.TIMES):
            assert two[key] == pytest.approx(one[key], abs=1e-5, rel=1e-5), key
    assert "val_auc" in logs[1][-1]
    refused = [*run]
    refused[3] = refused[3].replace('"seed": 0', '"seed": 9')
    said = [(process.returncode, err) for process, err in both(refused)]
    assert all(code for code, _ in said)
    assert "seed: 0 -> 9" in said[0][1] and "process 0 refused this run" in said[1][1]

    want = params_of(tmp_path / "one" / "export")
    for path, x in params_of(tmp_path / "two" / "export").items():
        if not path.endswith("key/bias"):  # no gradient but rounding, which Adam magnifies
            np.testing.assert_allclose(x, want[path], atol=1e-4)


# -------------------------------------------------------------------------------------- bad input


def test_unreadable_images_are_limited(data, tmp_path):
    rows = (data / "rows.csv").read_text().replace("\n0.png", "\nnot/there.png")
    bad = data / "bad.csv"
    bad.write_text(rows)
    with pytest.raises(ValueError, match="more than max_unreadable=0; the last: .*not/there.png"):
        finetune.run(config(data, data__path=str(bad), max_unreadable=0), tmp_path / "b")


def test_credentials_of_addresses_are_not_recorded(tmp_path):
    signed = "https://u:pw@host/a.parquet?sig=5f"
    recorded = run_record._without_credentials({"data": ({"path": signed, "weight": 1.0},)})
    assert recorded == {"data": [{"path": "https://host/a.parquet", "weight": 1.0}]}
    unreadable = finetune.Unreadable(tmp_path, 0)
    with pytest.raises(ValueError, match="the last: https://host/a.parquet#row=1,image: HTTP 403"):
        unreadable(f"{signed}#row=1,image", "HTTP 403 Forbidden")
    assert "sig" not in unreadable.path.read_text()


@pytest.mark.parametrize("changes, say", [
    ({"batch_siez": 3}, "config has no key batch_siez .did you mean batch_size"),
    ({"data__pth": "x"}, "data has no key pth"),
    ({"total_steps": 0, "batch_size": 0}, "total_steps is 0; .*batch_size is 0; expected"),
    ({"objective": "contrast"}, "objective.name is 'contrast'; expected one of contrastive"),
    ({"init": "x"}, "either init or model"),
    ({"mesh": {"data": 8}, "batch_size": 12}, "batch_size 12 is not divisible by 8 devices"),
    ({"mesh": {"data": 12}}, "mesh data=12: expected 8, the number of devices here"),
    ({"data__text": "caption"}, "caption"),
    ({"validation": "valid"}, "no examples of split 'valid'"),
    ({"objective": "classification"}, "has no labels"),
    ({"freeze": ("image/.*",)}, "match no parameter: 'image/"),
    ({"lora": {"rank": 2}, "freeze": ("img/.*",)}, "either lora or freeze"),
    ({"mesh": {"data": 0}}, "mesh.data is 0; expected at least 1"),
    ({"best": "val_auc"}, "no best without validation"),
    ({"best": "val_acc", "validation": "validation", "objective": "classification",
      "data__label": "label"}, "'val_acc'; expected one of .*: val_loss, val_accuracy, val_auc$"),
    ({"best": "val_auc", "validation": "validation"}, "'val_auc'; expected .*val_recall@1$"),
    ({"best": "val_accuracy", "validation": "validation", "objective": "classification",
      "data__label": ("bright", "grey")}, "'val_accuracy'; expected one of .*: val_loss, val_auc$"),
    ({"ema": 1.0}, "ema is 1.0; expected more than 0 and less than 1"),
    ({"lora": {"train": ("txt/haed/.*",)}}, "match no parameter: 'txt/haed"),
    ({"objective__name": "classification", "objective__pos_weight": "balanced",
      "data__label": "label"}, "pos_weight is for several findings"),
    ({"optimizer__schedule": "cos"}, "optimizer.schedule is 'cos'; expected one of cosine"),
    ({"objective__name": "classification", "objective__pos_weight": (1.0,),
      "data__label": ("bright", "grey")}, "1 numbers for the 2 classes bright, grey"),
])  # fmt: skip
def test_recipes_that_cannot_run(data, tmp_path, changes, say):
    with pytest.raises(ValueError, match=say):
        finetune.run(config(data, **changes), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_folders_that_are_taken(data, ordinary, tmp_path):
    with pytest.raises(FileExistsError, match="another config .seed: 0 -> 7"):
        finetune.run(config(data, seed=7, **ORDINARY), ordinary)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(FileExistsError, match="not a fine-tuning run"):
        finetune.run(config(data), tmp_path)
    (tmp_path / "config.json").write_text('{"recipe": {"total')  # a run may have been here
    with pytest.raises(ValueError, match="config.json: not the config of a fine-tuning run as"):
        finetune.run(config(data), tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]


def test_before_the_first_checkpoint_everything_may_change(data, tmp_path):
    def crash(done, values):
        raise Crash

    with pytest.raises(Crash):
        finetune.run(config(data), tmp_path, on_step=crash)
    warned = []
    changes = dict(seed=1, bias=-2.0)
    finetune.run(config(data, **changes), tmp_path, warn=warned.append)
    assert sorted(line.split(": ")[1] for line in warned) == ["bias", "seed"]
    with pytest.raises(ValueError, match="total_steps is 5, but .* is at step 6 already"):
        finetune.run(config(data, **changes, total_steps=5), tmp_path)


def test_images_that_are_all_elsewhere(data, tmp_path):
    with pytest.raises(ValueError, match="none of the 8 images of a batch could be read"):
        finetune.run(config(data, data__root="/no/where"), tmp_path)


# -------------------------------------------------------------------------------------- in a bucket


@pytest.mark.slow
def test_a_run_in_a_bucket_is_interrupted_and_goes_on(data, bucket, tmp_path):
    """Data, tokenizer's model and workdir on gs://; the same figures as on a disk."""
    place = places.at(f"{bucket}/data")
    for file in data.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    asked = config(
        data, data__path=f"{bucket}/data/rows.csv", checkpoint_every=2, total_steps=7,
        validation="validation", eval_every=4, best="val_loss", tensorboard=True,
    )  # fmt: skip
    finetune.run(asked, tmp_path / "disk")

    class Crash(Exception):
        pass

    def crash(done, values):
        if done == 5:
            raise Crash

    workdir = f"{bucket}/run"
    with pytest.raises(Crash):
        finetune.run(asked, workdir, on_step=crash)
    result = finetune.run(asked, workdir)
    remote = places.at(workdir)
    lines = [
        [{k: v for k, v in x.items() if k not in loop.TIMES} for x in storage.read_lines(
            folder / loop.METRICS)] for folder in (tmp_path / "disk", remote)
    ]  # fmt: skip
    assert lines[0] == lines[1] and lines[0][-1]["step"] == 7
    weights = (remote / "export" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "disk" / "export" / "model.safetensors").read_bytes()
    assert "<polyline" in (remote / "report.html").read_text()
    assert len(list((remote / "tensorboard").iterdir())) == 2
    assert not (remote / ".lock").exists()
    model = medsiglip_jax.load(result["export"])
    assert model.source == f"{workdir}/export" and model.config.vision.width == 16


def test_a_bucket_without_orbax_support_is_one_line(data):
    with pytest.raises(ValueError, match="expected a local folder, gs://, s3://"):
        finetune.run(config(data), "memory://run")
