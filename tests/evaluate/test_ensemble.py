"""The mean of several evaluations is an evaluation, and takes only what has a mean."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medsiglip_jax import cli
from medsiglip_jax.evaluate import ensemble, learned, scores, tasks
from medsiglip_jax.evaluate.recompute import recompute
from medsiglip_jax.evaluate.scores import Scores

CLASSES = ["Alpha", "Beta"]
TASK = tasks.parse("t", {
    "title": "T", "kind": "multi_label", "score": "cosine", "data": {"adapter": "folders"},
    "classes": [{"name": name, "present": ["x"]} for name in CLASSES],
}).to_dict()  # fmt: skip


def written(folder, seed, learning=True, **changes):
    """The folder of an evaluation of 80 images, with scores of validation images."""
    rng = np.random.default_rng(0)
    sides = {scores.FILE: 80, learned.VALIDATION: 60} if learning else {scores.FILE: 80}
    for file, n in sides.items():
        labels = (rng.random((n, 2)) < 0.4).astype(float)
        values = labels + np.random.default_rng([seed, n]).normal(size=labels.shape)
        meta = {
            "task": TASK, "run": f"run {seed}", "cells": [], "counts": {}, "retrieval": False,
            "provenance": {"score": "cosine", "model": seed},
            "statistics": {"resamples": 20, "seed": 0},
        }  # fmt: skip
        facts = {"how": "of the data set", "drawn": False, "probe": True, "prevalence": None}
        meta["learned"] = facts if learning else None
        ids = [f"{file} {i}" for i in range(n)]
        found = Scores(ids, CLASSES, values, labels, [f"p{i // 2}" for i in range(n)], meta)
        found = replace(found, **changes)
        scores.write(folder / file, found)
    columns = {"id": [f"{scores.FILE} {i}" for i in range(80)], "sex": ["F", "M"] * 40}
    scores.write_columns(folder / scores.IMAGES, columns, {"run": f"run {seed}"})
    return folder


@pytest.fixture
def three(tmp_path):
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
    return [written(tmp_path / str(seed), seed) for seed in range(3)]


def test_the_mean_is_judged_as_any_evaluation(three, tmp_path, capsys):
    out = tmp_path / "out"
    names = list(map(str, three))
    assert cli.main(["evaluate", "--average", *names, "--output", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sides = [scores.read(folder / scores.FILE) for folder in three]
    mean, labels = np.mean([side.scores for side in sides], axis=0), sides[0].labels
    for j, row in enumerate(found["classes"]):
        assert row["auc"] == pytest.approx(roc_auc_score(labels[:, j], mean[:, j]), abs=1e-12)
        own = [roc_auc_score(labels[:, j], side.scores[:, j]) for side in sides]
        assert row["auc"] > max(own)  # of three that err independently
    assert found["groups"] == 40 and found["provenance"]["average_of"] == ", ".join(names)
    assert {row["attribute"] for row in found["subgroups"]} == {"sex"}
    points = found["held_out"]["zero_shot"]["operating_points"]
    validation = [scores.read(folder / learned.VALIDATION).scores for folder in three]
    thresholds = [p["threshold"] for p in points if p["class"] == "Alpha"]
    assert set(thresholds) <= set(np.mean(validation, axis=0)[:, 0])
    assert found["probe"] is None and recompute(out) == found
    assert "model" not in found["provenance"]  # which differs
    ensemble.average(three[:2], out)  # replaces an average
    assert not (out / "results.json").exists()  # it was of the average before
    recompute(out)
    assert cli.main(["compare", names[0], str(out), "--json"]) == 0


def test_without_validation_images_everywhere_nothing_is_chosen(three, tmp_path):
    """Those that an earlier run left in a folder are not of this run."""
    written(three[1], 7, learning=False)
    ensemble.average(three, tmp_path / "out")
    assert recompute(tmp_path / "out")["held_out"] is None
    stale = scores.read(three[2] / learned.VALIDATION)
    meta = {**stale.meta, "run": "another"}
    scores.write(three[2] / learned.VALIDATION, replace(stale, meta=meta))
    with pytest.raises(ValueError, match="are of different runs"):
        ensemble.average([three[0], three[2]], tmp_path / "other")


def test_what_has_no_mean_is_one_line(three, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="1 evaluation to average; expected at least two"):
        ensemble.average(three[:1], out)
    other = tmp_path / "other"
    other.mkdir()
    written(other, 5, learning=False, classes=["Alpha", "Gamma"])
    with pytest.raises(ValueError, match="B is .*other: different classes"):
        ensemble.average([three[0], other], out)
    found = scores.read(three[0] / scores.FILE)
    meta = {**found.meta, "provenance": {"score": "class_softmax"}}
    scores.write(other / scores.FILE, replace(found, meta=meta))
    with pytest.raises(ValueError, match="score is cosine in A and class_softmax in B"):
        ensemble.average([three[0], other], out)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ensemble.average([three[0], tmp_path / "nowhere"], out)
    with pytest.raises(FileExistsError, match="holds an evaluation of a model"):
        ensemble.average(three, three[0])
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not an evaluation"):
        ensemble.average(three, out)
    names = list(map(str, three))
    assert cli.main(["evaluate", "--average", *names]) == 2
    assert "--average needs --output" in capsys.readouterr().err
    assert cli.main(["evaluate", "--average", *names, "--output", str(out), "--grid"]) == 2
    assert "--average takes --resamples" in capsys.readouterr().err
