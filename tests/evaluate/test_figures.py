"""Accuracy, F1 and the like in results and report, beside what was published."""

from dataclasses import asdict

import numpy as np
import pytest
from sklearn import metrics as reference

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import tasks
from medsiglip_jax.evaluate.report import sections
from medsiglip_jax.evaluate.results.summary import summarize
from medsiglip_jax.evaluate.scores import Scores

TITLE = "One class for each image"


def scores_of(task, n=90, groups=None):
    rng = np.random.default_rng(0)
    count = len(task.classes)
    truth = rng.integers(count, size=n)
    values = rng.normal(size=(n, count)) + 1.5 * np.eye(count)[truth]
    meta = {
        "task": task.to_dict(), "statistics": {"resamples": 50, "seed": 0}, "counts": {},
        "provenance": {"score": task.score},
    }  # fmt: skip
    names = [c.name for c in task.classes]
    return Scores([str(i) for i in range(n)], names, values, np.eye(count)[truth], groups, meta)


def reported(task, found):
    content = summarize(found, {})
    table = next(s for s in sections.sections(content) if s.title == TITLE)
    return content, {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_the_official_notebooks_figures_stand_beside_ours():
    task = tasks.read("crc-val-he-7k")
    found = scores_of(task)
    content, rows = reported(task, found)
    assert rows["accuracy"]["published"] == "0.491"
    assert rows["weighted F1"]["published"] == "0.464"
    fine_tuned = [rows[k]["published, fine-tuned"] for k in ("accuracy", "weighted F1")]
    assert fine_tuned == ["0.955", "0.954"]
    assert rows["macro F1"]["published"] == "–"
    assert not content["published"]["same_images"] and "seed=42" in content["published"]["note"]
    named, truth = found.scores.argmax(1), found.labels.argmax(1)
    figures = content["one_class_each"]["figures"]
    want = reference.f1_score(truth, named, average="weighted")
    assert figures["weighted_f1"]["value"] == pytest.approx(want, abs=1e-12)
    assert figures["weighted_f1"]["difference"] == pytest.approx(want - 0.464)
    accuracy = figures["accuracy"]
    assert accuracy["inside"] == (accuracy["low"] <= 0.491 <= accuracy["high"])
    assert figures["top_3_accuracy"]["value"] == metrics.top_k_accuracy(found.scores, truth, 3)
    assert "top_5_accuracy" in figures and "quadratic_kappa" not in figures


def test_intervals_of_accuracies_are_of_patients():
    task = tasks.read("crc-val-he-7k")
    patients = [str(i // 3) for i in range(90)]
    found = scores_of(task, groups=patients)
    figures = reported(task, found)[0]["one_class_each"]["figures"]
    hits = found.scores.argmax(1) == found.labels.argmax(1)
    want = metrics.proportion(hits, np.array(patients))
    got = figures["accuracy"]
    assert [got["low"], got["high"]] == pytest.approx([want.low, want.high])


def test_grades_have_quadratic_kappa_and_nothing_published_no_empty_columns():
    task = tasks.read("aptos-2019")
    content, rows = reported(task, scores_of(task))
    each = content["one_class_each"]
    kappa = each["figures"]["quadratic_kappa"]
    assert kappa["value"] == pytest.approx(each["quadratic_kappa"], abs=1e-12)
    assert list(rows["accuracy"]) == ["of the highest score", "", "95 % interval"]
    assert "top_5_accuracy" not in each["figures"]  # of five grades it is 1


@pytest.mark.parametrize(
    "published, message",
    [
        ({"accuracy": 49.1}, "published.accuracy is 49.1; expected a share"),
        ({"others": {"mine": {"auc": 0.5}}}, "published.others.mine: 'auc'; expected accuracy or"),
        ({"others": {"mine": {"accuracy": -1.0}}}, "published.others.mine.accuracy is -1"),
    ],
)
def test_published_figures_are_checked(published, message):
    content = asdict(tasks.read("crc-val-he-7k")) | {"published": {"where": "w", **published}}
    with pytest.raises(ValueError, match=message):
        tasks.from_dict(content)


def test_findings_have_no_published_accuracy():
    content = asdict(tasks.read("chexpert-test")) | {"published": {"where": "w", "accuracy": 0.5}}
    with pytest.raises(ValueError, match=r"published.accuracy needs kind 'multi_class'"):
        tasks.from_dict(content)
