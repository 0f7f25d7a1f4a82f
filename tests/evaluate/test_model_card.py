"""A model card has the recorded figures, says where the model fails, and asks a person the rest."""

import json
import re

import numpy as np
import pytest

from medsiglip_jax.cli import main
from medsiglip_jax.evaluate import tasks
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.report import model_card
from medsiglip_jax.evaluate.report.failures import known_failures
from medsiglip_jax.evaluate.results.summary import summarize
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.pages.card import TO_FILL

CLASSES = ["edema", "fracture", "nodule"]
SHA = "5a" * 32


def scores(signal, seed, n=400, slope=1.0, where=None):
    """Log odds that know `signal` of each finding; `where`, those that know nothing."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 3)) < 0.4).astype(float)
    known = np.full((n, 3), signal) * (1 if where is None else ~where[:, None])
    logits = slope * (known * (labels - 0.5) * 2 + rng.normal(size=(n, 3)))
    content = {
        "title": "Chest | films", "kind": "multi_label", "score": "pair_softmax",
        "data": {"adapter": "folders"},
        "classes": [{"name": c, "present": [c], "absent": [f"no {c}"]} for c in CLASSES],
        "published": {"where": "a paper", "mean": 0.9, "auc": {"edema": 0.99}},
    }  # fmt: skip
    versions = {"jax": "0.1"}
    model = {"source": "/home/somebody/secret/chest", "sha256": SHA}
    made = {"model": model, "preprocess": "serving", "score": "pair_softmax", "versions": versions}
    meta = {
        "task": tasks.parse("chest", content).to_dict(), "cells": [], "counts": {"unreadable": 7},
        "provenance": made, "statistics": {"resamples": 20, "seed": 0},
        "leaks": [{"note": "a copy"}],
    }  # fmt: skip
    return Scores([f"{seed}-{i}" for i in range(n)], CLASSES, logits, labels, None, meta)


def evaluated(signal=(1.2, 1.2, 1.2), worse=None, slope=1.0):
    """Results of test images, some of which a bad scanner may have made."""
    scanner = np.array(["A", "B"] * 200)
    where = None if worse is None else scanner == worse
    test, validation = scores(signal, seed=2, where=where, slope=slope), scores(signal, seed=3)
    learned = Learned("of the data set", None, test, validation)
    return summarize(test, {"scanner": scanner.tolist()}, learned=learned)


def folder(tmp_path, name="test", **changes):
    place = tmp_path / name
    place.mkdir()
    content = evaluated() | changes
    (place / "results.json").write_text(json.dumps(content))
    return str(place)


def test_the_figures_of_the_evaluation_are_in_the_card(tmp_path, capsys):
    output = tmp_path / "card.md"
    assert main(["card", folder(tmp_path), "--output", str(output), "--json"]) == 0
    text, content = output.read_text(), evaluated()
    said = json.loads(capsys.readouterr().out)
    assert said == {"output": str(output), "to_be_filled_in": text.count(TO_FILL)}
    assert text.count(TO_FILL) >= 10
    for row in (*content["classes"], *content["subgroups"]):
        assert f"{row['auc']:.3f} | {row['low']:.3f} to {row['high']:.3f}" in text
    for point in content["held_out"]["zero_shot"]["operating_points"]:
        assert f"| {point['threshold']!r} |" in text
    (answers,) = (r for r in content["held_out"]["zero_shot"]["selective"] if r["of"] == "edema")
    assert f"| edema | {answers['aurc']['value']:.3f} (" in text
    assert SHA in text and "`serving`" in text and "somebody" not in text
    assert r"### Chest \| films" in text and "## Contraindicated uses" in text
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert len(headings) == len(set(headings)) == 11


@pytest.mark.parametrize(
    "planted, said",
    [
        ({"signal": (0.0, 1.2, 1.2)}, "edema is not shown to be better than chance"),
        ({"signal": (1.2, -1.2, 1.2)}, "fracture orders images the wrong way round"),
        ({}, "edema is below the published AUC of 0.990"),
        ({"worse": "B"}, "Images of scanner B have a lower AUC of nodule than the others"),
        ({"worse": "B"}, "Images of scanner B have a lower sensitivity for nodule"),
        ({"slope": 4.0}, "zero-shot scores, nodule is overconfident after calibration"),
        ({"slope": 0.2}, "zero-shot scores, nodule is underconfident after calibration"),
        ({"signal": (1.2, 1.2, -1.2)}, "The calibration curve of zero-shot scores, nodule falls"),
        ({}, "7 images could not be read"),
        ({}, "overlap in 1 ways that were allowed"),
    ],
)
def test_what_fails_is_said(planted, said):
    found = list(known_failures(evaluated(**planted)))
    assert [line for line in found if said in line], found


def test_confidence_that_tells_nothing_is_said():
    content = evaluated()
    row = content["held_out"]["zero_shot"]["selective"][2]
    wrong = 1 - row["accuracy"][0]["value"]
    row["aurc"] = {"value": wrong + 0.01, "low": wrong - 0.05, "high": wrong + 0.07}
    (said,) = (line for line in known_failures(content) if "confident answers" in line)
    assert "zero-shot scores, nodule, confident answers are wrong as often as others" in said


def test_what_does_not_fail_is_not_said():
    content = evaluated()
    content |= {"counts": {"unreadable": 0}, "leaks": []}
    assert [x for x in known_failures(content) if "published" not in x] == []


def test_a_card_is_of_one_model(tmp_path, capsys):
    model = {"source": "other", "sha256": "0" * 64}
    other = folder(tmp_path, "other", provenance=evaluated()["provenance"] | {"model": model})
    given = ["card", folder(tmp_path), other, "--output", str(tmp_path / "card.md")]
    assert main(given) == 2 and not (tmp_path / "card.md").exists()
    assert f"{other}: evaluated other weights" in capsys.readouterr().err


@pytest.mark.parametrize("given", [".", "sub/.."])
def test_the_title_is_the_name_of_the_folder(tmp_path, monkeypatch, given):
    evaluation = folder(tmp_path, "chest")
    (tmp_path / "chest" / "sub").mkdir()
    monkeypatch.chdir(evaluation)
    assert main(["card", given, "--output", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text().startswith("# chest\n")


def test_a_run_from_random_weights_names_none_that_it_started_from():
    config = {"init_sha256": None, "data_sha256": "d", "versions": {}}
    made = model_card._provenance(model_card.FineTuned(config, {}, "e"), [])
    rows = {name: value for name, value in made}
    assert rows["weights, SHA-256"] == "e" and "None" not in str(rows)


def test_weights_without_a_hash_may_be_any(tmp_path, capsys):
    model = {"source": "memory", "sha256": None}
    none = evaluated()["provenance"] | {"model": model}
    folders = [folder(tmp_path, name, provenance=none) for name in ("a", "b")]
    output = ["--output", str(tmp_path / "card.md")]
    assert main(["card", folders[0], *output]) == 0
    assert main(["card", *folders, *output]) == 2
    assert "other weights" in capsys.readouterr().err
    assert main(["card", folders[0], "--output", str(tmp_path / "card.txt")]) == 2


def test_a_card_that_somebody_has_edited_is_kept(tmp_path, capsys):
    output = tmp_path / "card.md"
    given = ["card", folder(tmp_path), "--output", str(output), "--title", "Chest"]
    assert main(given) == main(given) == 0  # its own card it may replace
    output.write_text(output.read_text().replace(TO_FILL, "Answered:", 1))
    edited = output.read_text()
    assert main(given) == 2 and output.read_text() == edited
    assert "--overwrite" in capsys.readouterr().err
    assert main([*given, "--overwrite"]) == 0 and "Answered:" not in output.read_text()


@pytest.mark.parametrize(
    "content, said",
    [(None, "neither an evaluation"), ("{}", "not the results of an evaluation by this version"),
     ("[", "not the results of an evaluation"), ('{"title": 3}', "evaluate --from")],
)  # fmt: skip
def test_other_folders_are_named_in_one_line(tmp_path, content, said, capsys):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert main(["card", str(tmp_path), "--output", str(tmp_path / "x" / "card.md")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and str(tmp_path) in line
