"""Embedding files: every row accounted for, resumable, never half written."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

import medsiglip_jax
from medsiglip_jax import locks, manifest
from medsiglip_jax.embed import ERRORS, MANIFEST, Options, embed


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


def read(folder):
    return pq.ParquetDataset(sorted(folder.glob("part-*.parquet"))).read().to_pylist()


def test_rows_of_folders_and_files(pictures, tmp_path):
    rows = manifest.rows([pictures])
    names = ["0.png", "1.png", "2.png", "3.png"]
    names += ["sub/4.jpg", "sub/5.jpg", "sub/6.jpg", "sub/damaged.jpg"]
    assert [row.id for row in rows] == names
    assert all(row.kind == "image" and os.path.isfile(row.source) for row in rows)
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    texts = manifest.rows([tmp_path / "a.txt", pictures / "notes.md"])
    assert [(r.id, r.kind, r.text) for r in texts] == [
        ("a.txt:1", "text", "one"), ("a.txt:3", "text", "two"), ("notes.md", "image", None)
    ]  # fmt: skip
    both = manifest.rows([pictures / "sub", pictures / "sub" / "4.jpg"][:1] + [pictures])
    assert len({row.id for row in both}) == len(both)


def test_rows_refuse_what_cannot_be_meant(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to embed in .*empty"):
        manifest.rows([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="no/where"):
        manifest.rows([pictures, "no/where"])
    with pytest.raises(ValueError, match="0.png is given twice"):
        manifest.rows([pictures / "0.png", pictures / "0.png"])


def test_embeddings_are_those_of_the_model(model, pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("photo of a b\nscan of a c\n")
    rows = manifest.rows([pictures, tmp_path / "notes.txt"])
    done = []
    options = Options(batch_size=3, shard_size=4)
    out = tmp_path / "out"
    result = embed(model, rows, out, options, done.append)
    assert sum(done) == len(rows) == 10
    table = read(out)
    assert [row["id"] for row in table] == [r.id for r in rows if "damaged" not in r.id]
    assert [row["kind"] for row in table] == ["image"] * 7 + ["text"] * 2
    images = [r["source"] for r in table if r["kind"] == "image"]
    want = model.encode_image(model.processor.images(images))
    got = np.array([r["embedding"] for r in table], np.float32)
    np.testing.assert_allclose(got[:7], want, atol=1e-6)
    texts = model.processor.texts(["photo of a b", "scan of a c"])
    np.testing.assert_allclose(got[7:], model.encode_text(texts), atol=1e-6)
    schema = pq.read_schema(out / "part-00000.parquet")
    assert schema.names == ["id", "source", "kind", "embedding"]
    assert str(schema.field("embedding").type) == "fixed_size_list<element: float>[16]"
    errors = pq.read_table(out / ERRORS).to_pylist()
    assert len(errors) == 1 and errors[0]["source"].endswith("damaged.jpg")
    assert "truncated" in errors[0]["reason"].lower()
    assert result["embedded"] == 9 and result["errors"] == 1 and result["rows"] == 10
    assert result["model"]["sha256"] == model.sha256 and result["preprocess"] == "big_vision"
    assert json.loads((out / MANIFEST).read_text()) == result
    assert sorted(p.name for p in out.iterdir()) == [
        "errors.parquet", "manifest.json", "part-00000.parquet", "part-00001.parquet",
        "part-00002.parquet", "run.json",
    ]  # fmt: skip


def test_raw_embeddings_keep_their_length(model, pictures, tmp_path):
    rows = manifest.rows([pictures / "0.png"])
    embed(model, rows, tmp_path / "raw", Options(normalize=False))
    vector = np.array(read(tmp_path / "raw")[0]["embedding"])
    assert abs(np.linalg.norm(vector) - 1) > 1e-3


def test_a_finished_run_is_returned_and_another_is_refused(model, pictures, tmp_path):
    rows = manifest.rows([pictures])
    out = tmp_path / "out"
    first = embed(model, rows, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert embed(model, rows, out) == first
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    for other_rows, options in ((rows[1:], Options()), (rows, Options(preprocess="serving"))):
        with pytest.raises(FileExistsError, match="another run .*differ"):
            embed(model, other_rows, out, options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("x")
    with pytest.raises(FileExistsError, match="not an embedding run"):
        embed(model, rows, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.doc"]


def test_two_runs_on_one_folder(model, pictures, tmp_path):
    out = tmp_path / "out"
    with locks.lock(out / ".lock"), pytest.raises(FileExistsError, match="another run"):
        embed(model, manifest.rows([pictures]), out)


def test_an_interrupted_run_resumes_where_it_stopped(model, pictures, tmp_path):
    rows = manifest.rows([pictures])
    embed(model, rows, tmp_path / "whole", Options(shard_size=2))

    class Stop(Exception):
        pass

    def stop(count, seen=[]):  # noqa: B006
        seen.append(count)
        if sum(seen) == 5:
            raise Stop

    options = Options(shard_size=2, batch_size=1)
    with pytest.raises(Stop):
        embed(model, rows, tmp_path / "out", options, stop)
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == ["part-00000.parquet", "part-00001.parquet", "run.json"]
    stamps = [(tmp_path / "out" / n).stat().st_mtime_ns for n in left]
    embed(model, rows, tmp_path / "out", Options(shard_size=2))
    assert stamps == [(tmp_path / "out" / n).stat().st_mtime_ns for n in left[:2]] + stamps[2:]
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "out")
    for a, b in zip(whole, resumed, strict=True):
        np.testing.assert_allclose(a.pop("embedding"), b.pop("embedding"), atol=1e-6)
        assert a == b


@pytest.mark.slow
@pytest.mark.torture
def test_kill_9_at_any_time_loses_no_finished_shard(checkpoint, pictures, tmp_path, torture):
    """Kills at random times, then the same command to the end."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "medsiglip_jax.cli", "embed", "--model", str(checkpoint)]
    command += ["--output", str(out), "--shard-size", "1", "--batch-size", "1", str(pictures)]
    for delay in np.random.default_rng(0).uniform(2, 12, 5 * torture):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for part in out.glob("part-*.parquet"):
            assert pq.read_metadata(part).num_rows in (0, 1)
    assert subprocess.run(command, capture_output=True).returncode == 3
    assert len(read(out)) == 7 and (out / MANIFEST).is_file()


def test_options_are_checked():
    with pytest.raises(ValueError, match="batch_size is 0"):
        Options(batch_size=0)
    with pytest.raises(ValueError, match="big_vision, huggingface, serving"):
        Options(preprocess="imagenet")
