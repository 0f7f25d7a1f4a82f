"""The linear probe: scikit-learn's optimum, honest splits and joins, and files that say no."""

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

import medsiglip_jax
from medsiglip_jax import metrics
from medsiglip_jax.data import inputs
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.embeddings.probe import commands, features, learning, linear, scaling
from medsiglip_jax.embeddings.probe.linear import open_probe
from medsiglip_jax.embeddings.probe.logistic import LabelledVectors
from medsiglip_jax.embeddings.provenance import Provenance, of_run
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.inference.manifest import Manifest, Weights
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.parts import Parts

DIM = 12


def draw(n, classes=3, seed=0, dim=DIM):
    """Vectors around the centres of their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n).astype(np.int32)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    vectors = 5 + 0.7 * centres[labels] + rng.normal(size=(n, dim)) * np.linspace(0.5, 2, dim)
    return LabelledVectors(vectors.astype(np.float32), labels)


def findings(n, seed=0):
    """Three findings, each with holes."""
    vectors, _ = draw(n, seed=seed)
    rng = np.random.default_rng(seed)
    labels = (vectors[:, :3] + rng.normal(size=(n, 3)) > 5.5).astype(np.float32)
    labels[rng.random((n, 3)) < 0.2] = np.nan
    return LabelledVectors(vectors, labels)


def rows_of(labels):
    return Examples([str(i) for i in range(len(labels))], labels=labels)


def reference(x, y, strength):
    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
    with threadpool_limits(1):
        model.fit((x - mean) / deviation, y)
    return lambda z: model.predict_proba((z - mean) / deviation)


# --------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classes_have_the_probabilities_of_sklearn(classes):
    train, chosen = draw(300, classes), draw(200, classes, seed=1)
    fitted = linear.fit(*train, *chosen)
    strength = fitted.facts["strengths"][0]
    test = draw(50, classes, seed=2)[0]
    np.testing.assert_allclose(
        fitted.predict(test), reference(*train, strength)(test), rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(fitted.predict(test).sum(axis=1), 1, rtol=1e-12)
    # The strength is the best of all that were tried, each fitted by itself.
    tried = [metrics.macro_auc(reference(*train, c)(chosen[0]), chosen[1])
             for c in linear.logistic.STRENGTHS]  # fmt: skip
    own = metrics.macro_auc(fitted.predict(chosen[0]), chosen[1])
    assert own == pytest.approx(max(tried), abs=2e-4)


def test_findings_are_fitted_one_by_one_on_what_is_known():
    train, chosen = findings(400), findings(200, seed=1)
    fitted = linear.fit(*train, *chosen, ["a", "b", "c"], rule="sensitivity", at_least=0.9)
    test = draw(50, seed=2)[0]
    mean, deviation = train[0].mean(0, dtype=np.float64), train[0].std(0, dtype=np.float64)
    for k, strength in enumerate(fitted.facts["strengths"]):
        known = ~np.isnan(train[1][:, k])
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
        with threadpool_limits(1):
            model.fit(((train[0] - mean) / deviation)[known], train[1][known, k])
        want = model.predict_proba((test - mean) / deviation)[:, 1]
        np.testing.assert_allclose(fitted.predict(test)[:, k], want, rtol=0, atol=1e-4)
        rows = metrics.known(fitted.predict(chosen[0])[:, k], chosen[1][:, k])
        point = metrics.operating_point(rows.scores, rows.positive, fitted.thresholds[k])
        assert point.sensitivity.value >= 0.9
        assert fitted.thresholds[k] == metrics.choose_threshold(
            rows.scores, rows.positive, "sensitivity", 0.9
        )
        assert fitted.facts["validation_auc"][k] == metrics.auc(rows.scores, rows.positive)
    called = fitted.positive(fitted.predict(chosen[0]))
    assert called.dtype == bool and called.any() and not called.all()


def test_without_a_validation_auc_the_middle_strength_is_taken():
    (x, y), (xv, _) = draw(100, 2), draw(30, 2, seed=1)
    fitted = linear.fit(x, y, xv, np.zeros(30, np.int32), strengths=(0.1, 1.0, 10.0))
    assert fitted.facts["strengths"] == [1, 1] and fitted.facts["validation_auc"] == [None, None]
    assert np.isnan(fitted.thresholds).all()


@pytest.mark.parametrize("scale", scaling.SCALES)
def test_scales(scale):
    (x, y), chosen = draw(200), draw(100, seed=1)
    fitted = linear.fit(x, y, *chosen, scale=scale)
    assert fitted.facts["scale"] == scale and fitted.scaling.unit == (scale == "unit")
    scaled = fitted.scaling(x)
    assert (scaled**2).mean() == pytest.approx(1, rel=1e-6)
    if scale == "standard":
        np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(scaled.std(axis=0), 1, rtol=1e-6)
    elif scale == "unit":
        np.testing.assert_allclose(fitted.predict(3 * x), fitted.predict(x), atol=1e-6)
    else:
        np.testing.assert_allclose(scaled / x, (scaled / x)[0, 0], rtol=1e-6)
    assert metrics.macro_auc(fitted.predict(chosen[0]), chosen[1]) > 0.8


def test_what_was_never_seen_is_listed_and_never_called():
    (x, y), (xv, yv) = draw(200, 4), draw(100, 4, seed=1)
    fitted = linear.fit(x[y != 2], y[y != 2], xv, yv)
    assert fitted.fitted.tolist() == [True, True, False, True]
    assert (fitted.predict(xv)[:, 2] == 0).all() and not fitted.positive(fitted.predict(xv))[
        :, 2
    ].any()
    assert fitted.facts["validation_auc"][2] is None
    found = commands.judge(fitted, features.Features(xv, rows_of(yv), fitted.provenance))
    assert found["undefined"] == ["2"] and found["classes"]["2"]["positives"] == (yv == 2).sum()
    assert found["classes"]["2"]["auc"] is None and found["classes"]["2"]["sensitivity"] is None
    seen = [found["classes"][name]["auc"] for name in "013"]
    assert found["macro_auc"] == pytest.approx(np.mean(seen), abs=1e-12)
    (x, y), (xv, yv) = findings(200), findings(100, seed=1)
    y[:, 1], yv[:, 2] = 0, 1
    fitted = linear.fit(x, y, xv, yv)
    assert fitted.fitted.tolist() == [True, False, True]
    scores = fitted.predict(xv)
    assert np.isnan(scores[:, 1]).all() and not np.isnan(scores[:, [0, 2]]).any()
    assert np.isnan(fitted.thresholds[1:]).all() and not fitted.positive(scores)[:, 1:].any()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scale="z"), "scale 'z'.*standard, unit, raw"),
        (dict(rule="best"), "rule is 'best'"),
        (dict(rule="sensitivity"), "at_least None"),
        (dict(labels=np.zeros(60, np.int32)), "60 training rows with a label, of 1 class"),
        (dict(labels=np.full(60, 7, np.int32), classes=("a", "b")), r"values \[7\]"),
        (dict(labels=np.zeros(59, np.int32)), r"shape \(59,\)"),
        (dict(vectors=np.full((60, DIM), np.inf, np.float32)), r"vectors \[0, 1.* not finite"),
    ],
)
def test_fit_refuses(change, message):
    (x, y), chosen = draw(60), draw(30, seed=1)
    arguments = dict(vectors=x, labels=y, validation_vectors=chosen[0], validation_labels=chosen[1])
    with pytest.raises(ValueError, match=message):
        linear.fit(**(arguments | change))


def test_without_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'medsiglip-jax\[evaluate\]'"):
        linear.fit(*draw(60), *draw(30, seed=1))


# ------------------------------------------------------------------------------------- the product


MADE = Provenance(DIM, "5a1", "big_vision", True, "google/medsiglip-448")


@pytest.fixture(scope="module")
def fitted():
    return linear.fit(*draw(200), *draw(100, seed=1), ["none", "mild", "sévère"], provenance=MADE)


def test_a_saved_probe_is_the_same_probe(fitted, tmp_path):
    fitted.save(tmp_path / "p.npz")
    again = linear.fit(*draw(200), *draw(100, seed=1), fitted.classes, provenance=MADE)
    again.save(tmp_path / "again.npz")
    assert (tmp_path / "p.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    opened = open_probe(tmp_path / "p.npz")
    x = draw(40, seed=2)[0]
    np.testing.assert_array_equal(opened.predict(x), fitted.predict(x))
    np.testing.assert_array_equal(opened.thresholds, fitted.thresholds)
    for name in ("classes", "exclusive", "provenance", "facts"):
        assert getattr(opened, name) == getattr(fitted, name)


def test_the_file_needs_no_pickle(fitted, tmp_path):
    fitted.save(tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz", allow_pickle=False) as file:
        content = {name: file[name] for name in file}
    assert json.loads(str(content["metadata"]))["provenance"]["model"] == "5a1"
    x = draw(5, seed=2)[0].astype(np.float64)  # and is read without us
    logits = (x - content["mean"]) / content["deviation"] @ content["coefficients"].T
    p = np.exp(logits + content["intercepts"])
    np.testing.assert_allclose(
        p / p.sum(axis=1, keepdims=True), fitted.predict(draw(5, seed=2)[0]), rtol=1e-9
    )


def test_open_probe_refuses_what_is_none(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_probe(tmp_path / "p.npz")
    (tmp_path / "text.npz").write_text("not a probe")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", metadata=np.array({}, object))
    fitted.save(tmp_path / "p.npz")
    content = dict(np.load(tmp_path / "p.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "p.npz").read_bytes()[:-200])
    np.savez(tmp_path / "shape.npz", **content | {"mean": np.zeros(3)})
    newer = str(content["metadata"]).replace("probe 1", "probe 2")
    np.savez(tmp_path / "newer.npz", **content | {"metadata": np.array(newer)})
    for name in ("text", "other", "pickle", "cut", "shape", "newer"):
        with pytest.raises(ValueError, match=f"{name}.npz: not a probe"):
            open_probe(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="ends in .npz"):
        fitted.save(tmp_path / "p.pkl")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model="0ff"), "with other, .* google/medsiglip-448: sha256 .*'0ff', wanted '5a1'"),
        (dict(preprocess="serving"), "preprocess is 'serving', wanted 'big_vision'"),
        (dict(normalized=False), "normalized is False, wanted True"),
        (dict(dim=13), "dim is 13, wanted 12"),
    ],
)
def test_predicting_on_embeddings_made_another_way_names_both(fitted, change, message):
    given = dict(dim=DIM, model="5a1", preprocess="big_vision", normalized=True, source="other")
    x = draw(3)[0]
    assert fitted.predict(x, Provenance(**given)).shape == (3, 3)
    with pytest.raises(ValueError, match=message):
        fitted.predict(x, Provenance(**(given | change)))
    with pytest.raises(ValueError, match="dim is 11, wanted 12"):
        fitted.predict(x[:, 1:])
    with pytest.raises(ValueError, match=r"vectors \[1\].* not finite"):
        fitted.predict(np.where(np.arange(3)[:, None] == 1, np.nan, x).astype(np.float32))


def test_what_is_not_known_demands_nothing():
    fine = of_run(
        Manifest(
            model=Weights("m", "5a1"), preprocess="serving", dim=3, normalized=True, parts=[],
            dicom=Rules(volume="ct").to_dict(), expansion=Parts(mpp=0.5).to_dict(),
        )
    )  # fmt: skip
    assert fine.mpp == 0.5
    coarse = replace(fine, mpp=2.0, dicom=Rules(volume="percentile", frame=3).to_dict())
    with pytest.raises(ValueError, match="volume is 'perc.*', wanted 'ct'; mpp is 2.0, wanted 0.5"):
        fine.check(coarse)
    for silent in (replace(fine, mpp=None, dicom=Rules().to_dict()), replace(fine, dicom=None)):
        fine.check(silent)
        silent.check(fine)


# ---------------------------------------------------------------------------------------- the join


def write_run(folder, ids, vectors, errors=0, **changed):
    """What `embed` writes, in parts of 50 rows; the rows are mixed with texts of the same ids."""
    folder.mkdir()
    kinds = ["image"] * len(ids) + ["text"] * 2
    ids, vectors = [*ids, *ids[:2]], np.concatenate([vectors, 0 * vectors[:2]])
    order, parts = np.random.default_rng(0).permutation(len(ids)), []
    for number, start in enumerate(range(0, len(ids), 50)):
        chosen = order[start : start + 50]
        values = pa.array(vectors[chosen].reshape(-1))
        table = pa.table({
            "id": [ids[i] for i in chosen], "source": [ids[i] for i in chosen],
            "kind": [kinds[i] for i in chosen],
            "embedding": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1]),
        })  # fmt: skip
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
        parts.append({"file": f"part-{number:05d}.parquet", "rows": len(chosen)})
    made = {
        "model": {"source": "m", "sha256": "5a1"}, "preprocess": "big_vision", "normalized": True,
        "dim": vectors.shape[1], "errors": errors, "parts": parts, **changed,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(made))
    return Embeddings(folder)


def write_table(path, **columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


GRADES = ("none", "mild", "severe")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """200 images of 50 patients, embedded; labels in another order, a few without one."""
    folder = tmp_path_factory.mktemp("joined")
    vectors, labels = draw(200)
    ids = [f"p{i // 4:02d}/{i}.png" for i in range(200)]
    run = write_run(folder / "run", ids, vectors)
    order = np.random.default_rng(1).permutation(200)
    names = [GRADES[k] if i % 20 else "" for i, k in enumerate(labels)]
    data = write_table(
        folder / "labels.csv", image=[ids[i] for i in order], patient=[i // 4 for i in order],
        label=[names[i] for i in order], finding=[labels[i] % 2 for i in order],
        other=["" if i % 7 == 0 else labels[i] // 2 for i in order],
    )  # fmt: skip
    return data, run, dict(zip(ids, vectors, strict=True)), dict(zip(ids, names, strict=True))


def test_labels_meet_their_vectors(table):
    data, run, vectors, names = table
    found = features.read(data, run)
    assert len(found) == 200 and found.missing == 0
    for id, vector, label in zip(found.examples.images, found.vectors, found.labels, strict=True):
        np.testing.assert_array_equal(vector, vectors[id])
        assert names[id] == ("" if label < 0 else found.examples.classes[label])
    assert found.provenance == Provenance(DIM, "5a1", "big_vision", True, "m")
    part = found.select(found.examples.select([5, 3]))
    np.testing.assert_array_equal(part.vectors, found.vectors[[5, 3]])


def test_labels_of_one_column_or_of_several(table):
    data, run, *_ = table
    assert features.read(data, run).examples.classes == ("mild", "none", "severe")
    assert features.read(data, run, label="label").labels.ndim == 1
    for label in ("finding", ["finding"]):  # only 0 and 1: a finding, not two classes
        found = features.read(data, run, label=label)
        assert found.examples.classes == ("finding",) and found.labels.shape == (200, 1)
    found = features.read(data, run, label=["finding", "other"], group="patient")
    assert found.labels.shape == (200, 2) and np.isnan(found.labels[:, 1]).sum() == 29
    assert len(set(found.examples.groups)) == 50


@pytest.mark.parametrize(
    "columns, how, message",
    [
        (dict(image=["p00/0.png", "x"], label=["a", "b"]), {}, "1 of 2 labels have no embedding"),
        (dict(image=["x", "y"], label=["a", "b"]), {}, "2 of 2 .*the first 'x'.*are like 'p"),
        (dict(file=["x"], label=["a"]), {}, "no column 'image'"),
        (dict(id=["p00/0.png"], label=["a"]), {"label": "grade"}, "no column 'grade'; there are"),
        (dict(id=["p00/0.png"]), {}, "no column 'label'"),
        (dict(id=["p00/0.png"], label=["a"]), {"group": "group"}, "no column 'group'"),
        (dict(id=["p00/0.png"], a=["2"], b=["1"]), {"label": ["a", "b"]}, "expected 0, 1"),
    ],
)
def test_a_wrong_join_counts_what_is_missing(table, tmp_path, columns, how, message):
    with pytest.raises(ValueError, match=message):
        features.read(write_table(tmp_path / "t.csv", **columns), table[1], **how)


def test_images_that_embed_could_not_read_are_left_out_and_counted(tmp_path):
    run = write_run(tmp_path / "run", ["a", "b", "c"], draw(3)[0], errors=1)
    rows = dict(id=["a", "damaged", "c"], label=["x", "y", "x"])
    found = features.read(write_table(tmp_path / "t.csv", **rows), run)
    assert found.examples.images == ["a", "c"] and found.missing == 1


def test_splits_keep_patients_together(table):
    data, run, *_ = table
    found = features.read(data, run, group="patient")
    parts = features.split(found, 0.25, seed=3)
    patients = [set(part.examples.groups) for part in parts[:2]]
    assert not patients[0] & patients[1] and parts.test is None
    assert len(parts.validation) == pytest.approx(50, abs=2)
    again = features.split(found, 0.25, seed=3)
    assert again.train.examples.images == parts.train.examples.images
    assert features.split(found, 0.25, seed=4).train.examples.images != parts.train.examples.images


def with_splits(table, path, split):
    data = read_csv(table[0])
    columns = {name: [row[name] for row in data] for name in data[0]}
    return write_table(path, **columns, split=[split(int(row["patient"])) for row in data])


def test_splits_that_the_table_names(table, tmp_path):
    names = lambda p: "test" if p % 5 == 0 else "dev" if p % 5 == 1 else "train"  # noqa: E731
    found = features.read(with_splits(table, tmp_path / "t.csv", names), table[1], group="patient")
    assert [len(part) for part in features.split(found)] == [120, 40, 40]
    names = lambda p: "test" if p % 5 == 0 else "train"  # noqa: E731
    found = features.read(with_splits(table, tmp_path / "u.csv", names), table[1], group="patient")
    parts = features.split(found)
    assert [len(parts.train), len(parts.validation), len(parts.test)] == [128, 32, 40]
    everyone = [set(part.examples.groups) for part in parts]
    assert not (everyone[0] & everyone[1] or everyone[0] & everyone[2] or everyone[1] & everyone[2])


def test_a_patient_on_both_sides_is_refused(table, tmp_path):
    data = read_csv(table[0])
    columns = {name: [row[name] for row in data] for name in ("image", "patient", "label")}
    splits = ["val" if i % 3 else "train" for i in range(len(data))]
    path = write_table(tmp_path / "t.csv", **columns, split=splits)
    with pytest.raises(ValueError, match="groups are in both"):
        features.split(features.read(path, table[1], group="patient"))


# --------------------------------------------------------------------------------------- the files


def test_fit_and_predict_files(table, tmp_path):
    names = lambda p: "test" if p % 5 == 0 else "val" if p % 5 == 1 else "train"  # noqa: E731
    data = with_splits(table, tmp_path / "t.csv", names)
    run = table[1]
    result = commands.fit(data, run.folder, tmp_path / "p.npz", group="patient")
    json.dumps(result, allow_nan=False)
    assert result["rows"] == {"train": 120, "validation": 40, "test": 40}
    assert result["missing"] == 0 and result["test"]["undefined"] == []
    fitted = open_probe(tmp_path / "p.npz")
    assert fitted.classes == ("mild", "none", "severe")
    parts = features.split(features.read(data, run, group="patient"))
    scores, labels = fitted.predict(parts.test.vectors), parts.test.labels
    known = labels >= 0
    assert result["test"]["macro_auc"] == pytest.approx(
        metrics.macro_auc(scores[known], labels[known])
    )
    severe = result["test"]["classes"]["severe"]
    assert severe["positives"] == (labels == 2).sum() and severe["missing"] == (~known).sum()
    called = scores[known, 2] >= fitted.thresholds[2]
    assert severe["sensitivity"] == called[labels[known] == 2].mean()
    assert severe["low"] < severe["auc"] <= severe["high"]

    for name in ("scores.csv", "scores.parquet"):
        assert commands.predict(fitted, run, tmp_path / name) == 200
    rows = read_csv(tmp_path / "scores.csv")
    stored = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert len(rows) == 200 and list(rows[0]) == ["id", "mild", "none", "severe", "positive"]
    want = dict(zip(table[2], fitted.predict(np.stack(list(table[2].values()))), strict=True))
    for row, other in zip(rows, stored, strict=True):
        p = np.array([float(row[name]) for name in fitted.classes])
        np.testing.assert_allclose(p, want[row["id"]], rtol=1e-12)
        assert [other[name] for name in fitted.classes] == p.tolist() and other["id"] == row["id"]
        called = [n for n, x, t in zip(fitted.classes, p, fitted.thresholds, strict=True) if x >= t]
        assert row["positive"] == other["positive"] == ";".join(called)


def test_the_same_seed_writes_the_same_bytes(table, tmp_path):
    data, run, *_ = table
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        commands.fit(data, run.folder, tmp_path / f"{name}.npz", group="patient", seed=seed)
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c


def test_files_refuse(table, fitted, tmp_path):
    data, run, *_ = table
    with pytest.raises(ValueError, match="ends in .npz"):
        commands.fit(data, run.folder, tmp_path / "p")
    with pytest.raises(ValueError, match=".csv or .parquet"):
        commands.predict(fitted, run, tmp_path / "scores.json")
    other = write_run(tmp_path / "other", ["a"], draw(1)[0], normalized=False, errors=0)
    with pytest.raises(ValueError, match="normalized is False, wanted True"):
        commands.predict(fitted, other, tmp_path / "scores.csv")
    assert not (tmp_path / "scores.csv").exists()
    clash = linear.fit(*draw(60), *draw(30, seed=1), ["id", "b", "c"])
    with pytest.raises(ValueError, match="a class is named id"):
        commands.predict(clash, run, tmp_path / "scores.csv")


def test_images_are_embedded_as_the_probe_demands(checkpoint, pictures, tmp_path):
    model = medsiglip_jax.load(checkpoint)
    run = tmp_path / "run"
    embed(model, inputs.rows([pictures]), run, EmbedOptions("serving", normalize=False))
    ids = [f"{i}.png" if i < 4 else f"sub/{i}.jpg" for i in range(7)]
    data = write_table(
        tmp_path / "t.csv", id=[*ids, "sub/damaged.jpg"], label=list("abababab"),
        split=["train"] * 4 + ["val"] * 4,
    )  # fmt: skip
    result = commands.fit(data, run, tmp_path / "p.npz")
    assert result["missing"] == 1 and result["rows"] == {"train": 4, "validation": 3}
    fitted = open_probe(tmp_path / "p.npz")
    assert fitted.provenance == Provenance(
        16, model.sha256, "serving", False, str(checkpoint), Rules().to_dict()
    )
    results = commands.predict_inputs(fitted, model, [str(pictures)], batch_size=3)
    commands.predict(fitted, Embeddings(run), tmp_path / "s.csv")
    rows = {row["id"]: row for row in read_csv(tmp_path / "s.csv")}
    unreadable = [r for r in results if "error" in r]
    assert len(results) == 8 and [r["image"] for r in unreadable] == [
        str(pictures / "sub/damaged.jpg")
    ]
    for found in results:
        for score in found.get("scores", ()):
            row = rows[found["image"].removeprefix(f"{pictures}/")]
            assert score["probability"] == pytest.approx(float(row[score["class"]]), abs=1e-4)
            assert type(score["positive"]) is bool
    medsiglip_jax.save(medsiglip_jax.init(model.config, seed=1), tmp_path / "other")
    with pytest.raises(ValueError, match="these images: .*model is .*, wanted "):
        commands.predict_inputs(fitted, medsiglip_jax.load(tmp_path / "other"), [str(pictures)])
    with pytest.raises(ValueError, match="fitted to arrays"):
        bare = linear.fit(*draw(60, dim=16), *draw(30, seed=1, dim=16))
        commands.predict_inputs(bare, model, [str(pictures)])
    (tmp_path / "t.txt").write_text("a caption\n")
    with pytest.raises(ValueError, match="a probe scores images"):
        commands.predict_inputs(fitted, model, [str(tmp_path / "t.txt")])


# --------------------------------------------------------------------------------------- learning


def test_learning_curves_rise():
    parts = draw(1500, 4), draw(200, 4, seed=1), draw(400, 4, seed=2)
    seen = []
    rows = learning.learning_curve(
        *parts, sizes=(16, 128, 9999), seeds=(0, 1, 2), on_row=seen.append
    )
    assert rows == seen == learning.learning_curve(*parts, sizes=(16, 128, 9999), seeds=(0, 1, 2))
    known = [{**row, "auc": 2.0} for row in rows[:2]]  # is believed, and not computed again
    again = learning.learning_curve(*parts, sizes=(16, 128), seeds=(0, 1, 2), done=known)
    assert again == [*known, *rows[2:]]
    assert [(row["n"], row["seed"]) for row in rows] == [
        *((16, s) for s in range(3)), *((128, s) for s in range(3)), (1500, 0),
    ]  # fmt: skip
    few, more, full = (np.mean([r["auc"] for r in rows if r["n"] == n]) for n in (16, 128, 1500))
    assert few + 0.02 < more < full - 0.003
    fitted = linear.fit(*parts[0], *parts[1])
    want = metrics.macro_auc(fitted.predict(parts[2][0]), parts[2][1])
    assert rows[-1]["auc"] == pytest.approx(want, abs=1e-12)
    assert rows[-1]["undefined"] == []


def test_learning_lists_what_a_draw_lacks():
    (x, y), chosen, test = findings(300), findings(100, seed=1), findings(100, seed=2)
    y[:, 1] = 0
    y[7, 1] = 1
    for method in learning.METHODS:
        rows = learning.learning_curve(
            LabelledVectors(x, y), chosen, test, sizes=(30,), seeds=(1,), method=method
        )
        assert rows[0]["undefined"] == [1] and 0.4 < rows[0]["auc"] <= 1
        assert rows[1]["undefined"] == []
    one = LabelledVectors(draw(40).vectors, np.zeros(40, np.int32))
    (row,) = learning.learning_curve(one, draw(30), draw(30), sizes=())
    assert row["auc"] is None and row["undefined"] == [0, 1, 2]
    with pytest.raises(ValueError, match="method is 'svm'"):
        learning.learning_curve(LabelledVectors(x, y), chosen, test, method="svm")


def test_nearest_neighbours_are_those_of_sklearn():
    (x, y), (xt, _) = draw(300), draw(700, seed=1)
    x, xt = x - 5, xt - 5
    model = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(x.astype(float), y)
    want = model.predict_proba(xt.astype(float))
    found = learning.nearest(
        LabelledVectors(x, y), LabelledVectors(x, y), LabelledVectors(xt, y), 3
    )
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    assert learning.nearest(
        LabelledVectors(x[:5], y[:5]), LabelledVectors(x, y), LabelledVectors(xt, y), 3
    ).shape == (700, 3)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_of_equally_near_neighbours_the_first_are_taken(k):
    """As a stable sort does; there are 27 different vectors."""
    rng = np.random.default_rng(0)
    x, xt = (rng.integers(-1, 2, size=(n, 3)).astype(np.float32) for n in (200, 60))
    x, xt, y = x + 0.5, xt + 0.5, rng.integers(2, size=(200, 1)).astype(np.float32)
    order = np.argsort(-(scaling.unit(xt) @ scaling.unit(x).T), axis=1, kind="stable")[:, :k]
    want = y[order, 0].mean(axis=1, dtype=float)
    found = learning.nearest(
        LabelledVectors(x, y), LabelledVectors(x, y), LabelledVectors(xt, y[:60]), 1, k
    )
    np.testing.assert_array_equal(found[:, 0], want)


def test_neighbours_are_picked_not_sorted(monkeypatch):
    monkeypatch.setattr(np, "argsort", None)  # of 86,524 training rows, 8 times as slow
    parts = draw(300), draw(10, seed=1), draw(50, seed=2)
    assert learning.nearest(*parts, 3).shape == (50, 3)


def test_neighbours_without_a_label_have_no_vote():
    x = np.eye(4, dtype=np.float32)
    y = np.array([[1], [np.nan], [0], [0]], np.float32)
    near = learning.nearest(
        LabelledVectors(x, y), LabelledVectors(x, y), LabelledVectors(x[:2], y[:2]), 1, k=1
    )
    np.testing.assert_allclose(near, [[1], [1 / 3]])


def test_prototypes_by_hand():
    x = np.array([[3, 0], [0, 1], [0, 5]], np.float32)
    y = np.array([0, 1, 1], np.int32)
    test = np.array([[1, 1], [-2, 0]], np.float32)
    found = learning.prototypes(
        LabelledVectors(x, y), LabelledVectors(x, y), LabelledVectors(test, y[:2]), 3
    )
    r = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[r, r, -1], [-1, 0, -1]], atol=1e-7)


def test_few_shots():
    labels = np.array([0] * 50 + [1] * 3 + [-1] * 7, np.int32)
    rows = learning.draw_per_class(labels, 5, seed=0)
    assert np.bincount(labels[rows]).tolist() == [5, 3]
    assert (rows == learning.draw_per_class(labels, 5, 0)).all()
    assert (rows != learning.draw_per_class(labels, 5, 1)).any()
    matrix = np.array([[0, 1], [0, np.nan], [1, 0], [0, 0]], np.float32)
    assert 2 <= len(learning.draw_per_class(matrix, 1, 0)) <= 4
    parts = draw(600, 4), draw(200, 4, seed=1), draw(400, 4, seed=2)
    parts = [LabelledVectors(x - 5, y) for x, y in parts]
    found = learning.few_shot(*parts, shots=(1, 32), seeds=range(4))
    assert len(found) == 8 and set(found[0]) == {"method", "shots", "seed", "auc", "undefined"}
    one, many = (np.mean([r["auc"] for r in found if r["shots"] == k]) for k in (1, 32))
    assert 0.5 < one < many - 0.05
