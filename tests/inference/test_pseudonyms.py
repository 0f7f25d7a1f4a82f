"""Pseudonyms: hashes under a key that stays on this machine, columns of them, groups by them."""

import hashlib
import hmac
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
from dicom_files import made
from PIL import Image

import medsiglip_jax
from medsiglip_jax.data import inputs
from medsiglip_jax.embeddings import store
from medsiglip_jax.embeddings.probe import features
from medsiglip_jax.inference import pseudonyms
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.preprocess.facts import Subject
from medsiglip_jax.preprocess.parts import Parts

SALT = "0123456789abcdef-of-the-tests"


@pytest.fixture
def salted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv(pseudonyms.VARIABLE, SALT)


@pytest.fixture
def studies(tmp_path):
    """Two patients, of whom one has two series; a picture, and a file that says nothing."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n, (patient, study, series) in enumerate([("p1", "1.1", "1.1.1"), ("p1", "1.1", "1.1.2"),
                                                  ("p2", "1.2", "1.2.1")]):  # fmt: skip
        tags = {"PatientID": patient, "StudyInstanceUID": study, "SeriesInstanceUID": series}
        (folder / f"{n}.dcm").write_bytes(made(np.full((5, 5), n, np.uint8), **tags))
    Image.new("RGB", (4, 4)).save(folder / "3.png")
    (folder / "4.dcm").write_bytes(made(np.zeros((5, 5), np.uint8)))
    return folder


def columns_of(folder):
    return pq.read_table(folder / "part-00000.parquet").drop_columns(["embedding"]).to_pylist()


def test_columns_of_patients(studies, checkpoint, tmp_path, salted, monkeypatch):
    model, rows = medsiglip_jax.load(checkpoint), inputs.rows([studies])
    plain = embed(model, rows, tmp_path / "plain", EmbedOptions())
    assert plain.identifiers is None and "patient" not in columns_of(tmp_path / "plain")[0]
    kept = embed(model, rows, tmp_path / "kept", EmbedOptions(identifiers="kept"))
    assert kept.identifiers == "as in the files"
    found = columns_of(tmp_path / "kept")
    assert list(found[0]) == ["id", "source", "kind", "patient", "study", "series"]
    assert [tuple(row.values())[3:] for row in found] == [
        ("p1", "1.1", "1.1.1"), ("p1", "1.1", "1.1.2"), ("p2", "1.2", "1.2.1"), (None,) * 3,
        (None,) * 3,
    ]  # fmt: skip
    hashed = EmbedOptions(identifiers="hashed")
    manifest_ = embed(model, rows, tmp_path / "hashed", hashed)
    first, again, other, *none = (tuple(r.values())[3:] for r in columns_of(tmp_path / "hashed"))
    assert first[:2] == again[:2] and first[2] != again[2] and set(first).isdisjoint(other)
    assert none == [(None,) * 3] * 2
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in first)
    for path in (tmp_path / "hashed").iterdir():
        assert SALT.encode() not in path.read_bytes()
    assert embed(model, rows, tmp_path / "hashed", hashed) == manifest_
    monkeypatch.setenv(pseudonyms.VARIABLE, SALT + "!")
    with pytest.raises(FileExistsError, match="identifiers differ"):
        embed(model, rows, tmp_path / "hashed", hashed)


def test_a_probe_is_split_by_patients_of_the_embeddings(studies, checkpoint, tmp_path, salted):
    rows = inputs.rows([studies])
    embed(medsiglip_jax.load(checkpoint), rows, tmp_path / "e", EmbedOptions(identifiers="hashed"))
    (tmp_path / "l.csv").write_text("id,label\n" + "".join(f"{r.id},{r.id > '1'}\n" for r in rows))
    run = store.Embeddings(tmp_path / "e")
    with pytest.warns(UserWarning, match="^2 of 5 rows have no patient and are grouped by file$"):
        found = features.read(tmp_path / "l.csv", run, label="label", group="patient")
    groups = dict(zip(found.examples.names, found.examples.groups or (), strict=True))
    assert groups["0.dcm"] == groups["1.dcm"] != groups["2.dcm"] and len(groups["2.dcm"]) == 16
    assert groups["3.png"] == f"file {studies}/3.png" != groups["4.dcm"]
    with pytest.raises(ValueError, match="no column 'ward'"):
        features.read(tmp_path / "l.csv", run, label="label", group="ward")
    (tmp_path / "l.csv").write_text("id,label,patient\n0.dcm,a,x\n2.dcm,b,y\n")
    own = features.read(tmp_path / "l.csv", run, label="label", group="patient")
    assert own.examples.groups == ["x", "y"]  # the table's own come first


def test_parts_of_a_file_without_a_patient_are_of_one_group(studies, checkpoint, tmp_path, salted):
    cine = made(np.zeros((3, 5, 5), np.uint8), NumberOfFrames="3", Modality="US")
    (studies / "4.dcm").write_bytes(cine)
    rows = inputs.rows([studies], parts=Parts("all"))
    embed(medsiglip_jax.load(checkpoint), rows, tmp_path / "e", EmbedOptions(identifiers="hashed"))
    run, table = store.Embeddings(tmp_path / "e"), tmp_path / "l.csv"
    lines = [f"{row.id},{n % 2}\n" for n, row in enumerate(rows)]
    table.write_text("id,label\n" + "".join(lines))
    with pytest.warns(UserWarning, match="^4 of 7 rows have no patient"):
        found = features.read(table, run, label="label", group="patient")
    groups = dict(zip(found.examples.names, found.examples.groups or (), strict=True))
    assert len({groups[f"4.dcm#frame={n}"] for n in range(3)}) == 1
    assert len(set(groups.values())) == 4  # two patients, the picture, and this
    table.write_text("id,label\n" + "".join(lines[-3:]))
    with pytest.raises(ValueError, match="e: none of 3 rows has a study"):
        features.read(table, run, label="label", group="study")


def test_hashes_are_hmac_and_differ_by_key_and_by_kind():
    subject = Subject("123", "123", "")
    found = pseudonyms.Naming(SALT.encode())(subject)
    want = hmac.new(SALT.encode(), b"patient:123", hashlib.sha256).hexdigest()[:16]
    assert found[0] == want and found[1] != want and found[2] is None
    assert pseudonyms.Naming(b"another key of some length")(subject)[0] != want
    assert "123" not in repr(subject)


def test_the_key_is_made_once_and_is_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(pseudonyms.VARIABLE, raising=False)
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: pseudonyms.key(), range(32)))
    path = tmp_path / "config" / "medsiglip_jax" / "key"
    assert keys == {path.read_bytes()} and len(path.read_bytes()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["key"]
    with pytest.raises(ValueError, match="MEDSIGLIP_JAX_SALT is not set; set it to the same"):
        pseudonyms.key(alone=False)
    path.write_text("short")
    with pytest.raises(ValueError, match="not a key; restore"):
        pseudonyms.key()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="file/medsiglip_jax/key: .*; set MEDSIGLIP_JAX_SALT"):
        pseudonyms.key()
    monkeypatch.setenv(pseudonyms.VARIABLE, "short")
    with pytest.raises(ValueError, match="has 5 characters; expected at least 16"):
        pseudonyms.key()
    monkeypatch.setenv(pseudonyms.VARIABLE, SALT)
    assert pseudonyms.key() == pseudonyms.key(alone=False) == SALT.encode()
