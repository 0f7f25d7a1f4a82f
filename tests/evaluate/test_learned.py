"""What is learned from labels: probes, thresholds, calibration; on what, from what, and again."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from medsiglip_jax import cli, metrics
from medsiglip_jax.data import inputs
from medsiglip_jax.data.labels import Policy
from medsiglip_jax.embeddings.probe import learning, linear
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.evaluate import learned, retrieval, run, scores, tasks
from medsiglip_jax.evaluate.data import reading
from medsiglip_jax.evaluate.options import Draws, EvaluateOptions
from medsiglip_jax.evaluate.recompute import recompute
from medsiglip_jax.evaluate.results import comparison, held_out
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.inference import embed

CLASSES = ["Alpha", "Beta", "Never"]
TASK = """
title = "Findings"
kind = "multi_label"
score = "pos_minus_neg"
[data]
adapter = "csv"
group = "patient"
attributes = { sex = "sex" }
where = { split = ["test"] }
[[data.tables]]
file = ["labels.csv"]
[data.images]
path = ["{image}"]
[parts.train]
where = { split = ["train"] }
[parts.validation]
where = { split = ["validation"] }
[[classes]]
name = "Alpha"
present = ["photo of a a"]
absent = ["scan of a a"]
[[classes]]
name = "Beta"
present = ["scan of a b"]
absent = ["drawing of a c"]
[[classes]]
name = "Never"
present = ["photo of a f"]
absent = ["scan of a e"]
[published]
where = "a paper"
probe_mean = 0.6
[published.probe_auc]
Alpha = 0.5
"""
DRAWN = "\n".join(
    line for line in TASK.splitlines() if "where = {" not in line and "[parts" not in line
)
EXCLUSIVE = (
    TASK.split("[[classes]]")[0].replace("multi_label", "multi_class")
    .replace("pos_minus_neg", "class_softmax")
    + "".join(
        f'[[classes]]\nname = "{name}"\npresent = ["photo of a {name[0]}"]\n' for name in "abc"
    )
    + '[data.labels]\ncolumn = "grade"\n'
)  # fmt: skip
PAIRS = """
title = "Captions"
kind = "pairs"
[data]
adapter = "csv"
group = "patient"
text = "caption"
[[data.tables]]
file = ["labels.csv"]
[data.images]
path = ["{image}"]
"""
OPTIONS = EvaluateOptions(resamples=60, learn="probe", draws=Draws((16,), 2), prevalence=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """140 images of 70 patients, which are darker the more there is to find, in three parts."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines = ["image,patient,sex,split,caption,grade," + ",".join(CLASSES)]
    for i in range(140):
        patient = i % 70
        alpha, beta = int(rng.random() < 0.4), int(rng.random() < 0.4)
        split = ("train", "train", "validation", "test")[patient % 4]
        level = 200 - 80 * alpha * (rng.random() < 0.8) - 40 * beta * (rng.random() < 0.8)
        pixels = np.clip(level + rng.normal(0, 30, (14, 14, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        gap = "" if i == 3 else beta  # a test image
        caption = f"scan of a {'abcdef'[i % 6]}"
        cells = (f"{i}.png", f"p{patient}", "FM"[i % 2], split, caption, "abc"[alpha + beta])
        lines.append(",".join(map(str, (*cells, alpha, gap, 0))))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    for name, text in (
        ("task", TASK),
        ("drawn", DRAWN),
        ("exclusive", EXCLUSIVE),
        ("pairs", PAIRS),
    ):
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def evaluate(data, model):
    def evaluate(name, output, options=OPTIONS, **how):
        return run.evaluate(
            tasks.read(str(data / f"{name}.toml")), model, data, output, options, **how
        )

    return evaluate


@pytest.fixture(scope="module")
def done(evaluate, tmp_path_factory):
    """A finished run with parts of its own, and what it returned."""
    folder = tmp_path_factory.mktemp("done") / "out"
    return folder, evaluate("task", folder)


def columns(folder, name):
    """Scores and labels [n, c] of a file, by pyarrow alone."""
    table = pq.read_table(folder / name).to_pydict()
    labels = [np.nan if x is None else x for x in table["label"]]
    count = len(dict.fromkeys(table["class"]))
    return (np.array(table["score"]).reshape(-1, count), np.array(labels, float).reshape(-1, count))


def files(folder):
    names = ("results.json", "report.md", "report.html", "probe.npz", "scores.parquet")
    return {name: (folder / name).read_bytes() for name in names}


def by(rows, **wanted):
    return next(row for row in rows if all(row[k] == v for k, v in wanted.items()))


# ------------------------------------------------------------------------------------- the probe


def test_the_probe_is_that_of_scikit_learn(done):
    folder, got = done
    parts = {
        name: dict(zip([r["id"] for r in e.ids(range(len(e)))], e.gather(np.arange(len(e))),
                       strict=True))
        for name, e in (
            (n, Embeddings(folder / f"embeddings/big_vision{n}"))
            for n in ("", "-train", "-validation")
        )
    }  # fmt: skip
    table = {line.split(",")[0]: line.split(",") for line in _lines(done[0])}
    x = np.stack(list(parts["-train"].values())).astype(np.float64)
    y = np.array([int(table[name][6]) for name in parts["-train"]])
    scaling = StandardScaler().fit(x)
    fitted = LogisticRegression(C=got["probe"]["strengths"]["Alpha"], max_iter=9999, tol=1e-8)
    fitted.fit(scaling.transform(x), y)
    values, labels = columns(folder, "probe.parquet")
    test = np.stack(list(parts[""].values())).astype(np.float64)
    want = fitted.predict_proba(scaling.transform(test))[:, 1]
    np.testing.assert_allclose(values[:, 0], want, atol=2e-3)
    assert np.isnan(values[:, 2]).all() and len(values) == 34
    saved = linear.open_probe(folder / "probe.npz")
    np.testing.assert_array_equal(saved.predict(test.astype(np.float32))[:, :2], values[:, :2])
    assert saved.provenance.preprocess == "big_vision" and saved.classes == tuple(CLASSES)
    assert linear.open_probe(folder / "probe.npz").facts["rows"] == len(x) == 72


def _lines(folder):
    """labels.csv, whose address the run's own record has."""
    source = pq.read_table(next((folder / "embeddings/big_vision").glob("*.parquet")))["source"]
    path = source[0].as_py().rsplit("/", 1)[0]
    with open(f"{path}/labels.csv") as file:
        return file.read().splitlines()[1:]


def test_numbers_of_the_probe_are_those_of_its_files(done):
    folder, got = done
    found = got["probe"]
    (values, labels), (prompts, _) = (
        columns(folder, f"{name}.parquet") for name in ("probe", "scores")
    )
    means = []
    for j, name in enumerate(CLASSES[:2]):
        rows = ~np.isnan(labels[:, j])
        want = roc_auc_score(labels[rows, j], values[rows, j])
        one = by(found["classes"], **{"class": name})
        assert one["auc"] == pytest.approx(want, abs=1e-12)
        apart = want - roc_auc_score(labels[rows, j], prompts[rows, j])
        assert one["minus_zero_shot"]["value"] == pytest.approx(apart, abs=1e-12)
        means.append((want, want - apart))
    assert by(found["classes"], **{"class": "Alpha"})["auc"] > 0.7  # it learned something
    probe_mean, zero_shot = np.mean(means, axis=0)
    assert found["macro_auc"]["auc"] == pytest.approx(probe_mean)
    assert found["macro_auc"]["published"] == 0.6
    assert by(found["classes"], **{"class": "Alpha"})["published"] == 0.5
    assert found["zero_shot_macro"]["auc"] == pytest.approx(zero_shot)
    assert found["difference"]["value"] == pytest.approx(probe_mean - zero_shot)
    assert found["undefined"] == ["Never"]
    never = by(found["classes"], **{"class": "Never"})
    assert never["auc"] is never["p"] is never["p_holm"] is None
    p = [one["p"] for one in found["classes"][:2]]
    assert sorted(one["p_holm"] for one in found["classes"][:2]) == pytest.approx(
        sorted([min(1, 2 * min(p)), max(min(1, 2 * min(p)), max(p))])
    )
    assert found["images"] == {"train": 72, "validation": 34, "test": 34}


def test_neighbours_are_counted(done):
    folder, got = done
    values, labels = columns(folder, "knn.parquet")
    np.testing.assert_allclose(values * 20, np.round(values * 20), atol=1e-9)
    rows = ~np.isnan(labels[:, 1])
    aucs = [roc_auc_score(labels[r, j], values[r, j]) for j, r in ((0, ...), (1, rows))]
    assert got["probe"]["knn"]["macro_auc"]["auc"] == pytest.approx(np.mean(aucs))


def test_curves_end_at_the_probe(done):
    _, got = done
    found = got["probe"]
    curve = found["learning_curve"]
    assert [(r["n"], r["seed"]) for r in curve] == [(16, 0), (16, 1), (72, 0)]
    assert curve[-1]["auc"] == pytest.approx(found["macro_auc"]["auc"])
    assert all("Never" in row["undefined"] for row in curve)
    shots = [(r["shots"], r["seed"]) for r in found["few_shot"]]
    assert shots == [(n, s) for n in learning.SHOTS for s in (0, 1)]


# ----------------------------------------------------------------- thresholds and calibration


def test_operating_points_by_hand(done):
    folder, got = done
    for key, (chosen, judged) in {
        "zero_shot": ("validation", "scores"), "probe": ("probe-validation", "probe"),
    }.items():  # fmt: skip
        (x, y), (values, labels) = (columns(folder, f"{n}.parquet") for n in (chosen, judged))
        patients = scores.read(folder / f"{judged}.parquet").groups
        found = got["held_out"][key]
        assert found["undefined"] == ["Never"] and len(found["operating_points"]) == 2 * 5
        for point in found["operating_points"]:
            j = CLASSES.index(point["class"])
            threshold = point["threshold"]
            on_validation = metrics.operating_point(x[:, j], y[:, j], threshold)
            if point["rule"] != "youden":
                assert getattr(on_validation, point["rule"]).value >= point["at_least"]
            called, positive = values[:, j] >= threshold, labels[:, j] == 1
            negative = labels[:, j] == 0
            for name, hits, of in (
                ("sensitivity", called, positive), ("specificity", ~called, negative),
                ("ppv", positive, called & (positive | negative)),
            ):  # fmt: skip
                if of.sum():
                    want = metrics.proportion(hits[of], np.array(patients)[of])
                    assert point[name]["value"] == pytest.approx(want.value)
                    limits = [point[name]["low"], point[name]["high"]]
                    assert limits == pytest.approx([want.low, want.high])
            assert (point["positives"], point["negatives"]) == (positive.sum(), negative.sum())
            sens, spec = point["sensitivity"]["value"], point["specificity"]["value"]
            if sens + 1 - spec > 0:
                ppv = 0.1 * sens / (0.1 * sens + 0.9 * (1 - spec))
                assert point["stated"]["ppv"] == pytest.approx(ppv)
    assert got["held_out"]["validation"] == {"images": 34, "groups": 17}
    text = (folder / "report.md").read_text()
    assert "PPV at 0.1" in text and "Without thresholds" in text


@pytest.mark.parametrize("exclusive", [False, True])
def test_nothing_is_chosen_on_test_images(exclusive):
    rng = np.random.default_rng(0)

    def draw(n):
        labels = np.eye(3)[rng.integers(3, size=n)]
        values = rng.dirichlet(np.ones(3), n) + labels
        return Scores(list(map(str, range(n))), list("abc"),
                      values / values.sum(1, keepdims=True), labels, None, {})  # fmt: skip

    validation, test = draw(80), draw(50)
    shuffled = Scores(test.ids, test.classes, test.scores[::-1], test.labels, None, {})
    found, other = (
        held_out.judge(validation, x, "class_softmax", exclusive) for x in (test, shuffled)
    )
    for name in ("threshold", "parameters"):
        rows = [
            [row[name] for part in x.values() for row in part if name in row]
            for x in (found, other)
        ]
        assert rows[0] == rows[1] and rows[0]
    assert found["operating_points"] != other["operating_points"]
    changed = held_out.judge(test, validation, "class_softmax", exclusive)
    assert changed["calibration"][0]["parameters"] != found["calibration"][0]["parameters"]
    for one in found["calibration"]:
        assert one["after"]["ece"] < one["before"]["ece"]  # they were too even


def test_platt_is_that_of_the_files(done):
    folder, got = done
    (x, y), (values, labels) = (
        columns(folder, f"{name}.parquet") for name in ("validation", "scores")
    )
    calibration = got["held_out"]["zero_shot"]["calibration"]
    assert [found["of"] for found in calibration] == CLASSES[:2]
    for j, found in enumerate(calibration):
        assert found["before"] is None  # differences of cosines
        known = ~np.isnan(labels[:, j])
        p = metrics.fit_platt(x[:, j], y[:, j])(values[known, j])
        truth = labels[known, j]
        after = found["after"]
        assert after["brier"] == pytest.approx(brier_score_loss(truth, p))
        for name, equal in (("ece", "width"), ("ece_mass", "mass")):
            want = metrics.expected_calibration_error(p, truth, equal=equal)
            assert after[name] == pytest.approx(want)
        assert sum(after["curve"]["rows"]) == len(p)
    (_, labels), (values, _) = (columns(folder, f"{n}.parquet") for n in ("scores", "probe"))
    before = got["held_out"]["probe"]["calibration"][0]["before"]
    assert before["brier"] == pytest.approx(brier_score_loss(labels[:, 0], values[:, 0]))


def test_one_class_an_image_has_one_temperature(evaluate, tmp_path):
    got = evaluate("exclusive", tmp_path)
    values, labels = columns(tmp_path, "scores.parquet")
    x, y = columns(tmp_path, "validation.parquet")
    (found,) = got["held_out"]["zero_shot"]["calibration"]
    fitted = metrics.fit_temperature(np.log(x), y.argmax(1))
    assert found["parameters"]["temperature"] == pytest.approx(fitted.value)
    assert found["of"] == "top label"
    p = fitted(np.log(values))
    for side, q in (("before", values), ("after", p)):
        right = q.argmax(1) == labels.argmax(1)
        want = metrics.expected_calibration_error(q.max(1), right)
        assert found[side]["ece"] == pytest.approx(want)
        assert found[side]["brier"] == pytest.approx(((q - labels) ** 2).sum(1).mean())
    found = got["probe"]
    values, _ = columns(tmp_path, "probe.parquet")
    np.testing.assert_allclose(values.sum(1), 1)
    assert found["macro_auc"]["auc"] == pytest.approx(
        roc_auc_score(labels.argmax(1), values, multi_class="ovr")
    )
    assert len(set(found["strengths"].values())) == 1


def test_a_class_that_no_training_image_is_of(data, model, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    lines = [line.split(",") for line in (own / "labels.csv").read_text().splitlines()]
    for cells in lines[1:]:
        cells[5] = "a" if cells[3] == "train" and cells[5] == "c" else cells[5]
    (own / "labels.csv").write_text("\n".join(map(",".join, lines)))
    task = tasks.read(str(own / "exclusive.toml"))
    got = run.evaluate(task, model, own, tmp_path / "out", OPTIONS)
    found = got["probe"]
    assert found["undefined"] == got["held_out"]["probe"]["undefined"] == ["c"]
    assert found["learning_curve"][-1]["auc"] == pytest.approx(found["macro_auc"]["auc"])
    assert found["learning_curve"][-1]["undefined"] == ["c"]
    values, labels = columns(tmp_path / "out", "probe.parquet")
    assert np.isnan(values[:, 2]).all() and labels[:, 2].any()
    (one,) = got["held_out"]["probe"]["calibration"]
    p = np.nan_to_num(values)
    np.testing.assert_allclose(p.sum(1), 1)
    assert one["before"]["brier"] == pytest.approx(((p - labels) ** 2).sum(1).mean())


# ----------------------------------------------------------------------------------- the parts


def test_drawn_parts_share_no_patient_and_prompts_are_judged_on_all(evaluate, tmp_path):
    got = evaluate("drawn", tmp_path / "a")
    plain = evaluate("drawn", tmp_path / "b", EvaluateOptions(resamples=60))
    assert got["macro_auc"] == plain["macro_auc"] and got["classes"] == plain["classes"]
    assert plain["probe"] is plain["held_out"] is None and got["images"] == 140
    table = pq.read_table(tmp_path / "a/images.parquet").to_pydict()
    groups = pq.read_table(tmp_path / "a/scores.parquet").to_pydict()["group"][::3]
    of = {part: {g for g, p in zip(groups, table["part"], strict=True) if p == part}
          for part in ("train", "validation", "test")}  # fmt: skip
    assert sum(map(len, of.values())) == 70 == len(set.union(*of.values()))
    counts = {part: table["part"].count(part) for part in of}
    assert got["probe"]["images"] == counts and sum(counts.values()) == 140
    assert got["held_out"]["test"] == {"images": counts["test"], "groups": len(of["test"])}
    rows = np.array(table["part"]) == "test"
    values, labels = (x[rows] for x in columns(tmp_path / "a", "scores.parquet"))
    known = ~np.isnan(labels[:, 1])
    want = [roc_auc_score(labels[r, j], values[r, j]) for j, r in ((0, ...), (1, known))]
    assert got["probe"]["zero_shot_macro"]["auc"] == pytest.approx(np.mean(want))
    assert "drawn by patient" in got["held_out"]["how"]
    whole, chosen = (
        pq.read_table(tmp_path / "a" / f"{name}.parquet").to_pydict()
        for name in ("scores", "validation")
    )
    of_image = dict(zip(zip(whole["id"], whole["class"], strict=True), whole["score"], strict=True))
    keys = list(zip(chosen["id"], chosen["class"], strict=True))
    assert chosen["score"] == [of_image[key] for key in keys]
    assert len(keys) == 3 * counts["validation"]
    assert not (tmp_path / "a/embeddings/big_vision-train").exists()
    assert {g["attribute"] for g in got["subgroups"]} == {"sex"}
    assert recompute(tmp_path / "a") == got


def test_thresholds_need_no_training_images(evaluate, done, tmp_path):
    shutil.copytree(done[0], tmp_path / "out")
    options = EvaluateOptions(resamples=60, learn="thresholds", prevalence=0.1)
    got = evaluate("task", tmp_path / "out", options)
    assert got["probe"] is None and got["held_out"]["probe"] is None
    assert got["held_out"]["zero_shot"] == done[1]["held_out"]["zero_shot"]
    assert "Linear probe" not in (tmp_path / "out/report.md").read_text()
    fresh = evaluate("task", tmp_path / "fresh", options)
    assert fresh == got and not (tmp_path / "fresh/embeddings/big_vision-train").exists()


def test_all_parts_are_looked_up_in_given_embeddings(data, model, evaluate, done, tmp_path):
    embed.embed(model, inputs.rows([data]), tmp_path / "embedded")
    got = evaluate("task", tmp_path / "out", embeddings=tmp_path / "embedded")
    assert got["probe"]["macro_auc"]["auc"] == pytest.approx(
        done[1]["probe"]["macro_auc"]["auc"], abs=0.02
    )
    assert not (tmp_path / "out/embeddings").exists()


# ---------------------------------------------------------------------------------- once more


def test_recomputed_without_model_and_embeddings_it_is_the_same(done, tmp_path, capsys):
    shutil.copytree(done[0], tmp_path / "out", ignore=shutil.ignore_patterns("embeddings"))
    for name in ("results.json", "report.md", "report.html"):
        (tmp_path / "out" / name).unlink()
    assert cli.main(["evaluate", "--from", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == done[1]
    assert files(tmp_path / "out") == files(done[0])


def test_a_killed_run_goes_on_and_a_finished_one_fits_nothing(
    evaluate, done, tmp_path, monkeypatch
):
    fits, fit = [], linear.fit
    monkeypatch.setattr(linear, "fit", lambda *a, **k: fits.append(len(a[0])) or fit(*a, **k))
    monkeypatch.setattr(learned, "_SAVE_SECONDS", 0.0)
    calls = []

    def kill():
        calls.append(None)
        if len(calls) == 3:  # the probe, the neighbours, one row
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate("task", tmp_path, on_fit=kill)
    assert fits == [72, 16] and not (tmp_path / "results.json").exists()
    evaluate("task", tmp_path)
    assert fits == [72, 16, 16]
    assert files(tmp_path) == files(done[0])
    assert (tmp_path / "learning.json").read_bytes() == (done[0] / "learning.json").read_bytes()
    evaluate("task", tmp_path)
    assert len(fits) == 3
    more = EvaluateOptions(resamples=60, learn="probe", draws=Draws((16, 32), 2), prevalence=0.1)
    got = evaluate("task", tmp_path, more)
    assert fits[3:] == [32, 32] and len(got["probe"]["learning_curve"]) == 5


def test_other_labels_are_fitted_again(data, model, done, tmp_path):
    own, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, own)
    first = run.evaluate(tasks.read(str(own / "task.toml")), model, own, out, OPTIONS)
    assert first["probe"] == done[1]["probe"]
    lines = (own / "labels.csv").read_text().splitlines()
    flipped = [x.rsplit(",", 3) for x in lines]
    for row in flipped[1:]:
        row[1] = str(1 - int(row[1])) if ",train," in row[0] else row[1]
    (own / "labels.csv").write_text("\n".join(",".join(row) for row in flipped))
    got = run.evaluate(tasks.read(str(own / "task.toml")), model, own, out, OPTIONS)
    aucs = [by(x["probe"]["classes"], **{"class": "Alpha"})["auc"] for x in (first, got)]
    assert aucs[0] > 0.7 > 0.5 > aucs[1]
    assert got["probe"]["learning_curve"][0] != first["probe"]["learning_curve"][0]


def with_training_cells(data, own, column, value):
    """A copy of the data in which all training images have the same in a column."""
    shutil.copytree(data, own)
    lines = [line.split(",") for line in (own / "labels.csv").read_text().splitlines()]
    for cells in lines[1:]:
        cells[column] = value if cells[3] == "train" else cells[column]
    (own / "labels.csv").write_text("\n".join(map(",".join, lines)))
    return own


def test_a_class_that_training_lacks_is_in_neither_mean(data, model, tmp_path):
    own = with_training_cells(data, tmp_path / "data", 7, "0")
    got = run.evaluate(tasks.read(str(own / "task.toml")), model, own, tmp_path / "out", OPTIONS)
    found, zero_shot = got["probe"], {c["class"]: c["auc"] for c in got["classes"]}
    assert found["undefined"] == ["Beta", "Never"] and zero_shot["Beta"] is not None
    assert found["zero_shot_macro"]["auc"] == pytest.approx(zero_shot["Alpha"])
    assert found["macro_auc"]["auc"] == by(found["classes"], **{"class": "Alpha"})["auc"]
    assert got["held_out"]["zero_shot"]["undefined"] == ["Never"]
    assert got["held_out"]["probe"]["undefined"] == ["Beta", "Never"]


def test_files_of_another_run_are_refused(done, evaluate, tmp_path):
    shutil.copytree(done[0], tmp_path / "out")
    found = scores.read(tmp_path / "out/validation.parquet")
    scores.write(
        tmp_path / "out/validation.parquet",
        Scores(found.ids, found.classes, found.scores, found.labels, found.groups,
               {**found.meta, "run": "another"}),
    )  # fmt: skip
    with pytest.raises(ValueError, match="validation.parquet and scores.parquet are of different"):
        recompute(tmp_path / "out")
    (tmp_path / "out/knn.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="knn.parquet: no such file"):
        recompute(tmp_path / "out")


@pytest.mark.slow
def test_a_probe_of_another_kind_is_not_reused(data, evaluate, tmp_path):
    """Same images, classes and labels: findings first, then one class an image."""
    text = EXCLUSIVE.replace("class_softmax", "cosine")
    (data / "both.toml").write_text(text.replace("multi_class", "multi_label"))
    evaluate("both", tmp_path)
    values, _ = columns(tmp_path, "probe.parquet")
    assert abs(values.sum(1) - 1).max() > 1e-3
    (data / "both.toml").write_text(text)
    got = evaluate("both", tmp_path)
    values, _ = columns(tmp_path, "probe.parquet")
    np.testing.assert_allclose(values.sum(1), 1)
    fresh = evaluate("both", tmp_path / "fresh")
    assert got["probe"]["learning_curve"] == fresh["probe"]["learning_curve"]


@pytest.mark.slow
def test_other_draws_and_policies_find_all_embedded(data, model, tmp_path):
    """Validation images are drawn from those of training, and some images have no label at all."""
    own = tmp_path / "data"
    shutil.copytree(data, own)
    lines = [line.split(",") for line in (own / "labels.csv").read_text().splitlines()]
    for cells in (lines[4], lines[5]):  # of test and of training
        cells[6:] = ["", "", ""]
    (own / "labels.csv").write_text("\n".join(map(",".join, lines)))
    text = TASK.replace(
        'where = { split = ["train"] }', 'where = { split = ["train", "validation"] }'
    )
    (own / "task.toml").write_text(
        text.replace('[parts.validation]\nwhere = { split = ["validation"] }', "")
    )
    task, out, totals, embedded = tasks.read(str(own / "task.toml")), tmp_path / "out", [], []

    def evaluate(**changes):
        embedded.clear()
        return run.evaluate(
            task, model, own, out, replace(OPTIONS, **changes), on_total=totals.append,
            on_progress=lambda p: embedded.append(p.rows) if p.busy is not None else None,
        )  # fmt: skip

    first = evaluate()
    assert totals == [140] == [sum(embedded)]
    assert "drawn by patient from train, seed 0" in first["held_out"]["how"]
    assert first["counts"]["unlabelled"] == first["counts"]["unlabelled (train)"] == 1
    other = evaluate(seed=1)
    assert not embedded and other["held_out"]["how"].endswith("seed 1")
    digests = [got["provenance"]["parts_sha256"] for got in (first, other)]
    assert digests[0]["test"] == digests[1]["test"] == first["provenance"]["labels_sha256"]
    assert digests[0]["train"] != digests[1]["train"]
    negative = evaluate(policy=Policy(blank="negative"))
    assert not embedded and negative["images"] == first["images"] + 1
    assert sum(negative["probe"]["images"].values()) == 140
    assert sum(first["probe"]["images"].values()) == 138
    assert not (out / "embeddings/big_vision-validation").exists()


def test_what_labels_mean_may_differ_by_part(evaluate, data, tmp_path):
    """The test keeps its images; results.json says which policy each part had."""
    policies = {"train": Policy("positive", "negative")}
    got = evaluate("task", tmp_path / "one", replace(OPTIONS, part_policies=policies))
    said = got["provenance"]
    assert (said["uncertain"], said["blank"]) == ("ignore", "ignore")
    assert said["labels_of_parts"] == {
        "train": {"uncertain": "positive", "blank": "negative"},
        "validation": {"uncertain": "ignore", "blank": "ignore"},
    }


def test_data_are_read_once(evaluate, tmp_path, monkeypatch):
    reads, reader = [], reading.ADAPTERS["csv"]
    monkeypatch.setitem(
        reading.ADAPTERS, "csv", lambda task, *rest: reads.append(task.title) or reader(task, *rest)
    )
    evaluate("drawn", tmp_path)
    assert reads == ["Findings"]


def test_a_run_that_fails_leaves_the_one_before_it(data, model, done, tmp_path):
    own, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, own)
    shutil.copytree(done[0], out, ignore=shutil.ignore_patterns("embeddings"))
    (own / "0.png").write_bytes((own / "0.png").read_bytes()[:60])  # of the training part
    before = files(out)
    with pytest.raises(ValueError, match="1 of 72 train images have no embedding"):
        run.evaluate(tasks.read(str(own / "task.toml")), model, own, out, OPTIONS)
    assert files(out) == before and recompute(out) == done[1]


@pytest.mark.parametrize("name", ["drawn", "searched"])
def test_a_run_that_is_killed_at_the_end_is_not_mixed_with_the_one_before(
    data, evaluate, tmp_path, monkeypatch, name
):
    """Scores are the last file of all: what is there is of two runs, or lacks them."""
    text = EXCLUSIVE.replace("title =", 'retrieval = "prompts"\ntitle =')
    (data / "searched.toml").write_text(text)
    out, write = tmp_path / "out", scores.write

    def kill(path, found):
        if path.name == scores.FILE:
            raise KeyboardInterrupt
        write(path, found)

    plain = EvaluateOptions(resamples=20)
    if name == "drawn":
        evaluate(name, out)
    monkeypatch.setattr(scores, "write", kill)
    with pytest.raises(KeyboardInterrupt):
        evaluate(name, out, plain)
    assert not (out / "results.json").exists()
    if name == "drawn":
        with pytest.raises(ValueError, match="images.parquet and scores.parquet are of different"):
            recompute(out)
    else:
        with pytest.raises(FileNotFoundError, match="scores.parquet: no such file"):
            recompute(out)
    monkeypatch.setattr(scores, "write", write)
    got = evaluate(name, out, plain)
    assert recompute(out) == got
    if name == "searched":
        retrieval.write(out / "retrieval.parquet", retrieval.read(out / "retrieval.parquet"), "x")
        with pytest.raises(ValueError, match="retrieval.parquet and scores.parquet are of diff"):
            recompute(out)


def test_rows_of_a_longer_curve_are_kept(evaluate, done, tmp_path, monkeypatch):
    shutil.copytree(done[0], tmp_path / "out")
    fits, fit = [], linear.fit
    monkeypatch.setattr(linear, "fit", lambda *a, **k: fits.append(len(a[0])) or fit(*a, **k))
    got = evaluate("task", tmp_path / "out", replace(OPTIONS, draws=Draws((8,), 1)))
    assert [row["n"] for row in got["probe"]["learning_curve"]] == [8, 72] and fits == [8]
    again = evaluate("task", tmp_path / "out")
    assert fits == [8] and again == done[1]


def test_another_prevalence_without_the_model(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "out", ignore=shutil.ignore_patterns("embeddings"))
    got = recompute(tmp_path / "out", prevalence=0.3)
    for point in got["held_out"]["zero_shot"]["operating_points"]:
        assert point["stated"]["prevalence"] == 0.3
    assert got["macro_auc"] == done[1]["macro_auc"]
    with pytest.raises(ValueError, match="prevalence is 3"):
        recompute(tmp_path / "out", prevalence=3.0)


def test_probes_are_compared_with_what_was_done(evaluate, done, tmp_path):
    evaluate("task", tmp_path, replace(OPTIONS, preprocess="serving"))
    for name in ("probe.parquet", "knn.parquet"):
        found = comparison.compare(done[0], tmp_path, file=name, resamples=20)
        assert found["differs"]["preprocess"] == ["big_vision", "serving"]


# --------------------------------------------------------------------------------------- pairs


def test_pairs_have_retrieval_and_nothing_else(data, evaluate, done, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(done[0] / "scores.parquet", out)  # of an earlier run
    got = evaluate("pairs", out, EvaluateOptions(resamples=60))
    assert got["retrieval"]["images"] == 140 and got["retrieval"]["texts"] == 6
    assert got["macro_auc"] is None and got["classes"] == [] and got["groups"] == 70
    assert not (out / "scores.parquet").exists()
    text = (out / "report.md").read_text()
    assert "## Retrieval" in text and "## Classes" not in text and "AUC" not in text
    before = (out / "report.html").read_bytes()
    assert recompute(out) == got and (out / "report.html").read_bytes() == before
    assert cli.main(["evaluate", "--from", str(out)]) == 0
    assert "recall@1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="out: is of pairs, images with texts and without"):
        comparison.compare(done[0], out)
    with pytest.raises(ValueError, match="pairs without classes: no --learn"):
        evaluate("pairs", out)


# ------------------------------------------------------------------------------------ mistakes


def test_command(data, checkpoint, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.evaluate, "load", lambda *_: model)
    own = tmp_path / "data"
    shutil.copytree(data, own)
    command = [
        "evaluate", "--task", str(own / "task.toml"), "--model", str(checkpoint), "--data",
        str(own), "--output", str(tmp_path / "out"), "--resamples", "20",
    ]  # fmt: skip
    for flags, say in {
        ("--learn", "all"): "learn is 'all'; expected one of thresholds, probe",
        ("--sizes", "8"): "--sizes and --seeds are of learning curves",
        ("--learn", "--seeds", "0"): "seeds 0; expected at least 1 each",
        ("--learn", "--sizes", "0"): "sizes are [0]",
        ("--prevalence", "0.1"): "prevalence is 0.1",
        ("--learn", "--prevalence", "2"): "expected a share between 0 and 1",
    }.items():
        assert cli.main([*command, *flags]) == 2, flags
        error = capsys.readouterr().err
        assert say in error and error.count("\n") == 1, error
    (own / "0.png").write_bytes((own / "0.png").read_bytes()[:60])  # of the training part
    learn = [*command, "--learn", "--sizes", "16", "--seeds", "1"]
    assert cli.main(learn) == 2
    error = capsys.readouterr().err
    assert "1 of 72 train images have no embedding" in error and "big_vision-train" in error
    assert cli.main([*learn, "--allow-missing"]) == 3
    out, error = capsys.readouterr()
    assert "linear probe: macro AUC" in out and "calibration: chosen on 34" in out
    assert "went on without 1 unreadable (train) images" in error
    assert "| unreadable (train) | 1 |" in (tmp_path / "out/report.md").read_text()


def test_training_images_of_one_class_are_an_error(data, model, tmp_path):
    own = with_training_cells(data, tmp_path / "data", 5, "a")
    with pytest.raises(ValueError, match="training rows with a label, of 1 class"):
        run.evaluate(tasks.read(str(own / "exclusive.toml")), model, own, tmp_path / "o", OPTIONS)


def test_the_probe_predicts_what_the_command_embeds(data, model, done):
    """`probe predict` takes it: other images by the same model."""
    from medsiglip_jax.embeddings.probe import prediction

    fitted = linear.open_probe(done[0] / "probe.npz")
    (found,) = prediction.predict_inputs(fitted, model, [str(data / "3.png")])
    table = pq.read_table(done[0] / "probe.parquet").to_pydict()
    row = table["id"].index("3.png")
    assert found["scores"][0]["probability"] == pytest.approx(table["score"][row], abs=1e-4)
