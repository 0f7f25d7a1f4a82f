"""monitor fit and monitor check: what alarms, what is refused, and what is written."""

import json
import re

import numpy as np
import pytest
from known_images import vectors

from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.trust.monitor import check, images, reference, report, windows


def test_usual_images_do_not_alarm_and_others_do(run, write, reference, tmp_path):
    usual, moved = write("u", vectors(90, 1)[0]), write("m", vectors(90, 1, shift=0.7)[0])
    noisy = write("n", vectors(90, 1, scale=1.4)[0])
    flags = ["--reference", reference, "--output", tmp_path / "report", "--json"]
    code, text, err = run("monitor", "check", *flags, "--embeddings", usual)
    result = json.loads(text)
    assert (code, err) == (0, "") and not result["alarm"]
    tests = result["strata"]["all"]
    assert list(tests) == ["mmd", "mahalanobis", "knn", "unreadable"]
    assert all(set(t) == {"statistic", "p", "threshold", "alarm"} for t in tests.values())
    for folder, named in ((moved, "mmd"), (noisy, "mahalanobis")):
        code, text, _ = run("monitor", "check", *flags, "--embeddings", folder)
        tests = json.loads(text)["strata"]["all"]
        assert code == 4 and tests[named]["alarm"] and tests[named]["p"] < 0.005
        assert tests[named]["statistic"] > tests[named]["threshold"]


def test_the_report_is_a_page_json_and_metrics(run, write, reference, tmp_path):
    folder = write("<b>", vectors(90, 3, shift=0.7)[0])
    flags = ["--reference", reference, "--embeddings", folder, "--output", tmp_path / "r"]
    code, text, _ = run("monitor", "check", *flags)
    assert code == 4 and "ALARM; 90 images against a reference of 240; mmd" in text
    result = json.loads((tmp_path / "r" / "monitor.json").read_text())
    distances = [row["distance"] for row in result["unusual"]]
    assert distances == sorted(distances, reverse=True) and len(distances) == 24
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Something has changed" in page and "&lt;b&gt;" in page and "<b>0" not in page
    metrics = (tmp_path / "r" / "metrics.prom").read_text()
    parser = pytest.importorskip("prometheus_client.parser")
    families = {f.name: f for f in parser.text_string_to_metric_families(metrics)}
    alarms = {s.labels["test"]: s.value for s in families["medsiglip_jax_monitor_alarm"].samples}
    assert alarms["mmd"] == 1 and alarms["unreadable"] == 0
    assert all(family.documentation for family in families.values())
    assert run("monitor", "check", *flags)[0] == 4  # an earlier report is replaced


@pytest.mark.parametrize("mine", ["notes", ".ssh", "monitor.json", "report/notes"])
def test_a_folder_with_anything_but_a_report_is_never_replaced(
    run, write, reference, tmp_path, mine
):
    flags = ["--reference", reference, "--embeddings", write("e", vectors(90, 3)[0])]
    if mine == "report/notes":
        assert run("monitor", "check", *flags, "--output", tmp_path / "mine" / "report")[0] == 0
    path = tmp_path / "mine" / mine
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    code, _, err = run("monitor", "check", *flags, "--output", path.parent)
    assert code == 2 and f"{path.name}, which no monitor check wrote" in err
    assert path.read_text() == "{}"


def test_the_images_of_the_reference_are_no_new_ones(run, known, reference, tmp_path):
    flags = ["--reference", reference, "--embeddings", known, "--output", tmp_path / "report"]
    code, _, err = run("monitor", "check", *flags)
    assert code == 2 and "the reference was made of these embeddings" in err


def test_names_of_strata_are_escaped_for_prometheus():
    verdict = {"statistic": float("nan"), "p": 0.5, "threshold": float("inf"), "alarm": False}
    result = {"alarm": False, "rows": {}, "strata": {'a"\\\n': {"mmd": verdict}}}
    lines = report.prometheus(result).splitlines()
    assert any("_statistic{" in line and line.endswith(" NaN") for line in lines)
    assert 'medsiglip_jax_monitor_threshold{stratum="a\\"\\\\\\n",test="mmd"} +Inf' in lines


def test_strata_scores_labels_and_time(run, write, known, probe, table, tmp_path):
    tables = ["--metadata", table, "--labels", table, "--label", "grade", "--group", "who"]
    path = tmp_path / "r.npz"
    flags = ["--embeddings", known, "--probe", probe, "--by", "scanner", "--output", path, *tables]
    code, text, _ = run("monitor", "fit", *flags, "--json")
    facts = json.loads(text)
    assert code == 0 and facts["patients"] == 120 and facts["strata"]["scanner=new"] == 80
    x, labels = vectors(90, 2)
    x[30:] += 1.5 * (np.arange(90) % 3 == 0)[30:, None]  # the new scanner, in the second month
    later = write("later", x)
    check = ["monitor", "check", "--reference", path, "--embeddings", later, *tables]
    code, text, _ = run(*check, "--window", "30", "--json", "--output", tmp_path / "report")
    result = json.loads(text)
    assert code == 4
    assert [w["name"] for w in result["windows"]] == [
        "whole run", "rows 1 to 30", "rows 31 to 60", "rows 61 to 90",
    ]  # fmt: skip
    named = {"mmd", "mahalanobis", "knn", "probe", "probe_label", "auc", "calibration"}
    assert set(result["strata"]["all"]) == {*named, "metadata:scanner"}
    assert not result["windows"][1]["alarm"]
    assert "scanner=new" not in result["strata"]  # ten images say nothing
    code, text, _ = run(*check, "--json", "--output", tmp_path / "report")
    strata = json.loads(text)["strata"]
    assert strata["scanner=new"]["mmd"]["alarm"] and not strata["scanner=old"]["mmd"]["alarm"]
    flags = "--time", "when", "--window", "4w", "--output", tmp_path / "report"
    windows = json.loads(run(*check, *flags, "--json")[1])["windows"]
    assert [w["name"] for w in windows] == ["whole run", "2026-01-10", "2026-02-07", "2026-03-07"]
    partial = tmp_path / "partial.csv"
    with open(table, encoding="utf-8") as file:
        partial.write_text("".join(line for line in file if not line.startswith("later7,")))
    code, _, err = run(*check, *flags, "--metadata", partial)
    assert code == 2 and "has no when of 1 of 90 images, the first 'later7'" in err
    classes = windows[1]["described"]["classes"]
    assert set(classes) == {"a", "b", "c"} and classes["a"]["low"] <= classes["a"]["auc"]


def test_images_after_the_last_window_are_told(run, write, reference, tmp_path):
    flags = ["--reference", reference, "--embeddings", write("tail", vectors(90, 1)[0]), "--json"]
    flags += ["--output", tmp_path / "report", "--window"]
    _, text, err = run("monitor", "check", *flags, 40)
    assert json.loads(text)["notes"] == ["the last 10 images are too few for a window; not tested"]
    assert "the last 10 images" in err
    assert json.loads(run("monitor", "check", *flags, 30)[1])["notes"] == []


def test_labels_without_scores_of_them_are_no_reference(run, known, table, tmp_path):
    flags = ["--embeddings", known, "--labels", table, "--label", "grade"]
    code, _, err = run("monitor", "fit", *flags, "--output", tmp_path / "r.npz")
    assert code == 2 and "has no scores of them" in err and not (tmp_path / "r.npz").exists()


def test_rows_of_one_image_must_agree(run, known, table, tmp_path):
    from embeddings.embedding_runs import read_csv, write_table

    rows = read_csv(table)
    columns = {name: [row[name] for row in (*rows, rows[0])] for name in ("id", "scanner")}
    flags = ["monitor", "fit", "--embeddings", known, "--by", "scanner", "--output"]
    path = write_table(tmp_path / "t.csv", **columns)
    assert run(*flags, tmp_path / "r.npz", "--metadata", path)[0] == 0
    columns["scanner"][-1] = "another"
    path = write_table(tmp_path / "t.csv", **columns)
    code, _, err = run(*flags, tmp_path / "s.npz", "--metadata", path)
    assert code == 2 and "rows of id 'known0' differ in scanner" in err


def test_a_value_that_the_reference_has_never_seen_alarms(run, write, known, table, tmp_path):
    from embeddings.embedding_runs import read_csv, write_table

    path, flags = tmp_path / "r.npz", ["--by", "scanner"]
    run("monitor", "fit", "--embeddings", known, "--metadata", table, *flags, "--output", path)
    rows = read_csv(table)
    for row in rows:
        other = row["id"].startswith("usual") and int(row["id"][5:]) % 6 == 0
        row["scanner"] = "unseen" if other else row["scanner"]
    changed = write_table(
        tmp_path / "t.csv", id=[r["id"] for r in rows], scanner=[r["scanner"] for r in rows]
    )
    usual = write("usual", vectors(90, 1)[0])
    flags = ["--reference", path, "--embeddings", usual, "--output", tmp_path / "report", "--json"]
    code, text, _ = run("monitor", "check", *flags, "--metadata", changed)
    assert code == 4 and json.loads(text)["strata"]["all"]["metadata:scanner"]["alarm"]
    assert run("monitor", "check", *flags, "--metadata", table)[0] == 0
    code, _, err = run("monitor", "check", *flags)
    assert code == 2 and "scanner need a table" in err


def test_many_unreadable_files_alarm(run, write, known, tmp_path):
    path = tmp_path / "r.npz"
    run("monitor", "fit", "--embeddings", known, "--output", path)
    flags = ["--reference", path, "--output", tmp_path / "report", "--json", "--embeddings"]
    for errors, code in ((1, 0), (12, 4)):
        broken = write(f"broken{errors}", vectors(90, 1)[0], errors=errors)
        found, text, _ = run("monitor", "check", *flags, broken)
        assert found == code
        assert json.loads(text)["strata"]["all"]["unreadable"]["alarm"] == (code == 4)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"model": {"source": "other", "sha256": "bad"}}, "sha256 of the model is 'bad'"),
        ({"preprocess": "serving"}, "preprocess is 'serving', wanted 'big_vision'"),
        ({"dicom": {"ct_window": [350, 40]}}, "dicom is"),
        ({"normalized": False}, "normalized is False"),
    ],
)
def test_other_weights_pixels_and_rules_are_refused_in_one_line(
    run, write, known, tmp_path, facts, message
):
    path = tmp_path / "r.npz"
    old = write("plain", vectors(60, 0)[0], dicom={})
    assert run("monitor", "fit", "--embeddings", old, "--output", path)[0] == 0
    other = write(f"other{len(message)}", vectors(60, 1)[0], **{"dicom": {}, **facts})
    flags = ["--reference", path, "--embeddings", other, "--output", tmp_path / "report"]
    code, _, err = run("monitor", "check", *flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_what_is_too_small_is_refused_in_one_line(run, write, reference, tmp_path):
    flags = ["--reference", reference, "--output", tmp_path / "report", "--embeddings"]
    code, _, err = run("monitor", "check", *flags, write("large", vectors(121, 1)[0]))
    assert code == 2 and "at most half as many" in err and "--window 120" in err
    code, _, err = run("monitor", "check", *flags, write("few", vectors(19, 1)[0]))
    assert code == 2 and "at least 20" in err
    small = write("small", vectors(39, 1)[0])
    code, _, err = run("monitor", "fit", "--embeddings", small, "--output", tmp_path / "s.npz")
    assert code == 2 and "too small; expected at least 40 images" in err
    assert err.count("\n") == 1


def test_an_evaluation_can_be_the_reference(run, write, tmp_path):
    from embeddings.embedding_runs import write_run

    facts = {"model": {"source": "m", "sha256": "5a1"}, "normalized": True, "dim": 8}
    for name in ("big_vision", "big_vision-train"):
        write_run(tmp_path / "e" / "embeddings" / name, [vectors(60, 0)[0]], facts=facts)
    path = tmp_path / "r.npz"
    assert run("monitor", "fit", "--embeddings", tmp_path / "e", "--output", path)[0] == 0
    write_run(tmp_path / "e" / "embeddings" / "serving", [vectors(60, 0)[0]], facts=facts)
    code, _, err = run("monitor", "fit", "--embeddings", tmp_path / "e", "--output", path)
    assert code == 2 and "name one of" in err and "serving" in err


def test_a_reference_is_read_as_it_was_written(known, probe, table, tmp_path):
    from medsiglip_jax.embeddings.probe import linear

    columns = images.Columns(("scanner",), ("grade",), "who")
    given = images.Given(table, columns, table, ("grade",), ("a", "b", "c"))
    made = reference.fit(images.open_run(known), given, probe=linear.open_probe(probe))
    made.save(tmp_path / "a.npz")
    again = reference.open_reference(tmp_path / "a.npz")
    again.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    names = re.findall(rb"known\d+|kno\d+", (tmp_path / "a.npz").read_bytes())
    assert not names  # neither ids nor patients


def test_windows_in_control_rarely_alarm_and_others_mostly_do():
    """60 windows of 100 new images each; scripts/monitor_power.py does it with a model's own."""

    def alarms(x):
        compared = check.Comparison(made, images.from_arrays(x), 0.05, 0)
        cut = windows.cut(len(x), 100, [])
        return [compared.verdict(w, compared.measure(w))["alarm"] for w in cut]

    made = reference.build(images.from_arrays(vectors(500, 0)[0]), Provenance(8))
    assert sum(alarms(vectors(6000, 1)[0])) <= 9  # more than 9 of 60 at 5 % have p 0.001
    assert sum(alarms(vectors(1000, 2, scale=1.25)[0])) >= 8
    x, labels = vectors(4000, 3)
    mixed = np.random.default_rng(0).permutation(np.flatnonzero((labels == 0) | (x[:, 7] > 0.4)))
    assert sum(alarms(x[mixed[:1000]])) >= 8  # twice as many of one class


def test_windows_in_control_are_kept_for_a_few_windows_only(write, monkeypatch):
    """They take megabytes for each window and stratum, and there may be thousands of windows."""
    import weakref

    alive, most = weakref.WeakSet(), []
    judge = check.judge

    def counting(measured, level):
        for one in measured.values():
            alive.add(one)
        most.append(len(alive))
        return judge(measured, level)

    monkeypatch.setattr(check, "judge", counting)
    sizes = iter(range(20, 32))
    monkeypatch.setattr(check, "cut", lambda count, *_: [
        windows.Window(f"w{n}", np.arange(n)) for n in sizes
    ])  # fmt: skip
    kept = []
    measure = check.Comparison.measure
    monkeypatch.setattr(check.Comparison, "measure", lambda self, window: (
        kept.append(self), measure(self, window))[1])  # fmt: skip
    made = reference.fit(images.open_run(write("few", vectors(80, 0)[0])))
    found = check.check(made, images.open_run(write("many", vectors(40, 5)[0])), size=20)
    assert len(found["windows"]) == 13 and max(most) <= 2 * most[1]
    ((_, _, control),) = kept[0]._strata.values()
    assert len(control._nulls) <= 4


@pytest.mark.parametrize("seed", range(4))
def test_a_patient_of_more_images_than_are_wanted_leaves_room_for_others(seed):
    """Whole patients are drawn, so that one of 60 images has no place among 50."""
    groups = np.array([0] * 60 + [1] * 20 + [2] * 20 + [3] * 20 + [4] * 7 + [5] * 3)
    rows = images._drawn(groups, 50, seed)
    kept, sizes = np.unique(groups[rows], return_counts=True)
    assert 0 not in kept and len(rows) == 50
    assert all(size == (groups == patient).sum() for patient, size in zip(kept, sizes, strict=True))


def test_texts_without_a_model_are_refused(known):
    with pytest.raises(ValueError, match="1 texts are given without the model that embeds them"):
        reference.fit(images.open_run(known), texts=["a scan"])


def test_patients_are_drawn_whole_so_that_copies_do_not_alarm():
    """Ten images of each patient, all alike: a window has as few patients as it looks."""
    rng = np.random.default_rng(0)

    def clustered(patients):
        centres = rng.normal(size=(patients, 8))
        x = np.repeat(centres, 10, axis=0) + 0.05 * rng.normal(size=(10 * patients, 8))
        return x.astype(np.float32), np.repeat(np.arange(patients), 10)

    known, patients = clustered(60)
    alarms = {}
    for by_patient in (True, False):
        groups = patients if by_patient else None
        made = reference.build(images.from_arrays(known, groups), Provenance(8))
        found = 0
        for seed in range(10):
            rng = np.random.default_rng((seed, 1))
            x, whose = clustered(6)
            new = images.from_arrays(x, whose if by_patient else None)
            compared = check.Comparison(made, new, 0.05, 0)
            window = windows.Window("w", np.arange(60))
            found += compared.verdict(window, compared.measure(window))["alarm"]
        alarms[by_patient] = found
    assert alarms[True] <= 2 < 8 <= alarms[False]


def test_probe_and_prompts_disagree_where_their_likeliest_labels_differ(probe):
    from medsiglip_jax.embeddings.probe import linear
    from medsiglip_jax.trust.monitor import scores

    fitted, x = linear.open_probe(probe), vectors(80, 0)[0]
    prompts = reference.Prompts(("a", "b", "c"), np.eye(3, 8, dtype=np.float32), 1.0, -2.0)
    known = images.from_arrays(x)
    made = reference.build(known, fitted.provenance, prompts=prompts, probe=fitted)
    found = scores.of_images(made, known)
    cosines = x[:, :3] / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(found.scores["zero_shot"], np.exp(1) * cosines - 2, atol=1e-5)
    np.testing.assert_allclose(found.scores["probe"], fitted.predict(x))
    differ = cosines.argmax(axis=1) != fitted.predict(x).argmax(axis=1)
    assert found.categories["disagreement"].tolist() == differ.astype(int).tolist()
    assert 0 < differ.sum() < 40
    fewer = reference.Prompts(("a", "b"), np.eye(2, 8, dtype=np.float32), 1.0, -2.0)
    made = reference.build(known, fitted.provenance, prompts=fewer, probe=fitted)
    assert "disagreement" not in scores.of_images(made, known).categories


def test_a_window_with_labels_of_a_half_is_held_to_windows_of_as_many_labels():
    from medsiglip_jax.trust.monitor.control import Control
    from medsiglip_jax.trust.monitor.scores import Scored

    def scored(n, seed):
        rng = np.random.default_rng(seed)
        shares = rng.random((n, 1))
        return Scored({}, {}, {}, (rng.random((n, 1)) < shares).astype(float), shares, True)

    known = reference.build(images.from_arrays(vectors(200, 0)[0]), Provenance(8))
    control = Control(known, scored(200, 1), np.arange(200), 0)
    x, new = vectors(60, 1)[0], scored(60, 2)
    every = control.measure(x, new, np.arange(60), 99)
    assert new.labels is not None
    new.labels[::2] = np.nan
    half = control.measure(x, new, np.arange(60), 99)
    alone = control.measure(x[1::2], new.take(np.arange(1, 60, 2)), np.arange(30), 99)
    for name in ("auc", "calibration"):
        assert half[name].statistic == alone[name].statistic != every[name].statistic
        assert np.array_equal(half[name].null, alone[name].null)
    new.labels[:30] = np.nan  # 15 labels say nothing
    assert "auc" not in control.measure(x, new, np.arange(60), 99)
