"""`probe fit` and `probe predict`, from tables to tables."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from embedding_runs import draw, read_csv, with_splits, write_labelled_run, write_table

import medsiglip_jax
from medsiglip_jax import metrics
from medsiglip_jax.data import inputs
from medsiglip_jax.embeddings.probe import features, fitting, linear, prediction
from medsiglip_jax.embeddings.probe.linear import open_probe
from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.model.config import PixelConfig
from medsiglip_jax.preprocess.dicom.rules import Rules


def test_fit_and_predict_files(table, tmp_path):
    names = lambda p: "test" if p % 5 == 0 else "val" if p % 5 == 1 else "train"  # noqa: E731
    data = with_splits(table, tmp_path / "t.csv", names)
    run = table[1]
    result = fitting.fit(data, run.folder, tmp_path / "p.npz", group="patient")
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
        assert prediction.predict(fitted, run, tmp_path / name) == 200
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


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0])
def test_embeddings_without_a_direction_are_named(bad, fitted, tmp_path):
    """Also in several parts; predict reads parts of 50 rows."""
    vectors, labels = draw(140)
    vectors[[17, 80, 120]] = bad
    ids = [f"{i}.png" for i in range(140)]
    run = write_labelled_run(tmp_path / "run", ids, vectors)
    data = write_table(tmp_path / "labels.csv", image=ids, label=[f"c{k}" for k in labels])
    say = r"3 embeddings are null, zero or not finite, the first is of \d+\.png in part-0000\d.par"
    with pytest.raises(ValueError, match=say):
        fitting.fit(data, run.folder, tmp_path / "p.npz")
    with pytest.raises(ValueError, match=say):
        prediction.predict(fitted, run, tmp_path / "scores.csv")
    assert not (tmp_path / "p.npz").exists() and not (tmp_path / "scores.csv").exists()


def test_the_same_seed_writes_the_same_bytes(table, tmp_path):
    data, run, *_ = table
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fitting.fit(data, run.folder, tmp_path / f"{name}.npz", group="patient", seed=seed)
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c


def test_files_refuse(table, fitted, tmp_path):
    data, run, *_ = table
    with pytest.raises(ValueError, match="ending in .npz"):
        fitting.fit(data, run.folder, tmp_path / "p")
    with pytest.raises(ValueError, match=".csv or .parquet"):
        prediction.predict(fitted, run, tmp_path / "scores.json")
    other = write_labelled_run(tmp_path / "other", ["a"], draw(1)[0], normalized=False, errors=0)
    with pytest.raises(ValueError, match="normalized is False, wanted True"):
        prediction.predict(fitted, other, tmp_path / "scores.csv")
    assert not (tmp_path / "scores.csv").exists()
    clash = linear.fit(*draw(60), *draw(30, seed=1), ["id", "b", "c"])
    with pytest.raises(ValueError, match="a class is named id"):
        prediction.predict(clash, run, tmp_path / "scores.csv")


def test_images_are_embedded_as_the_probe_demands(checkpoint, pictures, tmp_path):
    model = medsiglip_jax.load(checkpoint)
    run = tmp_path / "run"
    embed(model, inputs.rows([pictures]), run, EmbedOptions("serving", normalize=False))
    ids = [f"{i}.png" if i < 4 else f"sub/{i}.jpg" for i in range(7)]
    data = write_table(
        tmp_path / "t.csv", id=[*ids, "sub/damaged.jpg"], label=list("abababab"),
        split=["train"] * 4 + ["val"] * 4,
    )  # fmt: skip
    result = fitting.fit(data, run, tmp_path / "p.npz")
    assert result["missing"] == 1 and result["rows"] == {"train": 4, "validation": 3}
    fitted = open_probe(tmp_path / "p.npz")
    assert fitted.provenance == Provenance(
        16, model.sha256, "serving", False, str(checkpoint), Rules().to_dict(),
        pixels=PixelConfig().to_dict(),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="skipped other files .*: .md 1"):
        results = prediction.predict_inputs(fitted, model, [str(pictures)], batch_size=3)
    (pictures / "notes.md").unlink()
    prediction.predict(fitted, Embeddings(run), tmp_path / "s.csv")
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
        prediction.predict_inputs(fitted, medsiglip_jax.load(tmp_path / "other"), [str(pictures)])
    with pytest.raises(ValueError, match="fitted to arrays"):
        bare = linear.fit(*draw(60, dim=16), *draw(30, seed=1, dim=16))
        prediction.predict_inputs(bare, model, [str(pictures)])
    (tmp_path / "t.txt").write_text("a caption\n")
    with pytest.raises(ValueError, match="a probe scores images"):
        prediction.predict_inputs(fitted, model, [str(tmp_path / "t.txt")])
