"""The approximate index, and its recall."""

import hashlib
import json
import random
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
from embedding_runs import write_run

from medsiglip_jax.embeddings import index
from medsiglip_jax.embeddings.nearest import top_k
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.files.locks import lock

X = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)


def test_the_index_and_what_it_misses(tmp_path):
    pytest.importorskip("usearch")
    x = X.copy()
    x[5], x[6] = 0, np.nan
    kinds = ["text" if i < 20 else "image" for i in range(600)]
    folder = write_run(tmp_path / "run", np.split(x, [200]), kinds)
    with pytest.raises(FileNotFoundError, match="--build-index"):
        index.top_k(x[30:31], Embeddings(folder), 5)
    facts = index.build(Embeddings(folder))
    assert facts == json.loads((folder / index.FACTS).read_text())
    assert facts["rows"] == 580 and 0.9 < facts["recall_at_10"] <= 1
    scores, rows = index.top_k(x[30:40], Embeddings(folder), 5)
    want_scores, want = top_k(x[30:40], Embeddings(folder), 5)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(rows, want, strict=True)]) > 4
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-3)
    np.testing.assert_allclose(scores[rows == want], want_scores[rows == want], atol=1e-3)
    with pytest.raises(ValueError, match="or of kind image; build it again .*--kind any"):
        index.top_k(x[:1], Embeddings(folder, "any"), 5)
    write_run(folder, [x[:599]], kinds)
    with pytest.raises(ValueError, match="embeddings that have changed since"):
        index.top_k(x[30:31], Embeddings(folder), 5)


def record_of(folder, content, **changed):
    """Writes the record of an index of a run of `write_run`, and the file that it is of."""
    (folder / index.INDEX).write_bytes(content)
    record = {
        "recall_at_10": 1.0, "sampled": 100, "rows": 600, "kind": "image", "parameters": {},
        "left_out": {"rows": 0, "first": []}, "manifest_sha256": Embeddings(folder).digest,
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "usearch": "2.26",
    }  # fmt: skip
    (folder / index.FACTS).write_text(json.dumps(record | changed))


def test_of_two_builders_one_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", [X])
    with lock(folder / ".index.lock"), pytest.raises(FileExistsError, match="another run"):
        index.build(Embeddings(folder))


class Cut:
    """An index of 3,000 bytes, of which usearch writes as many as fit, with a word or without."""

    serialized_length = 3000

    def __init__(self, fits, told):
        self.fits, self.told = fits, told

    def save(self, path):
        Path(path).write_bytes(bytes(self.fits))
        if self.told:
            raise RuntimeError("Failed to serialize into stream")


@pytest.mark.parametrize("told", [False, True])
def test_an_index_that_does_not_fit_the_disk_is_an_error(tmp_path, monkeypatch, told):
    index._save(Cut(3000, False), tmp_path / "whole")
    with pytest.raises(OSError, match="Input/output error"):  # there is room again
        index._save(Cut(2000, told), tmp_path / "cut")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would keep the first bytes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            index._save(Cut(2000, told), tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_index_that_was_not_built_here_is_never_opened(tmp_path):
    """usearch trusts what it opens: such files ended the process. Each is one line before that,
    with nothing but the record and the bytes, so that usearch is not asked."""
    folder, rng = write_run(tmp_path / "run", [X]), random.Random(0)
    whole = rng.randbytes(5000)
    record_of(folder, whole)
    file = folder / index.INDEX

    def changed():
        data = bytearray(whole)
        for _ in range(rng.randint(1, 50)):
            data[rng.randrange(len(data))] ^= rng.randint(1, 255)
        return bytes(data)

    others = [changed() for _ in range(50)]
    for content in (*others, whole[:-1], whole + b"x", b"", b"hello", whole[::-1]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{file}: missing, damaged or .* --kind image"):
            index.top_k(X[:1], Embeddings(folder), 5)
    file.unlink()
    for make in (lambda: None, file.mkdir):
        make()
        with pytest.raises(ValueError, match=f"^{file}: missing, damaged"):
            index.top_k(X[:1], Embeddings(folder), 5)


def test_a_damaged_record_is_one_line(tmp_path):
    """What ever is in it: other types, deep nesting, no JSON, a record of an earlier version."""
    folder, rng = write_run(tmp_path / "run", [X]), random.Random(0)
    record_of(folder, b"index")
    path, whole = folder / index.FACTS, (folder / index.FACTS).read_bytes()
    row = {"id": "a", "file": "b"}
    for say, content in (
        ("record lacks left_out, kind, .* sha256", b'{"recall_at_10": 1, "rows": 5, "sampled": 5}'),
        ("it holds a list", b"[]"),
        ("nested too deeply", b"[" * 100_000),
        ("codec can't decode", b"\xff\x00"),
        ("kind is 'video'; expected one of", whole.replace(b'"image"', b'"video"')),
        ("bytes is '5'; expected int", whole.replace(b'"bytes": 5', b'"bytes": "5"')),
        ("record lacks sha256", json.dumps(json.loads(whole) | {"sha256": None}).encode()),
        ("left_out: 5 rows are left out, and 0", whole.replace(b'{"rows": 0', b'{"rows": 5')),
        ("recall_at_10 is nan", whole.replace(b"1.0", b"NaN")),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: .*{say}.*build it again") as raised:
            index.top_k(X[:1], Embeddings(folder), 5)
        assert "\n" not in str(raised.value)
    record_of(folder, b"index", left_out={"rows": 2, "first": [row]})
    assert index.read_record(Embeddings(folder)).left_out.first[0].file == "b"
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert isinstance(index.read_record(Embeddings(folder)), index.IndexRecord)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_an_index_whose_record_was_changed_along_is_one_line(tmp_path):
    pytest.importorskip("usearch")
    folder = write_run(tmp_path / "run", [X])
    index.build(Embeddings(folder))
    other = index._new(16)
    other.add(np.arange(600) + 10**9, X)
    small = index._new(8)
    small.add(np.arange(600), X[:, :8])
    for content, say in ((other, "row .* of 600"), (small, "dim"), (b"x" * 100, "usearch 2")):
        if not isinstance(content, bytes):
            content.save(str(tmp_path / "other"))
            content = (tmp_path / "other").read_bytes()
        record_of(folder, content)
        with pytest.raises(ValueError, match=f"^{folder / index.INDEX}: .*{say}.*build it again"):
            index.top_k(X[:1], Embeddings(folder), 5)
