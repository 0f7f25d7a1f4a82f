"""What held-out images fix and judge, and what the report says of it: of made-up scores alone."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import special

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import tasks
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.report import sections
from medsiglip_jax.evaluate.results import held_out
from medsiglip_jax.evaluate.results.summary import summarize
from medsiglip_jax.evaluate.scores import Scores

CLASSES = ["a", "b", "c"]
SAMPLES = 60
FACTS = {"images": {"test": 40}, "how": "h", "scale": "standard", "strengths": {}, "k": 20}


def one_class_each(n, seed, classes=CLASSES):
    """A softmax that knows something of one class an image."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % len(classes)
    logits = rng.normal(size=(n, len(classes))) + 1.5 * np.eye(len(classes))[truth]
    values, labels = special.softmax(logits, axis=1), np.eye(len(classes))[truth]
    return Scores([f"{seed}-{i}" for i in range(n)], classes, values, labels, None, {})


def never_learned(scores, column=2):
    """As a probe whose training images lack a class."""
    values = np.delete(scores.scores, column, axis=1)
    values = np.insert(values / values.sum(axis=1, keepdims=True), column, np.nan, axis=1)
    return replace(scores, scores=values)


def of(scores, *classes):
    return scores.select(np.flatnonzero(scores.labels[:, list(classes)].any(axis=1)))


# ---------------------------------------------------------------------------- selective prediction


def test_the_highest_calibrated_probability_is_answered_first():
    validation, test = one_class_each(90, 1), one_class_each(200, 2)
    judged = held_out.judge(validation, test, "class_softmax", True)
    (found,), (fitted,) = judged["selective"], judged["calibration"]
    temperature = fitted["parameters"]["temperature"]
    p = special.softmax(np.log(test.scores) / temperature, axis=1)
    right = p.argmax(axis=1) == test.labels.argmax(axis=1)
    assert found["aurc"]["value"] == pytest.approx(metrics.aurc(p.max(axis=1), right).value)
    most = np.argsort(-p.max(axis=1))[:180]
    assert found["accuracy"][1]["value"] == pytest.approx(right[most].mean())
    whole = found["accuracy"][0]
    assert found["curve"]["accuracy"][-1] == whole["value"] == right.mean()
    assert found["curve"]["coverage"][-1] == whole["coverage"] == 1
    assert found["accuracy"][-1]["value"] > whole["value"] > 0.5


def test_findings_far_from_the_threshold_are_answered_first():
    validation, test = one_class_each(90, 1), one_class_each(200, 2)
    found = held_out.judge(validation, test, "classifier", False)["selective"]
    assert [row["of"] for row in found] == CLASSES
    threshold = metrics.choose_threshold(validation.scores[:, 1], validation.labels[:, 1])
    right = (test.scores[:, 1] >= threshold) == (test.labels[:, 1] == 1)
    far = np.abs(special.logit(test.scores[:, 1]) - special.logit(threshold))
    assert found[1]["aurc"]["value"] == pytest.approx(metrics.aurc(far, right).value)


def test_patients_decide_on_the_interval_of_accuracy_against_coverage():
    validation, test = one_class_each(90, 1), one_class_each(200, 2)
    groups = [f"p{i // 20}" for i in range(200)]
    alone, of_patients = (
        held_out.judge(validation, scores, "class_softmax", True)["selective"][0]["aurc"]
        for scores in (test, replace(test, groups=groups))
    )
    assert alone["value"] == of_patients["value"] and alone["low"] != of_patients["low"]


# ------------------------------------------------------------------------------------ calibration


def test_images_of_a_class_that_was_never_learned_have_no_say_in_the_temperature():
    validation, test = (never_learned(one_class_each(n, n)) for n in (90, 60))
    (found,) = held_out.judge(validation, test, "probe", True)["calibration"]
    seen = of(validation, 0, 1)
    want = metrics.fit_temperature(np.log(seen.scores[:, :2]), seen.labels.argmax(axis=1))
    assert found["parameters"]["temperature"] == pytest.approx(want.value, rel=1e-9)
    assert found["left_out"] == 30
    (alone,) = held_out.judge(seen, test, "probe", True)["calibration"]
    assert (alone["parameters"], alone["left_out"]) == (found["parameters"], 0)
    # All test images count: of those of the class that was not learned, none is right.
    p = np.insert(want(np.log(test.scores[:, :2])), 2, 0, axis=1)
    assert found["after"]["brier"] == pytest.approx(((p - test.labels) ** 2).sum(axis=1).mean())
    assert sum(found["after"]["curve"]["rows"]) == 60


@pytest.mark.parametrize("kept", [(2,), (0, 2), (0,)])
def test_validation_images_of_one_learned_class_give_no_temperature(kept):
    validation, test = (never_learned(one_class_each(n, n)) for n in (90, 60))
    found = held_out.judge(of(validation, *kept), test, "probe", True)
    assert found["calibration"] == [] and found["unlearned"] == ["c"]


def test_probabilities_of_pairs_are_no_distribution_over_classes():
    validation, test = (one_class_each(n, n) for n in (90, 60))
    odds = [replace(x, scores=special.logit(x.scores), log_odds=True) for x in (validation, test)]
    before = {
        (rule, exclusive): held_out.judge(
            *(odds if rule == "pair_softmax" else (validation, test)), rule, exclusive
        )["calibration"][0]
        for rule in ("pair_softmax", "class_softmax", "cosine")
        for exclusive in (True, False)
    }
    there = {key for key, row in before.items() if row["before"] is not None}
    assert there == {
        ("pair_softmax", False),
        ("class_softmax", True),
        ("class_softmax", False),
    }
    # Of log odds, everything that is stated is as of their probabilities.
    pair, single = (before[rule, False] for rule in ("pair_softmax", "class_softmax"))
    assert pair["method"] == single["method"] == "Platt on log odds"
    for key in ("ece", "ece_mass", "brier"):
        assert pair["before"][key] == pytest.approx(single["before"][key], abs=1e-12)
        assert pair["after"][key] == pytest.approx(single["after"][key], abs=1e-9)
    points = [
        held_out.judge(*x, rule, False)["operating_points"]
        for x, rule in ((odds, "pair_softmax"), ((validation, test), "class_softmax"))
    ]
    for one, other in zip(*points, strict=True):
        assert one["threshold"] == pytest.approx(other["threshold"], abs=1e-12)
        assert one["sensitivity"] == other["sensitivity"]
        assert special.expit(one["threshold_log_odds"]) == one["threshold"]


# ------------------------------------------------------------------------------------- the report


def test_subgroups_share_a_threshold():
    validation, test = findings(90, 1, (40, 40, 40)), findings(80, 0, (30, 30, 30))
    sex = ["F", "M"] * 40
    found = held_out.judge(validation, test, "cosine", False, attributes={"sex": sex})
    rows = {(x["subgroup"], x["class"], x["share"]): x for x in found["subgroups"]}
    assert len(rows) == 2 * 3 * 2
    threshold = metrics.choose_threshold(validation.scores[:, 1], validation.labels[:, 1])
    negative = test.labels[:, 1] == 0
    right = test.scores[negative, 1] < threshold
    women = np.array(sex)[negative] == "F"
    row = rows["F", "b", "specificity"]
    assert row["value"] == right[women].mean() and row["images"] == women.sum()
    assert row["gap"] == pytest.approx(right[women].mean() - right[~women].mean())


def test_scores_that_are_the_wrong_way_round_are_told():
    validation, test = findings(90, 1, (40, 40, 40)), findings(80, 0, (30, 30, 30))
    values = validation.scores * [1, -1, 1] + [0, 1, 0]
    wrong = replace(validation, scores=values)
    content, tables, _ = evaluated("multi_label", test, wrong, test, validation)
    rows = content["held_out"]["zero_shot"]["calibration"]
    assert [row["reversed"] for row in rows] == [False, True, False]
    assert "Of b the score orders images the wrong way" in _calibration(tables, "zero-shot scores")
    assert "wrong way" not in _calibration(tables, "the probe")
    assert rows[0]["after"]["slope"].keys() == {"value", "low", "high"}
    curve = rows[0]["after"]["curve_mass"]
    assert len(curve["rows"]) == 15 and max(curve["rows"]) - min(curve["rows"]) <= 1


def _calibration(tables, name):
    return tables[f"Calibration of {name}"].text


def findings(n, seed, positives):
    """Scores that know something of findings with so many positives."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.permutation(n) < count for count in positives], axis=1).astype(float)
    values = special.expit(rng.normal(size=labels.shape) + labels)
    return Scores([f"{seed}-{i}" for i in range(n)], CLASSES, values, labels, None, {})


def evaluated(kind, zero_shot, validation, probe, probe_validation):
    """results.json, its tables by heading, and the scores of the run."""
    task = tasks.parse("t", {
        "title": "T", "kind": kind, "score": "cosine", "data": {"adapter": "folders"},
        "classes": [{"name": name} for name in CLASSES],
    }).to_dict()  # fmt: skip
    statistics = {"resamples": SAMPLES, "seed": 0}
    meta = {"task": task, "statistics": statistics, "counts": {}, "provenance": {}}
    run = replace(zero_shot, meta=meta)
    images = {"train": 100, "validation": len(validation.ids), "test": len(run.ids)}
    learned = ~np.isnan(probe.scores).any(axis=0)
    strengths = {
        name: 0.1 if there or kind == "multi_class" else None
        for name, there in zip(CLASSES, learned, strict=True)
    }
    facts = {**FACTS, "images": images, "strengths": strengths}
    row = {"seed": 0, "auc": 0.7, "undefined": []}
    curves = {
        "learning_curve": [{"method": "logistic", "n": 100, **row}],
        "few_shot": [{"method": "prototypes", "shots": 32, **row}],
    }
    probe, near = replace(probe, meta=facts), replace(zero_shot, meta=facts)
    found = Learned("h", None, run, validation, probe, probe_validation, near, curves)
    content = summarize(run, {}, (), found)
    return content, {s.title: s for s in sections.sections(content)}, run


def report_of_findings(positives, in_validation=(20, 20, 20), unlearned=()):
    test, validation = findings(80, 0, positives), findings(60, 1, in_validation)
    probe, other = findings(80, 2, positives), findings(60, 3, in_validation)
    probe = replace(probe, ids=test.ids, labels=test.labels)
    other = replace(other, ids=validation.ids, labels=validation.labels)
    for scores in (probe, other):
        scores.scores[:, list(unlearned)] = np.nan
    return evaluated("multi_label", test, validation, probe, other)


def report_of_grades(validation):
    test = one_class_each(60, 0)
    probe = replace(one_class_each(60, 2), ids=test.ids)
    return evaluated("multi_class", test, validation, probe, validation)


def test_few_positives_are_marked_beside_their_p_values():
    content, tables, _ = report_of_findings((9, 10, 71))
    assert [one["few"] for one in content["probe"]["classes"]] == [True, False, True]
    table = tables["Linear probe against zero-shot"]
    assert [row[0] for row in table.rows] == ["a *", "b", "c *", "mean"]
    assert "* fewer than 10 patients" in table.text


def test_a_class_that_was_not_learned_is_counted_as_in_the_main_table():
    content, tables, _ = report_of_findings((30, 20, 13), unlearned=(2,))
    one = content["probe"]["classes"][2]
    assert (one["positives"], one["negatives"], one["auc"]) == (13, 67, None)
    main = content["classes"][2]
    assert (main["positives"], main["negatives"]) == (13, 67)
    assert tables["Linear probe against zero-shot"].rows[2][-2:] == ("13", "67")


def test_a_probe_that_is_judged_per_patient_says_of_how_many():
    content, tables, _ = report_of_grades(one_class_each(90, 1))
    assert content["probe"]["judged"] == {"validation": 90, "test": 60}
    assert "It is judged on 60 test images" in tables["Linear probe against zero-shot"].text
    assert "by itself" not in tables["Learning from less"].text
    content["probe"]["images"] |= {"validation": 180, "test": 120}  # two of each patient
    tables = {s.title: s for s in sections.sections(content)}
    said = "It is judged on 60 patients with 120 test images"
    assert said in tables["Linear probe against zero-shot"].text
    assert "each image is judged by itself" in tables["Learning from less"].text


def test_why_there_is_no_threshold():
    _, tables, _ = report_of_findings((30, 0, 13), unlearned=(2,))
    text = tables["Operating points of the probe"].text
    assert "because the training images do not have both labels: c." in text
    assert "because validation or test images do not have both labels: b." in text
    text = tables["Operating points of zero-shot scores"].text
    assert "training" not in text and text.endswith("do not have both labels: b.")


@pytest.mark.parametrize(
    "in_validation, unlearned, unchosen, said",
    [
        ((20, 20, 20), (), [], "its strength was chosen on 60 validation images. "),
        ((20, 0, 20), (), ["b"], "except for b: the validation images do not have both labels"),
        ((20, 0, 20), (1,), [], "its strength was chosen on 60 validation images. "),
        (
            (0, 0, 60),
            (1,),
            ["a", "c"],
            "60 validation images do not have both labels of any",
        ),
    ],
)
def test_what_validation_images_could_not_choose(in_validation, unlearned, unchosen, said):
    content, tables, _ = report_of_findings((30, 30, 30), in_validation, unlearned)
    assert content["probe"]["unchosen"] == unchosen
    text = tables["Linear probe against zero-shot"].text
    assert said in text and ("was chosen on" in text) == (len(unchosen) < 2)


def test_validation_images_of_one_grade_choose_nothing_and_have_no_empty_table():
    whole = one_class_each(90, 1)
    content, tables, _ = report_of_grades(whole)
    assert content["probe"]["unchosen"] == [] and "Calibration of the probe" in tables
    content, tables, _ = report_of_grades(of(whole, 1))
    assert content["probe"]["unchosen"] == CLASSES
    assert not [title for title in tables if title.startswith("Calibration")]
    said = "because 30 validation images do not have both labels of any learned class"
    assert said in tables["Linear probe against zero-shot"].text


def test_shots_of_findings_are_with_and_without():
    for tables, said in (
        (report_of_findings((30, 30, 30))[1], "32 with and without each finding"),
        (report_of_grades(one_class_each(90, 1))[1], "32 of each class"),
    ):
        assert tables["Learning from less"].rows[1][:2] == ("prototypes", said)


def test_validation_images_that_had_no_say_are_counted():
    test, validation = one_class_each(60, 0), one_class_each(90, 1)
    probes = [never_learned(x) for x in (replace(one_class_each(60, 2), ids=test.ids), validation)]
    _, tables, _ = evaluated("multi_class", test, validation, *probes)
    assert "30 validation images are of classes that" in tables["Calibration of the probe"].text
    assert "were left out" not in tables["Calibration of zero-shot scores"].text


def test_thresholds_are_printed_to_the_last_digit():
    validation, test = one_class_each(90, 0), one_class_each(60, 1)
    sure = replace(validation, scores=1 - 1e-7 * (1.3 - validation.scores))  # .6g: "1"
    content, tables, _ = evaluated("multi_class", test, sure, test, sure)
    points = content["held_out"]["zero_shot"]["operating_points"]
    shown = [row[2] for row in tables["Operating points of zero-shot scores"].rows]
    assert [float(text) for text in shown] == [point["threshold"] for point in points]
    assert "1" not in shown


# ------------------------------------------------------------------------------------- the means


@pytest.mark.parametrize("unlearned", [(), (2,)])
def test_means_are_of_the_classes_that_both_have(unlearned):
    content, _, run = report_of_findings((30, 30, 30), unlearned=unlearned)
    found = metrics.macro_delong(run.scores, run.labels).auc
    limits = {"auc": found.value, "low": found.low, "high": found.high}
    assert content["macro_auc"].items() >= limits.items()
    assert (content["macro_auc"] == content["probe"]["zero_shot_macro"]) == (not unlearned)
    probe = content["probe"]
    difference = probe["macro_auc"]["auc"] - probe["zero_shot_macro"]["auc"]
    assert probe["difference"]["value"] == pytest.approx(difference, abs=1e-12)


def test_of_other_images_the_main_mean_is_its_own():
    content, _, run = report_of_findings((30, 30, 30))
    part = replace(run.select(np.arange(0, 80, 2)), meta={**run.meta, **FACTS})
    rows = {"learning_curve": [], "few_shot": []}
    got = summarize(run, {}, (), Learned("h", None, part, run, part, run, part, rows))
    assert got["macro_auc"] == content["macro_auc"] != got["probe"]["zero_shot_macro"]
