"""Vectors that another program made: each format gives what a run of embed gives."""

import csv
import json
import pickle
import re
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_runs import draw, read_csv, write_labelled_run, write_table

from medsiglip_jax import cli
from medsiglip_jax.embeddings import store
from medsiglip_jax.embeddings.elsewhere import found, open_embeddings
from medsiglip_jax.embeddings.elsewhere.formats import FORMATS
from medsiglip_jax.embeddings.search import search
from medsiglip_jax.evaluate import image_embeddings
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.files import limits
from medsiglip_jax.trust.monitor import images as monitored

pytestmark = pytest.mark.filterwarnings("default")


def save_npz(path, ids, x):
    np.savez_compressed(path, ids=np.array(ids), Embeddings=x, labels=np.arange(len(x)) % 2)


def save_paths_npz(path, ids, x):
    with open(path, "wb") as file:
        np.savez(file, z=x.astype(np.float64), file_names=np.array([i.encode() for i in ids]))


def save_npy(path, ids, x):
    np.save(path, np.asfortranarray(x))
    path.with_suffix(".txt").write_text("\n".join(ids))


def save_h5(path, ids, x):
    with h5py.File(path, "w") as file:
        file["a/features"], file["a/paths"], file["mean"] = x, ids, x[0]


def save_chunked_h5(path, ids, x):
    with h5py.File(path, "w") as file:
        file.create_dataset("v", data=x, chunks=(2, x.shape[1]), compression="gzip")
        file["image_id"] = np.char.encode(np.array(ids), "utf-8")


def save_parquet(path, ids, x):
    columns = {"vector": x.tolist(), "image_path": ids, "score": x[:, 0]}
    pq.write_table(pa.table(columns), path, row_group_size=2)


def save_fixed_parquet(path, ids, x):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    pq.write_table(pa.table({"name": ids, "v": vectors, "kind": ["image"] * len(x)}), path)


def save_csv(path, ids, x):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "grade", "embedding"])
        writer.writerows([i, "a", json.dumps(v.tolist())] for i, v in zip(ids, x, strict=True))


def save_json_lines(path, ids, x):
    rows = [{"id": i, "embedding": v.tolist()} for i, v in zip(ids, x, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))


def vertex(ids, x):
    """Lines of a batch prediction of MedSigLIP; one image could not be read, one is a text."""
    answers = ({"embedding": v.tolist(), "input_type": "image", "model_temperature": 4.7,
                "model_bias": -16.2} for v in x)  # fmt: skip
    lines = [({"image": {"gcs_uri": i}}, a) for i, a in zip(ids, answers, strict=True)]
    error = {"error": {"code": "HTTP_ERROR", "description": "no"}}
    lines.insert(1, ({"image": {"gcs_uri": "gs://b/bad.png"}}, error))
    return [json.dumps({"instance": i, "prediction": a}) + "\n" for i, a in lines]


def save_vertex(path, ids, x):
    path.write_text("".join(vertex(ids, x)))


def save_vertex_folder(path, ids, x):
    path.mkdir()
    lines = vertex(ids, x)
    (path / "prediction.results-00000-of-00002").write_text("".join(lines[:3]))
    (path / "prediction.results-00001-of-00002").write_text("".join(lines[3:]))
    (path / "prediction.errors_stats-00000-of-00001").write_text("{}")


FORMS = {
    "a.npz": save_npz, "b.NPZ": save_paths_npz, "c.npy": save_npy, "d.h5": save_h5,
    "e.hdf5": save_chunked_h5, "f.parquet": save_parquet, "g.pq": save_fixed_parquet,
    "h.csv": save_csv, "i.jsonl": save_json_lines, "j.jsonl": save_vertex,
    "prediction.results-00000-of-00001": save_vertex, "k": save_vertex_folder,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_vectors_and_their_names(tmp_path, name, recwarn):
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    ids = [f"p{i % 2}/Ä {i}.png" for i in range(5)]
    FORMS[name](tmp_path / name, ids, x)
    embeddings = open_embeddings(tmp_path / name)
    assert len(embeddings) == 5 and embeddings.dim == 6 and not embeddings.normalized
    np.testing.assert_array_equal(np.concatenate([b.vectors for b in embeddings.blocks()]), x)
    assert [row["id"] for row in embeddings.names(range(5))] == ids
    assert [row["source"] for row in embeddings.ids([4, 0])] == [ids[4], ids[0]]
    np.testing.assert_array_equal(embeddings.gather(np.array([3, 1])), x[[3, 1]])
    (warning,) = recwarn
    said = str(warning.message)
    assert said.startswith(f"{tmp_path / name}: 5 vectors of 6 numbers, not of length 1")
    assert "is not recorded" in said and "\n" not in said
    assert ("1 more have none, the first gs://b/bad.png" in said) == (FORMS[name] in (
        save_vertex, save_vertex_folder))  # fmt: skip


def test_every_row_of_the_table_is_tested():
    readers = {f.reader for f in FORMATS for name in FORMS
               if re.fullmatch(f.names, name.lower())}  # fmt: skip
    assert readers == {format.reader for format in FORMATS}


@pytest.mark.parametrize(("dtype", "unit"), [(np.float16, True), (np.float32, True), (None, False)])
def test_whether_vectors_have_length_1_is_measured(tmp_path, dtype, unit, recwarn):
    x = np.random.default_rng(0).normal(size=(50, 1152))
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if unit else x
    x[7] = 0  # has no direction, and says nothing
    np.savez(tmp_path / "v.npz", x=x.astype(dtype or np.float32), id=np.arange(50))
    embeddings = open_embeddings(tmp_path / "v.npz")
    assert embeddings.normalized is unit
    assert ("all of length 1" in str(recwarn[0].message)) is unit


def test_instances_of_vertex_are_named(tmp_path):
    made = {"embedding": [1.0, 0.0]}
    patch = {"x_origin": 2, "y_origin": 3, "width": 4, "height": 5}
    lines = [
        ({"image": {"image_url": "https://u:p@h/a.png?X-Goog-Signature=secret"}}, made),
        ({"image": {"image_url": {"url": "https://h/b.png"}}}, made),
        ({"image": {"input_bytes": "AAAA"}}, made),
        ({"text": "a scan"}, made),
        ({"image": {"dicomweb_uri": "https://h/studies/1/series/2/instances/3"},
          "access_credential": "secret"},
         {"patch_embeddings": [{**made, "patch_coordinate": patch}]}),
    ]  # fmt: skip
    path = tmp_path / "v.jsonl"
    path.write_text("".join(json.dumps({"instance": i, "prediction": p}) + "\n" for i, p in lines))
    named = open_embeddings(path, "any").ids(range(5))
    assert [row["id"] for row in named] == [
        "https://h/a.png", "https://h/b.png", "v.jsonl:3", "v.jsonl:4",
        "https://h/studies/1/series/2/instances/3#patch=2,3,4,5",
    ]  # fmt: skip
    assert [row["kind"] for row in named] == ["image", "image", "image", "text", "image"]
    assert "secret" not in str(named)
    rows = [block.rows.tolist() for block in open_embeddings(path).blocks()]
    assert rows == [[0, 1, 2, 4]]


def test_search_finds_the_same(model, run, tmp_path, pictures, recwarn):
    """By text and by image, and near duplicates; the model has to fit."""
    folder = store.Embeddings(run, "any")
    vectors = np.concatenate([block.vectors for block in folder.blocks()])
    rows = folder.ids(range(len(folder)))
    columns = {"id": [r["id"] for r in rows], "source": [r["source"] for r in rows],
               "kind": [r["kind"] for r in rows], "embedding": vectors.tolist()}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "v.parquet")
    other = open_embeddings(tmp_path / "v.parquet")
    (got,) = search(model, other, ["photo of a b"], k=4)
    (want,) = search(model, store.Embeddings(run), ["photo of a b"], k=4)
    assert got == want
    (got,) = search(model, other, [], [str(pictures / "2.png")], k=1)
    assert any("prepared by the preset big_vision" in str(w.message) for w in recwarn)
    with pytest.raises(ValueError, match="only what embed wrote has an index"):
        search(model, other, ["a"], approximate=True)
    np.savez(tmp_path / "w.npz", v=np.ones((3, 7), np.float32), id=np.arange(3))
    with pytest.raises(ValueError, match=r"w.npz: made with another program.*dim is 7, wanted 16"):
        search(model, open_embeddings(tmp_path / "w.npz"), ["a"])


def called(capsys, *argv):
    code = cli.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_the_commands_take_them(capsys, tmp_path):
    """probe fit and predict, search, and what monitor reads: as from a folder of embed."""
    x, labels = draw(200)
    ids = [f"{i}.png" for i in range(200)]
    write_labelled_run(tmp_path / "run", ids, x, normalized=False)
    save_vertex(tmp_path / "v.jsonl", ids, x)
    save_h5(tmp_path / "v.h5", ids, x)
    data = write_table(tmp_path / "t.csv", id=ids, label=labels)
    scores = []
    for given in ("run", "v.jsonl"):
        probe, output = tmp_path / f"{given}.probe.npz", tmp_path / f"{given}.scores.csv"
        fit = ["--data", data, "--embeddings", tmp_path / given, "--output", probe]
        code, _, err = called(capsys, "probe", "fit", *fit)
        assert code == 0 and ("is not recorded" in err) == (given != "run"), err
        flags = ["--probe", probe, "--embeddings", tmp_path / given, "--output", output]
        code, _, err = called(capsys, "probe", "predict", *flags)
        assert code == 0, err
        scores.append(sorted(map(str, read_csv(output))))
    assert scores[0] == scores[1]
    pairs = [
        called(capsys, "search", "--embeddings", tmp_path / given, "--self", "--json")
        for given in ("run", "v.h5")
    ]
    of_run, of_file = (json.loads(out)["pairs"] for _, out, _ in pairs)
    assert sorted(pair["score"] for pair in of_run) == sorted(pair["score"] for pair in of_file)
    code, _, err = called(capsys, "search", "--embeddings", tmp_path / "v.h5", "--build-index")
    assert code == 2 and "only what embed wrote has an index" in err
    watched = monitored.read(monitored.open_run(tmp_path / "v.h5"), monitored.Given())
    np.testing.assert_array_equal(watched.vectors, x)


def test_a_probe_of_them_takes_no_images(capsys, tmp_path, checkpoint, pictures):
    """Nobody knows how images become such vectors; the message says what does go."""
    x, labels = draw(60, dim=16)
    save_npz(tmp_path / "v.npz", [str(i) for i in range(60)], x)
    data = write_table(tmp_path / "t.csv", id=range(60), label=labels)
    fit = ["--data", data, "--embeddings", tmp_path / "v.npz", "--output", tmp_path / "p.npz"]
    assert called(capsys, "probe", "fit", *fit)[0] == 0
    flags = ["--probe", tmp_path / "p.npz", "--model", checkpoint, pictures / "0.png"]
    code, _, err = called(capsys, "probe", "predict", *flags)
    assert code == 2 and "give vectors made in the same way (--embeddings)" in err


def test_evaluate_takes_those_of_the_same_images(tmp_path):
    """By path, by id, and where the images have moved by the end of the path."""
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    names = [f"a/{i}.png" for i in range(4)]
    labels = np.eye(4, 2, dtype=np.float32)
    dataset = Dataset(names, [f"/here/{name}" for name in names], labels, ("x", "y"))
    for prefix in ("", "/here/", "/elsewhere/b/"):
        save_npz(tmp_path / "v.npz", [prefix + name for name in names[1:]], x[1:])
        got = image_embeddings.read(tmp_path / "v.npz", dataset)
        assert got.images.tolist() == [1, 2, 3] and got.lost == 1, prefix
        np.testing.assert_array_equal(got.vectors, x[1:])
    save_npz(tmp_path / "v.npz", ["b/9.png"], x[:1])
    with pytest.raises(ValueError, match="none of the 4 images is among its 1 rows"):
        image_embeddings.read(tmp_path / "v.npz", dataset)


def test_an_unfinished_run_is_none_of_them(tmp_path):
    (tmp_path / "run").mkdir()
    save_parquet(tmp_path / "run" / "part-00000.parquet", ["a"], np.ones((1, 4), np.float32))
    with pytest.raises(FileNotFoundError, match="its run is not finished"):
        open_embeddings(tmp_path / "run")
    (tmp_path / "v.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="no vectors; expected a folder that embed wrote, or a f"):
        open_embeddings(tmp_path / "v.pt")
    with pytest.raises(FileNotFoundError):
        open_embeddings(tmp_path / "gone.npz")


X = np.ones((3, 2), np.float32)


def bad_npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def bomb_npz(path):
    """Says that it holds 400 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("v.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10)}
            )
            file.write(bytes(1 << 20))


def pickled(path):
    np.save(path, np.array([{}], object), allow_pickle=True)


def lying_npy(path):
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 1152)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)


def bomb_h5(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("v", (10**7, 1152), np.float32, chunks=(1000, 1152), compression="gzip")


def external_h5(path):
    path.with_suffix(".raw").write_bytes(bytes(24))
    with h5py.File(path, "w") as file:
        raw = [(str(path.with_suffix(".raw")), 0, 24)]
        file.create_dataset("v", (3, 2), np.float32, external=raw)
        file["id"] = ["a", "b", "c"]


def linked_h5(path):
    with h5py.File(path.with_suffix(".other.h5"), "w") as file:
        file["v"], file["id"] = X, ["a", "b", "c"]
    with h5py.File(path, "w") as file:
        file["v"] = h5py.ExternalLink(str(path.with_suffix(".other.h5")), "v")


def many_h5(path):
    with h5py.File(path, "w") as file:
        for n in range(1100):
            file[f"v{n}"] = 1.0


def parquet_of(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


def text(content):
    return lambda path: path.write_text(content)


HOSTILE = {
    "two.npz": (bad_npz(a=X, b=X, id=np.arange(3)), "or one of these called embedding: a, b"),
    "same.npz": (bad_npz(emb=X, embs=X, id=np.arange(3)), "emb and embs both look like embs"),
    "none.npz": (bad_npz(id=np.arange(3)), "expected one list of vectors"),
    "whole.npz": (bad_npz(v=np.ones((3, 2), int), id=np.arange(3)), "expected one list of"),
    "labels.npz": (bad_npz(v=X, y=np.array(["a", "b", "b"])), "no names of the vectors; expected"),
    "empty.npz": (bad_npz(v=X[:0], id=np.arange(0)), r"of shape \(0, 2\); expected floats"),
    "objects.npz": (bad_npz(v=X, id=np.array(["a", None, 1], object)), "pickled objects"),
    "bomb.npz": (bomb_npz, "has 1,048,576 bytes, and its header says"),
    "cut.npz": (lambda path: path.write_bytes(b"PK\3\4" + bytes(50)), "not a zip file"),
    "pickle.npz": (lambda path: path.write_bytes(pickle.dumps(X)), "not a zip file"),
    "pickled.npy": (pickled, "pickled objects"),
    "lying.npy": (lying_npy, "its array has 0 bytes, and its header says"),
    "names.npy": (lambda path: np.save(path, X), "no names of the vectors; expected .*names.txt"),
    "few.npy": (lambda path: (np.save(path, X), path.with_suffix(".txt").write_text("a\nb")),
                "3 vectors and 2 names"),
    "bomb.h5": (bomb_h5, "bytes, more than|would unpack to"),
    "external.h5": (external_h5, "/v lies in another file"),
    "linked.h5": (linked_h5, "expected one list of vectors"),
    "many.h5": (many_h5, "more than 1,000 arrays"),
    "noise.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2000)), "no vectors"),
    "ragged.parquet": (parquet_of(v=[[1.0], [1.0, 2.0]], id=["a", "b"]), "have 1 to 2 numbers"),
    "null.parquet": (parquet_of(v=[[1.0], None], id=["a", "b"]), "1 of 2 rows have no vector"),
    "texts.parquet": (parquet_of(id=["a", "b"]), "expected one list of vectors"),
    "short.csv": (text('id,v\na,"[0.1, ..., 0.3]"\n'), "line 2: .* numpy has shortened it"),
    "words.csv": (text('id,v\na,"[""x""]"\n'), "line 2: expected a list of numbers"),
    "huge.csv": (text(f'id,v\na,"[1{"0" * 400}]"\n'), "line 2: a number is too large"),
    "deep.jsonl": (text("[" * 100_000), "line 1: expected an object in JSON"),
    "cut.jsonl": (text('{"id": "a", "embedding": [1, 2'), "line 1: expected an object in JSON"),
    "ragged.jsonl": (text('{"id":"a","v":[1]}\n{"id":"b","v":[1,2]}\n'), "have 1 to 2 numbers"),
    "other.jsonl": (text('{"v": [1.0, 2.0]}'), "line 1: expected an id or a source beside"),
    "errors.jsonl": (text('{"instance": {}, "prediction": {"error": "no"}}'), "no vectors, the f"),
    "odd.jsonl": (text('{"instance": 7, "prediction": {"patch_embeddings": 7}}'), "is no list"),
    "bool.jsonl": (text('{"instance": {}, "prediction": {"embedding": [true]}}'), "a list of num"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_none_is_said_in_a_line(tmp_path, name):
    write, said = HOSTILE[name]
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=said) as error:
        open_embeddings(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")


def test_limits_hold(tmp_path, monkeypatch):
    """Of what is held in memory, whatever the format."""
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    monkeypatch.setattr(found, "MOST_BYTES", 4096)
    for name in ("a.npz", "c.npy", "d.h5", "f.parquet"):
        FORMS[name](tmp_path / name, [str(i) for i in range(64)], x)
        with limits.use(limits.parse(None, 4096, None)):
            with pytest.raises(ValueError, match=r"bytes, more than 4,096 \(--max-bytes\)"):
                open_embeddings(tmp_path / name)


def test_damaged_files_end_in_a_line(tmp_path):
    """In a process of its own, since libraries in C might end it."""
    code = """if True:
    import random, sys, warnings
    from pathlib import Path
    from medsiglip_jax.embeddings.elsewhere import open_embeddings
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    for name in sys.argv[2:]:
        whole = Path(sys.argv[1], name).read_bytes()
        for n in range(25):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 4, 30))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path = Path(sys.argv[1], f"{n}{name}")
            path.write_bytes(data[: rng.randrange(len(data))] if n % 3 == 0 else data)
            path.with_suffix(".txt").write_text("\\n".join(map(str, range(5))))
            try:
                for block in open_embeddings(path).blocks():
                    pass
            except ValueError as error:
                assert "\\n" not in str(error), error
    print("done")
    """
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    names = ["a.npz", "c.npy", "e.hdf5", "f.parquet", "h.csv", "j.jsonl"]
    for name in names:
        FORMS[name](tmp_path / name, [str(i) for i in range(5)], x)
    command = [sys.executable, "-c", code, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr[-2000:]


def test_an_answer_of_vertex_that_is_no_vector_is_not_taken_for_an_error(tmp_path):
    lines = [{"instance": {"text": "a"}, "prediction": {"embedding": v}} for v in ([1.0], "AAA=")]
    path = tmp_path / "v.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="line 2: expected a list of numbers"):
        open_embeddings(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".npz"])
def test_kinds_are_told_apart_in_every_format(tmp_path, suffix, recwarn):
    """A kind that `embed` does not have is of an image, which nobody leaves out of a search."""
    path, kinds = tmp_path / f"v{suffix}", ["text", "X-ray", "image"]
    rows = [{"id": k, "Kind" if suffix != ".jsonl" else "kind": k, "embedding": [1.0, n]}
            for n, k in enumerate(kinds)]  # fmt: skip
    if suffix == ".csv":
        write_table(path, id=kinds, Kind=kinds,
                    embedding=[json.dumps(r["embedding"]) for r in rows])  # fmt: skip
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".npz":
        np.savez(path, id=kinds, Kind=kinds, v=np.ones((3, 2)))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    named = open_embeddings(path, "any").ids(range(3))
    assert [row["kind"] for row in named] == ["text", "image", "image"]
    assert [row["id"] for row in named] == kinds
