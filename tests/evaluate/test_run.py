"""From a folder to a report: scores by hand, numbers from scores, resuming, mistakes."""

import json
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from references import SMALL, assert_close, model_terms
from scipy import special
from sklearn.metrics import roc_auc_score

import medsiglip_jax
from medsiglip_jax import cli, metrics
from medsiglip_jax.evaluate import image_embeddings, run, scores, scoring, tasks, zero_shot
from medsiglip_jax.evaluate.data import reading
from medsiglip_jax.evaluate.options import EvaluateOptions
from medsiglip_jax.evaluate.recompute import recompute
from medsiglip_jax.evaluate.results.summary import summarize
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.units import Unit
from medsiglip_jax.evaluate.zero_shot import ClassPrompts
from medsiglip_jax.inference import embed as embedding
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import PRESETS

TERMS = model_terms(SMALL)
FINDINGS = ["Alpha", "Beta", "Gamma", "Never"]
TASK = """
title = "Three findings & one that nobody has"
source = "nowhere"
trained_on = "no"
kind = "multi_label"
score = "pos_minus_neg"
prompts_source = "made up"
[data]
adapter = "csv"
group = "patient"
attributes = { sex = "sex", age = "age" }
[[data.tables]]
file = ["labels.csv"]
[data.images]
path = ["{image}"]
[[classes]]
name = "Alpha"
present = ["photo of a a", "photo of a b", "photo of a a"]
absent = ["scan of a a"]
[[classes]]
name = "Beta"
present = ["scan of a b"]
absent = ["drawing of a c", "photo of a d"]
[[classes]]
name = "Gamma"
present = ["drawing of a e"]
absent = ["scan of a f"]
[[classes]]
name = "Never"
present = ["photo of a f"]
absent = ["scan of a e"]
[means]
"first two" = ["Alpha", "Beta"]
[readings.other]
about = "another"
present = { Alpha = ["drawing of a f"] }
[published]
where = "a paper"
mean = 0.6
images = 30
[published.auc]
Alpha = 0.5
Beta = 0.7
Gamma = 0.6
"""
CLASSES = (
    TASK.split("[[classes]]")[0]
    .replace("multi_label", "multi_class")
    .replace("pos_minus_neg", 'class_softmax"\nordinal_from = 1\nnotes = ["one each"]\n#')
    + "".join(
        f'[[classes]]\nname = "{n}"\nvalue = "{i}"\npresent = ["{p}"]\n'
        for i, (n, p) in enumerate(
            [("zero", "photo of a a"), ("one", "scan of a b"), ("two", "scan of a c")]
        )
    )
    + '[data.labels]\ncolumn = "Alpha"\n'
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """30 images of 20 patients; an unknown label, and a class without a positive."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines = [f"image,patient,sex,age,{','.join(FINDINGS)}"]
    for i in range(30):
        pixels = rng.integers(0, 256, (20, 20 + i % 3, 3), np.uint8) // (1 + i % 4)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        alpha, beta, gamma = i % 2, int(i % 5 == 0), "" if i == 7 else int(i % 3 == 1)
        lines.append(f"{i}.png,p{i % 20},{'FM'[i % 2]},{20 + 2 * i},{alpha},{beta},{gamma},0")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    (folder / "task.toml").write_text(TASK)
    (folder / "classes.toml").write_text(CLASSES)
    return folder


@pytest.fixture(scope="module")
def done(data, model, tmp_path_factory):
    """A finished evaluation, and what it returned."""
    folder = tmp_path_factory.mktemp("done") / "out"
    task = tasks.read(str(data / "task.toml"))
    return folder, run.evaluate(task, model, data, folder, EvaluateOptions(resamples=200))


def files(folder):
    names = ("results.json", "report.md", "report.html", "scores.parquet")
    return {name: (folder / name).read_bytes() for name in names}


# ------------------------------------------------------------------------------ of patients


def test_patients_are_judged_by_one_score_each(done, capsys):
    """Without another run of the model, and with the numbers of the combined scores."""
    folder, before = done
    flags = ["--per", "patient", "--aggregate", "max", "--json"]
    assert cli.main(["evaluate", "--from", str(folder), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 20 and found["groups"] is None
    unit = {"per": "patient", "aggregate": "max", "images": 30, "without_label": 0}
    assert found["unit"] == unit
    run_ = scores.read(folder / "scores.parquet")
    patients = sorted(set(run_.groups))
    mine = [[i for i, g in enumerate(run_.groups) if g == p] for p in patients]
    label = [max(run_.labels[rows, 0]) for rows in mine]
    want = roc_auc_score(label, [max(run_.scores[rows, 0]) for rows in mine])
    assert found["classes"][0]["auc"] == pytest.approx(want, abs=1e-12)
    report = (folder / "report.md").read_text()
    assert "20 patients or groups. Each has one score, by max over its images (30 in all)" in report
    assert cli.main(["evaluate", "--from", str(folder), "--per", "sex", "--json"]) == 2
    assert "images of several patients" in capsys.readouterr().err
    assert cli.main(["evaluate", "--from", str(folder), "--per", "", "--json"]) == 2
    assert "expected one of patient, sex, age" in capsys.readouterr().err
    assert cli.main(["evaluate", "--from", str(folder), "--per", "image", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == before
    assert cli.main(["evaluate", "--from", str(folder), "--aggregate", "max"]) == 2
    assert "--aggregate combines the scores of images, and needs --per" in capsys.readouterr().err
    assert recompute(folder) == before  # as evaluated


# --------------------------------------------------------------------------------- score rules


def plain(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_rules_by_hand():
    rng = np.random.default_rng(0)
    z, p, n = rng.standard_normal((5, 8)), plain(rng.standard_normal((3, 8))), None
    n = plain(rng.standard_normal((3, 8)))
    cos_p, cos_n = plain(z) @ p.T, plain(z) @ n.T
    of_p, of_n = ClassPrompts(p), ClassPrompts(n)
    for name, want in {
        "pos_minus_neg": cos_p - cos_n,
        "pair_softmax": special.logit(np.exp(7 * cos_p) / (np.exp(7 * cos_p) + np.exp(7 * cos_n))),
        "class_softmax": np.exp(7 * cos_p) / np.exp(7 * cos_p).sum(1, keepdims=True),
        "cosine": cos_p,
    }.items():
        got = zero_shot.score(name, 3 * z.astype(np.float32), of_p, of_n, 7.0)
        # A norm and a product of 8 each, and what the cosines are multiplied by.
        assert_close(got, want, terms=16, largest=7)
    far = zero_shot.score("class_softmax", z, of_p, None, 1e6)
    assert np.isfinite(far).all() and far.max(1).tolist() == [1] * 5
    with pytest.raises(ValueError, match="there are none"):
        zero_shot.score("pos_minus_neg", z, of_p)
    with pytest.raises(ValueError, match="expected one of pos_minus_neg"):
        zero_shot.score("best", z, of_p)


def test_pairs_far_apart_do_not_tie(tmp_path):
    """With MedSigLIP's factor of about 117, probabilities of 1.0 would tie and move the AUC."""
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.4
    apart = np.where(labels, 0.5, 0.3) + 0.1 * rng.normal(size=400)
    cosines = np.stack([apart, np.zeros(400)], axis=1)  # of presence; those of absence are 0
    p, a = cosines[:, :1], cosines[:, 1:]
    odds = zero_shot.RULES["pair_softmax"].score(p, a, 117.0)
    difference = zero_shot.RULES["pos_minus_neg"].score(p, a, 117.0)
    probabilities = special.expit(odds[:, 0])
    assert (probabilities == 1).sum() > 100
    want = metrics.auc(difference[:, 0], labels)
    assert metrics.auc(odds[:, 0], labels) == want
    assert metrics.auc(probabilities, labels) < want - 0.01
    ids, column = [str(i) for i in range(400)], labels[:, None] * 1.0
    scores.write(tmp_path / "s", scores.Scores(ids, ["a"], odds, column, None, {}, log_odds=True))
    again, table = scores.read(tmp_path / "s"), pq.read_table(tmp_path / "s")
    assert again.log_odds and metrics.auc(again.scores[:, 0], labels) == want
    np.testing.assert_array_equal(table["score"].to_numpy(), probabilities)


def test_temperature_changes_ranks_of_three_classes_and_not_of_two():
    z, p = np.array([[1.0, 0, 0], [0.7, 0.6, 0.1]]), np.eye(3)
    of_p, other = ClassPrompts(p), ClassPrompts(p[::-1])
    three = [zero_shot.score("class_softmax", z, of_p, None, f)[:, 0] for f in (1.0, 50.0)]
    two = [zero_shot.score("pair_softmax", z, of_p, other, f)[:, 0] for f in (1.0, 50.0)]
    assert [np.argsort(x).tolist() for x in two] == [[1, 0], [1, 0]]
    cosines = np.array([[0.5, 0.2, 0.2], [0.6, 0.58, -0.9]])
    ranks = [zero_shot.RULES["class_softmax"].score(cosines, cosines, f) for f in (1.0, 50.0)]
    assert (np.argsort(ranks[0][:, 0]) != np.argsort(ranks[1][:, 0])).any()
    assert len(three) == 2


def test_a_class_is_the_mean_of_unit_vectors_and_repeats_count(model):
    texts = ["photo of a a", "photo of a b", "photo of a a"]
    z = plain(np.asarray(model.encode_text(model.processor.texts(texts)), np.float64))
    got = zero_shot.class_prompts(model, [texts, texts[:1]]).vectors
    assert_close(got, plain(np.stack([z.mean(0), z[0]])), TERMS)
    assert zero_shot.factor(model, "none") == 1
    assert zero_shot.factor(model, "logit_scale") == pytest.approx(
        float(np.exp(np.asarray(model.params["t"], np.float64)).item())
    )


@pytest.mark.parametrize("over, combined", [("mean", np.mean), ("max", np.max)])
def test_prompts_may_be_combined_after_the_cosine(model, over, combined):
    groups = [
        ["photo of a a", "photo of a b", "photo of a a"],
        ["scan of a c"],
        ["photo of a d"] * 2,
    ]
    zimg = np.random.default_rng(0).normal(size=(7, model.config.embed_dim))
    got = zero_shot.class_prompts(model, groups, over).cosines(zimg)
    for j, group in enumerate(groups):
        ztxt = np.asarray(model.encode_text(model.processor.texts(group)), np.float64)
        assert_close(got[:, j], combined(plain(zimg) @ plain(ztxt).T, axis=1), TERMS)
    by_embedding = zero_shot.class_prompts(model, groups).cosines(zimg)
    assert np.abs(by_embedding - got)[:, 0].max() > 1e-3
    np.testing.assert_allclose(by_embedding[:, 1:], got[:, 1:], atol=1e-12)  # of one prompt


def test_a_wrong_unit_fails_before_anything_is_embedded(data, tmp_path):
    def never():
        raise AssertionError("the model was loaded")

    task = tasks.read(str(data / "task.toml"))
    wrong = {
        "expected one of patient, sex": Unit("site"),
        "images of several patients": Unit("sex"),
        "noisy-or needs probabilities": Unit("patient", "noisy-or"),
    }
    for message, unit in wrong.items():
        with pytest.raises(ValueError, match=message):
            run.evaluate(task, never, data, tmp_path / "out", EvaluateOptions(unit=unit))


def test_subgroups_by_any_column(data, model, tmp_path):
    """Hospitals, say: each against the others, beside the attributes of the task."""
    task = tasks.read(str(data / "task.toml"))
    options = EvaluateOptions(resamples=20, by=("Beta",))
    found = run.evaluate(task, model, data, tmp_path / "out", options)
    assert {row["attribute"] for row in found["subgroups"]} == {"sex", "age", "Beta"}
    values = [r["value"] for r in found["characteristics"] if r["attribute"] == "Beta"]
    assert values == ["0", "1"]
    for names, message in ((("site",), "has a column site"), (("id",), "rename it")):
        with pytest.raises(ValueError, match=message):
            options = EvaluateOptions(by=names)
            run.evaluate(task, model, data, tmp_path / "other", options)


# --------------------------------------------------------------------------------- end to end


def test_scores_are_those_of_a_plain_script(done, data, model):
    folder, _ = done
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    assert list(table) == ["id", "class", "score", "label", "group"]
    assert table["id"][::4] == [f"{i}.png" for i in range(30)]
    assert table["class"] == FINDINGS * 30
    assert table["group"][::4] == [f"p{i % 20}" for i in range(30)]
    assert table["label"][7 * 4 : 8 * 4] == [1, 0, None, 0]
    pixels = model.processor.images([data / f"{i}.png" for i in range(30)])
    zimg = plain(np.asarray(model.encode_image(pixels), np.float64))
    for j, (present, absent) in enumerate(
        [(["photo of a a", "photo of a b", "photo of a a"], ["scan of a a"]),
         (["scan of a b"], ["drawing of a c", "photo of a d"])]
    ):  # fmt: skip
        z = [plain(np.asarray(model.encode_text(model.processor.texts(t)), np.float64).mean(0))
             for t in (present, absent)]  # fmt: skip
        assert_close(table["score"][j::4], zimg @ z[0] - zimg @ z[1], TERMS, largest=1)


def test_numbers_are_those_of_the_scores(done):
    folder, got = done
    assert json.loads((folder / "results.json").read_text()) == got
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    want = {}
    for j, name in enumerate(FINDINGS[:3]):
        known = [(s, y) for s, y in zip(table["score"][j::4], table["label"][j::4], strict=True)
                 if y is not None]  # fmt: skip
        want[name] = roc_auc_score([y for _, y in known], [s for s, _ in known])
    classes = {c["class"]: c for c in got["classes"]}
    for name, value in want.items():
        assert classes[name]["auc"] == pytest.approx(value, abs=1e-12)
        assert classes[name]["low"] < value < classes[name]["high"]
    assert classes["Gamma"]["unknown"] == 1 and classes["Beta"]["few"]
    assert not classes["Alpha"]["few"]
    assert classes["Alpha"]["difference"] == pytest.approx(want["Alpha"] - 0.5)
    inside = classes["Beta"]["low"] <= 0.7 <= classes["Beta"]["high"]
    assert classes["Beta"]["inside"] is inside
    assert got["macro_auc"]["auc"] == pytest.approx(np.mean(list(want.values())), abs=1e-12)
    assert got["macro_auc"]["published"] == 0.6
    assert got["means"]["first two"]["auc"] == pytest.approx((want["Alpha"] + want["Beta"]) / 2)
    assert got["means"]["first two"]["published"] == pytest.approx(0.6)
    assert got["images"] == 30 and got["groups"] == 20


def test_intervals_are_of_patients(done):
    folder, got = done
    found = scores.read(folder / "scores.parquet")
    alpha = metrics.delong(
        found.scores[:, 0], found.labels[:, 0], groups=np.array(found.groups), student=True
    )
    assert (got["classes"][0]["low"], got["classes"][0]["high"]) == (alpha.low, alpha.high)
    mean = metrics.macro_delong(found.scores, found.labels, groups=np.array(found.groups)).auc
    assert (got["macro_auc"]["low"], got["macro_auc"]["high"]) == (mean.low, mean.high)
    row = next(x for x in (folder / "report.md").read_text().splitlines() if "| Beta *" in x)
    assert ("| no |" if not got["classes"][1]["inside"] else "| yes |") in row


def test_a_class_with_one_label_is_listed_and_not_averaged(done):
    folder, got = done
    assert got["undefined"] == ["Never"] and got["classes_in_mean"] == 3
    never = got["classes"][3]
    assert never["auc"] is None and never["positives"] == 0 and never["negatives"] == 30
    assert "all their images have the same label: Never" in (folder / "report.md").read_text()


def test_subgroups(done):
    _, got = done
    of = {(g["attribute"], g["subgroup"], g["class"]): g for g in got["subgroups"]}
    assert {(a, s) for a, s, _ in of} == {
        ("sex", "F"), ("sex", "M"), ("age", "under 40"), ("age", "40 to 64"),
        ("age", "65 and over"),
    }  # fmt: skip
    assert of["age", "under 40", "Beta"]["positives"] == 2 and of["sex", "F", "Alpha"]["few"]


def test_recomputed_without_the_model_it_is_the_same(done, capsys, monkeypatch):
    folder, got = done
    before = files(folder)
    for name in ("results.json", "report.md", "report.html"):
        (folder / name).unlink()
    monkeypatch.setattr(medsiglip_jax.model.api, "load", None)
    assert cli.main(["evaluate", "--from", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == got
    assert files(folder) == before


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"resamples": 0}, {"batch_size": 0}])
def test_numbers_that_would_fail_after_the_work_are_refused_before_it(wrong):
    ((name, number),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {number}; expected at least"):
        EvaluateOptions(**wrong)


def test_other_statistics_without_the_model_and_nothing_else(done, tmp_path, capsys):
    out = str(shutil.copytree(done[0], tmp_path / "out"))
    assert cli.main(["evaluate", "--from", out, "--json", "--resamples", "40"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["statistics"] == {"resamples": 40, "seed": 0}
    assert got["macro_auc"] == done[1]["macro_auc"] and got["classes"] == done[1]["classes"]
    before = files(tmp_path / "out")
    for flags, say in {
        ("--seed", "1"): "--from takes --resamples, --prevalence, --per, --aggregate, --export, "
        "--json; got --seed",
        ("--learn", "--data", "x"): "got --data, --learn",
        ("--resamples", "0"): "resamples is 0",
        ("--prevalence", "0.1"): "prevalence is 0.1; expected",
    }.items():
        assert cli.main(["evaluate", "--from", out, *flags]) == 2
        error = capsys.readouterr().err
        assert say in error and error.count("\n") == 1, error
    assert files(tmp_path / "out") == before
    assert recompute(out) == done[1]


def test_provenance(done, data, checkpoint, model):
    _, got = done
    found = got["provenance"]
    assert found["model"]["sha256"] == model.sha256 and found["preprocess"] == "big_vision"
    assert found["versions"]["medsiglip_jax"] == medsiglip_jax.__version__
    for key in ("tokenizer_sha256", "prompts_sha256", "labels_sha256"):
        assert re.fullmatch("[0-9a-f]{64}", found[key])
    assert found["label_files"].keys() == {"labels.csv"}
    assert found["uncertain"] == "ignore" and got["statistics"] == {"resamples": 200, "seed": 0}
    task = tasks.read(str(data / "task.toml"))
    assert found["prompts_sha256"] == task.prompts_sha256()
    assert task.with_reading("other").prompts_sha256() != task.prompts_sha256()


def test_the_page_needs_nothing_else_and_says_it_all(done):
    folder, got = done
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert not re.search(r"(src|href)=|url\(|<script", page)
    assert page.count("<svg") == 1 + 3 * 3 and "Three findings &amp; one" in page
    for found in got["classes"][:3]:
        row = f"| {found['class']}{' *' if found['few'] else ''} | {found['auc']:.3f} |"
        assert row in text and f"<td>{found['auc']:.3f}" in page
        assert f"{found['low']:.3f} to {found['high']:.3f}" in text
    assert got["provenance"]["prompts_sha256"] in page and "a paper" in text
    points = re.search(r'points="([^"]+)"', page)[1].split()
    assert points[0] == "46.0,238.0" and points[-1] == "236.0,48.0"


def test_a_killed_evaluation_goes_on(data, model, done, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_SHARD", 8)
    task, out, seen = tasks.read(str(data / "task.toml")), tmp_path / "out", []

    def kill(progress):
        seen.append(progress.rows)
        if sum(seen) == 24:
            raise KeyboardInterrupt

    out.mkdir()
    (out / "results.json").write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(task, model, data, out, EvaluateOptions(resamples=200), on_progress=kill)
    assert (out / "results.json").read_text() == "of an earlier run"  # whose files are all there
    embedded, total = [], []
    got = run.evaluate(
        task, lambda: model, data, out, EvaluateOptions(resamples=200),
        on_progress=lambda p: embedded.append(p.rows) if p.busy is not None else None,
        on_total=total.append,
    )  # fmt: skip
    assert total == [30]
    assert sum(embedded) == 6  # what was embedded before is there, also of the third shard of 8
    assert got["classes"] == done[1]["classes"]
    assert files(out)["report.md"] == files(done[0])["report.md"]


def test_existing_embeddings(data, model, done, checkpoint, tmp_path, capsys):
    embedded = done[0] / "embeddings" / "big_vision"
    task, options = tasks.read(str(data / "task.toml")), EvaluateOptions(resamples=200)
    got = run.evaluate(task, model, data, tmp_path / "a", options, embedded)
    assert got == done[1] and not (tmp_path / "a" / "embeddings").exists()
    other = medsiglip_jax.init(model.config, seed=1)
    medsiglip_jax.save(
        medsiglip_jax.model.api.Model(
            other.params, model.config, tokenizer=model.processor.tokenizer_source
        ),
        tmp_path / "other",
    )
    other = medsiglip_jax.load(tmp_path / "other")
    with pytest.raises(ValueError, match="sha256 of the model is"):
        run.evaluate(task, other, data, tmp_path / "b", options, embedded)
    with pytest.raises(ValueError, match="preprocess is 'big_vision', wanted 'serving'"):
        run.evaluate(task, model, data, tmp_path / "b", EvaluateOptions("serving"), embedded)
    with pytest.raises(ValueError, match="dicom is .*'dicom'.*, wanted .*'official'"):
        official = EvaluateOptions(dicom=Rules("official"))
        run.evaluate(task, model, data, tmp_path / "b", official, embedded)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/labels.csv").write_text("image,patient,Alpha,Beta,Gamma,Never\nx,p,1,,,")
    (tmp_path / "elsewhere/x").write_bytes((data / "0.png").read_bytes())
    with pytest.raises(ValueError, match="none of the 1 images is among its 30 rows"):
        run.evaluate(task, model, tmp_path / "elsewhere", tmp_path / "b", options, embedded)


@pytest.mark.filterwarnings("default")
def test_vectors_of_another_program_will_do(data, model, done, tmp_path):
    """The same scores, with what is not known of them said; of another size they are refused."""
    parts = sorted((done[0] / "embeddings" / "big_vision").glob("part-*.parquet"))
    table = pq.read_table(parts)
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    names = np.array(table["source"].to_pylist())
    np.savez(tmp_path / "v.npz", embeddings=vectors, paths=names)
    task, options = tasks.read(str(data / "task.toml")), EvaluateOptions(resamples=200)
    got = run.evaluate(task, model, data, tmp_path / "out", options, tmp_path / "v.npz")
    assert [c["auc"] for c in got["classes"]] == [c["auc"] for c in done[1]["classes"]]
    assert got["provenance"]["preprocess"] == "unknown"
    assert got["provenance"]["model"] == {"source": None, "sha256": None}
    np.savez(tmp_path / "short.npz", embeddings=vectors[:, :-1], paths=names)
    with pytest.raises(ValueError, match="short.npz: made with another program, .*dim is 15"):
        run.evaluate(task, model, data, tmp_path / "b", options, tmp_path / "short.npz")
    np.savez(tmp_path / "few.npz", embeddings=vectors[1:], paths=names[1:])
    with pytest.raises(ValueError, match="1 of 30 images have no embedding. --allow-missing goes"):
        run.evaluate(task, model, data, tmp_path / "b", options, tmp_path / "few.npz")


def test_embed_of_the_folder_will_do(data, model, done, tmp_path):
    from medsiglip_jax.data import inputs

    embedding.embed(model, inputs.rows([data]), tmp_path / "embedded")
    task = tasks.read(str(data / "task.toml"))
    options = EvaluateOptions(resamples=200)
    got = run.evaluate(task, model, data, tmp_path / "out", options, tmp_path / "embedded")
    assert [c["auc"] for c in got["classes"]] == [c["auc"] for c in done[1]["classes"]]


def test_a_file_is_a_better_match_than_an_id(data, model, tmp_path):
    from medsiglip_jax.data import inputs

    swapped = "".join(f"{data}/{i}.png,{1 - i}.png\n" for i in range(2))
    (tmp_path / "rows.csv").write_text("image,id\n" + swapped)
    embedding.embed(model, inputs.rows([tmp_path / "rows.csv"]), tmp_path / "embedded")
    _, found = reading.read(tasks.read(str(data / "task.toml")), data)
    got = image_embeddings.read(tmp_path / "embedded", found)
    pixels = model.processor.images([data / "0.png", data / "1.png"])
    assert got.images.tolist() == [0, 1]
    assert_close(got.vectors, model.encode_image(pixels), TERMS)


def test_a_folder_of_something_else_is_refused(data, model, tmp_path):
    """Before anything is read: a fine-tuning run has a report.html of its own."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("of the training")
    with pytest.raises(FileExistsError, match="not an evaluation; choose a new folder"):
        run.evaluate(tasks.read(str(data / "task.toml")), model, data, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["report.html"]


def test_grid_shows_all_cells(data, model, done, tmp_path):
    out = tmp_path / "out"
    task = tasks.read(str(data / "task.toml"))
    got = run.evaluate(task, model, data, out, EvaluateOptions(resamples=200, grid=True))
    cells = got["grid"]
    assert {(c["preprocess"], c["reading"]) for c in cells} == {
        (p, r) for p in PRESETS for r in ("as given", "other")
    }
    assert got["classes"] == done[1]["classes"]
    first = cells[0]
    assert first["classes"]["Alpha"] == got["classes"][0]["auc"] != cells[1]["classes"]["Alpha"]
    assert first["classes"]["Beta"] == cells[1]["classes"]["Beta"]
    assert first["classes"]["Never"] is None
    assert first["macro_auc"] == got["macro_auc"]["auc"]
    published = {"Alpha": 0.5, "Beta": 0.7, "Gamma": 0.6}
    apart = [abs(first["classes"][name] - value) for name, value in published.items()]
    assert first["mean_distance"] == pytest.approx(np.mean(apart))
    assert (out / "report.md").read_text().count("| huggingface |") == 2
    assert recompute(out) == got
    with pytest.raises(ValueError, match="cannot use given embeddings"):
        run.evaluate(
            task, model, data, out, EvaluateOptions(grid=True), out / "embeddings/big_vision"
        )


def test_a_grid_of_two_runs_is_refused(data, model, tmp_path, monkeypatch):
    """Of the second, killed, some cells are there."""
    out, task = tmp_path / "out", tasks.read(str(data / "task.toml"))
    options = EvaluateOptions(resamples=20, grid=True)
    run.evaluate(task, model, data, out, options)
    cells, write = [], scores.write

    def kill(path, found):
        cells.append(path.name)
        if len(cells) == 2:
            raise KeyboardInterrupt
        write(path, found)

    monkeypatch.setattr(scores, "write", kill)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(task, model, data, out, replace(options, score="cosine"))
    assert not (out / "results.json").exists()
    with pytest.raises(ValueError, match=rf"grid/{cells[0]} and scores.parquet are of different"):
        recompute(out)


def test_the_grid_of_a_softmax_has_temperatures(data, model, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    lines = (data / "labels.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    for i, row in enumerate(rows[1:]):
        row[4] = str(i % 3)
    (own / "labels.csv").write_text("\n".join(",".join(row) for row in rows))
    for file in data.glob("*.png"):
        (own / file.name).write_bytes(file.read_bytes())
    task = tasks.read(str(data / "classes.toml"))
    got = run.evaluate(task, model, own, tmp_path / "out", EvaluateOptions(resamples=50, grid=True))
    assert [c["temperature"] for c in got["grid"]] == ["logit_scale", "none"] * len(PRESETS)
    table = pq.read_table(tmp_path / "out/scores.parquet")
    values = table["score"].to_numpy().reshape(30, 3)
    labels = table["label"].to_numpy().reshape(30, 3)
    np.testing.assert_allclose(values.sum(1), 1)
    want = roc_auc_score(labels.argmax(1), values, multi_class="ovr", average="macro")
    assert got["macro_auc"]["auc"] == pytest.approx(want, abs=1e-12)
    each = got["one_class_each"]
    assert each["accuracy"] == np.mean(values.argmax(1) == labels.argmax(1))
    above = metrics.auc(1 - values[:, 0], labels[:, 0] == 0)
    assert each["from"] == "one" and each["auc_from"]["auc"] == pytest.approx(above)
    none = run.evaluate(
        task, model, own, tmp_path / "out", EvaluateOptions(resamples=50, temperature="none")
    )
    assert none["macro_auc"]["auc"] == pytest.approx(got["grid"][1]["macro_auc"], abs=1e-12)
    assert none["grid"] == []
    assert none["provenance"]["factor"] == 1


def test_arrays_are_scored_as_files_are(model, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 28, 28, 3), np.uint8)
    labels = np.arange(12, dtype=np.uint8)[:, None] % 9
    np.savez(tmp_path / "pathmnist.npz", test_images=pixels, test_labels=labels)
    task = tasks.read("pathmnist")
    for i, (label, image) in enumerate(zip(labels[:, 0], pixels, strict=True)):
        name = tasks.read("crc-val-he-7k").classes[label].value
        (tmp_path / "folders" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folders" / name / f"{i:02}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arrays = run.evaluate(task, model, tmp_path, tmp_path / "a", EvaluateOptions(resamples=20))
        task = tasks.read("crc-val-he-7k")
        folders = run.evaluate(task, model, tmp_path / "folders", tmp_path / "b", EvaluateOptions())
    aucs = [[c["auc"] for c in found["classes"]] for found in (arrays, folders)]
    np.testing.assert_allclose(*aucs, atol=1e-12)
    assert not list((tmp_path / "a").rglob("*.png"))


@pytest.mark.slow
def test_digits_brings_its_data_and_model(checkpoint, tmp_path, capsys, monkeypatch):
    from medsiglip_jax.train import quickstart

    trained = []

    def train(workdir, seed):
        trained.append(seed)
        medsiglip_jax.save(medsiglip_jax.load(checkpoint), workdir / "model")
        (workdir / quickstart.LAST).mkdir()

    monkeypatch.setattr(quickstart, "run", train)
    command = ["evaluate", "--task", "digits", "--output", str(tmp_path), "--resamples", "20"]
    assert cli.main([*command, "--json"]) == cli.main([*command, "--batch-size", "16"]) == 0
    assert trained == [0]
    out, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    _, held_out = quickstart.load_digits(0, 0.25)
    assert out["images"] == len(held_out.labels) == sum(c["positives"] for c in out["classes"])
    table = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    labels = np.array(table["label"]).reshape(-1, 10).argmax(1)
    np.testing.assert_array_equal(labels, held_out.labels)


@pytest.mark.float
@pytest.mark.slow
def test_digits_in_full(tmp_path, capsys):
    assert cli.main(["evaluate", "--task", "digits", "--output", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macro_auc"]["auc"] > 0.99


# ------------------------------------------------------------------------------------ mistakes


@pytest.fixture
def broken(data, tmp_path):
    """A copy of the data in which one image is damaged and one is gone."""
    for file in data.iterdir():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data/4.png").write_bytes((data / "4.png").read_bytes()[:60])
    return tmp_path / "data"


def test_unreadable_images_stop_it_unless_allowed(
    broken, checkpoint, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cli.evaluate, "load", lambda *_: model)  # it is compiled
    command = [
        "evaluate", "--task", str(broken / "task.toml"), "--model", str(checkpoint),
        "--data", str(broken), "--output", str(tmp_path / "out"), "--resamples", "20",
    ]  # fmt: skip
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "1 of 30 images have no embedding" in error and "errors.parquet" in error
    assert not (tmp_path / "out/results.json").exists()
    assert cli.main([*command, "--allow-missing"]) == 3
    out, error = capsys.readouterr()
    assert "29 images" in out and "went on without 1 unreadable images" in error
    (broken / "5.png").unlink()
    assert cli.main(command) == 2
    assert "1 missing, 29 images found: 5.png" in capsys.readouterr().err
    assert "unreadable | 1" in (tmp_path / "out/report.md").read_text()
    assert cli.main(["evaluate", "--from", str(tmp_path / "out")]) == 3


@pytest.mark.parametrize(
    ("flags", "say"),
    [
        (["--task", "chexprt"], "--task needs --model, --data, --output"),
        (["--from", "nowhere"], "nowhere/scores.parquet: no such file; expected the --output of"),
        (["--task", "x", "--list"], "not allowed with"),
        ([], "one of the arguments --task --from --average --list is required"),
    ],
)
def test_wrong_command_lines(flags, say, capsys):
    assert cli.main(["evaluate", *flags]) == 2
    assert say in capsys.readouterr().err


def test_wrong_flags(data, checkpoint, tmp_path, capsys):
    command = [
        "evaluate", "--task", str(data / "task.toml"), "--model", str(checkpoint),
        "--data", str(data), "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    for flags, say in {
        ("--task", "chexprt"): "neither a file nor a task",
        ("--preprocess", "clip"): "unknown preprocess 'clip'",
        ("--score", "best"): "score is 'best'",
        ("--temperature", "hot"): "temperature is 'hot'",
        ("--uncertain", "maybe"): "uncertain is 'maybe'; expected one of ignore, positive",
        ("--blank", "positive"): "blank is 'positive'",
        ("--resamples", "0"): "resamples is 0",
        ("--reading", "third"): "no reading 'third'; there are: other",
        ("--data", "nowhere"): "nowhere: no such folder; get Three findings",
        ("--dicom-rules", "best"): "DICOM rules 'best'; expected one of dicom, official",
        ("--prompts", str(data / "0.png")): "not readable as TOML",
    }.items():
        assert cli.main([*command, *flags]) == 2, flags
        error = capsys.readouterr().err
        assert say in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_list(capsys):
    assert cli.main(["evaluate", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}: " in text for name in tasks.names())
    assert cli.main(["evaluate", "--list", "--json"]) == 0
    assert {t["name"] for t in json.loads(capsys.readouterr().out)} == set(tasks.names())


@pytest.mark.filterwarnings("ignore:--ct-window. without effect")
def test_json_and_text(data, checkpoint, tmp_path, capsys):
    command = [
        "evaluate", "--task", str(data / "task.toml"), "--model", str(checkpoint), "--data",
        str(data), "--output", str(tmp_path / "out"), "--resamples", "20", "--reading", "other",
        "--ct-window", "350/40",
    ]  # fmt: skip
    assert cli.main([*command, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["provenance"]["reading"] == "other"
    assert got["provenance"]["dicom"]["ct_window"] == [350, 40]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert f"{got['macro_auc']['auc']:.3f}" in out and out.strip().endswith("report.html")


def test_other_scores_than_evaluate_wrote(done, tmp_path):
    import pyarrow as pa

    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="not scores that evaluate wrote"):
        recompute(tmp_path)
    (tmp_path / "scores.parquet").write_text("x")
    with pytest.raises(ValueError, match="not scores that evaluate wrote"):
        recompute(tmp_path)
    shutil.copytree(done[0], tmp_path / "out")
    run = scores.read(tmp_path / "out" / scores.FILE)
    for name in ("../../x", "/etc/passwd", 3):
        changed = replace(run, meta={**run.meta, "cells": [name]})
        scores.write(tmp_path / "out" / scores.FILE, changed)
        say = r"scores.parquet.* names .*; expected a plain|cells is \[3\]"
        with pytest.raises(ValueError, match=say):
            recompute(tmp_path / "out")


def test_perfect_scores_and_no_groups():
    """Numbers that JSON lacks become null."""
    labels = np.array([[0.0, 0], [1, 0], [1, 0], [0, 0]])
    meta = {
        "task": {**tasks.read("ddi").to_dict(), "published": None}, "counts": {}, "cells": [],
        "provenance": {}, "statistics": {"resamples": 20, "seed": 0},
    }  # fmt: skip
    found = summarize(
        Scores(["a", "b", "c", "d"], ["x", "y"], labels + 0.0, labels, None, meta), {}
    )
    assert found["classes"][0]["auc"] == 1 and found["classes"][1]["auc"] is None
    assert found["macro_auc"]["auc"] == 1 and found["groups"] is None
    json.dumps(found, allow_nan=False)


def test_a_wrong_join_looks_like_chance_and_is_not_hidden(done):
    """Shuffled labels: every interval holds a half."""
    rng = np.random.default_rng(1)
    labels = (rng.random((300, 3)) < 0.5).astype(float)
    values = rng.standard_normal((300, 3))
    found = metrics.class_aucs(values, labels, student=True)
    assert all(0.5 in c.auc for c in found.classes)
