"""Search: exactly the float64 ranking, whatever the blocks, in little memory."""

import csv
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import dataset
from references import model_terms, rounding

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.cli import loading, parser, reading
from medsiglip_jax.data import inputs
from medsiglip_jax.embeddings import cosines as products
from medsiglip_jax.embeddings import near_duplicates as pairwise
from medsiglip_jax.embeddings.near_duplicates import groups, near_duplicates
from medsiglip_jax.embeddings.nearest import top_k
from medsiglip_jax.embeddings.search import duplicates, search, write_hits, write_pairs
from medsiglip_jax.embeddings.store import ArrayVectors, Embeddings
from medsiglip_jax.inference.embed import EmbedOptions, embed
from medsiglip_jax.pages import contact_sheet
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.parts import Parts


def cosines(x, y):
    """Float64, each pair by itself; -inf for what is no vector."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        dots = np.stack([_dots(x, np.tile(row, (len(x), 1))) for row in y], axis=1)
        found = dots / np.sqrt(_dots(x, x)[:, None] * _dots(y, y)[None])
    return np.where(np.isfinite(found), np.clip(found, -1, 1), -np.inf)


def _dots(x, y):
    return np.einsum("nd,nd->n", x, y)


def ranking(queries, vectors, k):
    """The reference: all cosines, a stable sort."""
    exact = cosines(queries, vectors)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(exact, order, axis=1), order


def crowd(n, dim, seed=0, dtype=np.float32, unit=False):
    """Clusters so narrow that float32 cannot order them, exact copies, zeros and NaN."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((8, dim))
    x = centres[rng.integers(8, size=n)] + 1e-4 * rng.standard_normal((n, dim))
    if unit:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = x.astype(dtype)
    x[n // 2 :: 7] = x[3]
    x[[1, n - 2]], x[[2, n // 3]] = 0, np.nan
    return x, rng.standard_normal((5, dim)).astype(np.float32) + centres[:5].astype(np.float32)


@pytest.mark.float
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("unit", [True, False])
def test_top_k_is_the_float64_ranking_whatever_the_blocks(dtype, unit):
    x, queries = crowd(3000, 48, dtype=dtype, unit=unit)
    if not unit:
        x *= np.linspace(0.01, 5, len(x), dtype=np.float32)[:, None].astype(dtype)
    for k in (1, 10, 700):
        want_scores, want = ranking(queries, x, k)
        for block_rows in (64, 1000, 3000):
            scores, rows = top_k(queries, ArrayVectors(x, unit, block_rows), k)
            np.testing.assert_array_equal(rows, want)
            np.testing.assert_allclose(scores, want_scores, rtol=0, atol=1e-15)
    one = top_k(queries[2:3], ArrayVectors(x, unit, 512), 10)
    for part, whole in zip(one, top_k(queries, ArrayVectors(x, unit, 64), 10), strict=True):
        np.testing.assert_array_equal(part[0], whole[2])  # to the bit


def test_float32_alone_would_not_do():
    """Or the test above could not fail."""
    x, queries = crowd(3000, 48, unit=True)
    plain = np.argsort(-(queries @ np.nan_to_num(x).T), axis=1, kind="stable")[:, :700]
    assert (plain != ranking(queries, x, 700)[1]).any()


def test_what_is_no_vector_comes_last():
    x = np.array([[0, 0], [-1, 0], [np.nan, 1], [1, 1], [np.inf, 0]], np.float32)
    scores, rows = top_k(np.array([[1.0, 0]], np.float32), ArrayVectors(x, block_rows=2), 9)
    assert rows.tolist() == [[3, 1, 0, 2, 4]]
    assert scores[0, 2:].tolist() == [-np.inf] * 3 and scores[0, 1] == -1
    assert near_duplicates(ArrayVectors(x), 0.5).rows.size == 0
    huge = np.array([[1e30, 1e30], [-3e38, 3e38], [1e-30, 0]], np.float32)
    for block_rows in (1, 3):
        scores, rows = top_k(
            np.array([[1.0, 0]], np.float32), ArrayVectors(huge, False, block_rows), 1
        )
        assert rows.tolist() == [[2]] and scores[0, 0] == 1
        _, rows = top_k(np.array([[1.0, 1]], np.float32), ArrayVectors(huge, False, block_rows), 1)
        assert rows.tolist() == [[0]]
    huge = np.concatenate([huge, huge * np.float32(0.5)])
    assert near_duplicates(ArrayVectors(huge), 0.999).rows.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_queries_are_checked():
    x = ArrayVectors(np.eye(4, dtype=np.float32))
    for query, k, say in (
        (np.ones((1, 3), np.float32), 1, r"expected \[q, 4\]"),
        (np.zeros((1, 4), np.float32), 1, "zero or not finite"),
        (np.full((1, 4), np.nan, np.float32), 1, "zero or not finite"),
        (np.ones((1, 4), np.float32), 0, "k is 0"),
    ):
        with pytest.raises(ValueError, match=say):
            top_k(query, x, k)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_products_of_accelerators_are_those_of_the_cpu(normalized, monkeypatch):
    x, queries = crowd(300, 48, unit=normalized, dtype=np.float16)
    want = [
        top_k(queries, ArrayVectors(x, normalized, 128), 20),
        near_duplicates(ArrayVectors(x), 0.99),
    ]
    monkeypatch.setattr(products, "_on_cpu", lambda: False)
    got = [
        top_k(queries, ArrayVectors(x, normalized, 128), 20),
        near_duplicates(ArrayVectors(x), 0.99),
    ]
    for one, other in zip(want, got, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------ near duplicates


def all_pairs(x, y, threshold):
    """The reference: every pair."""
    exact = cosines(x, x if y is None else y)
    i, j = np.nonzero(exact >= threshold)
    keep = i < j if y is None else i >= 0
    i, j = i[keep], j[keep]
    order = np.lexsort((j, i, -exact[i, j]))
    return np.stack([i, j], axis=1)[order], exact[i, j][order]


@pytest.mark.float
@pytest.mark.parametrize("threshold", [0.99999999, 0.999, 1.0])
@pytest.mark.parametrize("second", [False, True])
def test_near_duplicates_are_all_pairs(threshold, second, monkeypatch):
    monkeypatch.setattr(pairwise, "_TILE_ROWS", 100)
    monkeypatch.setattr(pairwise, "_STRIP_PAIRS", 1500)
    x, y = crowd(300, 24)[0], crowd(200, 24, seed=1)[0] if second else None
    if y is not None:
        y[60:100] = 2 * x[100:140]
    want, exact = all_pairs(x, y, threshold)
    done = []
    other = None if y is None else ArrayVectors(y, block_rows=64)
    found = near_duplicates(ArrayVectors(x, block_rows=48), threshold, other, on_pairs=done.append)
    assert len(want) > 10 and not found.cut and sum(done) > len(want)
    np.testing.assert_array_equal(found.rows, want)
    np.testing.assert_array_equal(found.cosines, exact)


def test_the_limit_keeps_the_nearest_pairs(monkeypatch):
    monkeypatch.setattr(pairwise, "_STRIP_PAIRS", 512)
    x, _ = crowd(200, 24)
    want, exact = all_pairs(x, None, 0.5)
    for limit in (1, 7, len(want) - 1, len(want)):
        found = near_duplicates(ArrayVectors(x, block_rows=32), 0.5, limit=limit)
        np.testing.assert_array_equal(found.rows, want[:limit])
        np.testing.assert_array_equal(found.cosines, exact[:limit])
        assert found.cut == (limit < len(want))
    for wrong in (dict(threshold=0.0), dict(threshold=1.1), dict(threshold=0.5, limit=0)):
        with pytest.raises(ValueError, match="expected"):
            near_duplicates(ArrayVectors(x), **wrong)


def test_groups():
    assert groups(np.array([[1, 2], [5, 9], [2, 3], [9, 1], [7, 8]])) == [[1, 2, 3, 5, 9], [7, 8]]
    assert groups(np.empty((0, 2), np.int64)) == []


# -------------------------------------------------------------------------------------- files


def write_run(folder, parts, kinds=None, facts=None, row_group_size=100, ids=None):
    """A folder as `embed` leaves it, from arrays."""
    storage, root = fsspec.core.url_to_fs(str(folder))
    storage.makedirs(root, exist_ok=True)
    dim, start, listed = parts[0].shape[1], 0, []
    for number, x in enumerate(parts):
        rows = range(start, start := start + len(x))
        flat = pa.array(x.reshape(-1))
        columns = {
            "id": pa.array([ids[i] if ids else f"row{i}" for i in rows], pa.string()),
            "source": pa.array([f"/gone/{i}.png" for i in rows], pa.string()),
            "kind": pa.array([kinds[i] if kinds else "image" for i in rows], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
        }
        name = f"part-{number:05d}.parquet"
        with storage.open(f"{root}/{name}", "wb") as file:
            pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
        listed.append({"file": name, "rows": len(x)})
    content = {"model": {"source": "m", "sha256": "x"}, "preprocess": "big_vision", "dim": dim}
    content |= {"normalized": False, "parts": listed} | (facts or {})
    storage.pipe_file(f"{root}/manifest.json", json.dumps(content).encode())
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_files_are_searched_as_one_array(dtype, where, tmp_path):
    folder = tmp_path / "run" if where == "local" else f"memory://{tmp_path.name}/run"
    x, queries = crowd(900, 24, dtype=dtype)
    kinds = ["text" if i % 5 == 0 or i > 700 else "image" for i in range(len(x))]
    write_run(folder, np.split(x, [250, 251, 600]), kinds)
    for kind in ("image", "text", "any"):
        read = []
        run = Embeddings(folder, kind, read.append)
        mine = np.flatnonzero([kind in ("any", k) for k in kinds])
        scores, rows = top_k(queries, run, 20)
        want_scores, want = ranking(queries, x[mine], 20)
        np.testing.assert_array_equal(rows, mine[want])
        np.testing.assert_allclose(scores, want_scores, rtol=0, atol=1e-15)
        assert sum(read) == len(run) == 900
        for start in (0, 249, 250, 251, 777, 900):
            from_start = [block.rows for block in run.blocks(start)]
            found = np.concatenate([np.empty(0, np.int64), *from_start])
            np.testing.assert_array_equal(found, mine[mine >= start])
    rows = [899, 3, 250, 3]
    assert [row["id"] for row in run.ids(rows)] == [f"row{i}" for i in rows]
    found = near_duplicates(run, 0.9999999)
    np.testing.assert_array_equal(found.rows, all_pairs(x, None, 0.9999999)[0])


def test_a_float32_part_is_not_copied(tmp_path):
    write_run(tmp_path, [np.ones((50, 8), np.float32)])
    (block,) = Embeddings(tmp_path).blocks()
    base = block.vectors
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert not base.flags.owndata and not block.vectors.flags.writeable


def test_what_is_no_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder: .*gone"):
        Embeddings(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="not finished"):
        Embeddings(tmp_path)
    write_run(tmp_path / "run", [np.ones((5, 8), np.float32)])
    with pytest.raises(ValueError, match="kind is 'video'; expected one of image, text, any"):
        Embeddings(tmp_path / "run", "video")
    for facts, say in (
        ({"parts": [{"file": "part-00000.parquet", "rows": 6}]}, "5 rows, the manifest says 6"),
        ({"dim": 9}, "vectors of 8 numbers, the manifest says 9"),
    ):
        write_run(tmp_path / "run", [np.ones((5, 8), np.float32)], facts=facts)
        with pytest.raises(ValueError, match=say):
            list(Embeddings(tmp_path / "run").blocks())
    for text in ("{", "[]", '{"parts": []}'):
        (tmp_path / "run" / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json: .*embed"):
            Embeddings(tmp_path / "run")


def test_a_manifest_with_other_types_is_one_line(tmp_path):
    whole = {"dim": 8, "normalized": True, "preprocess": "big_vision", "parts": []}
    whole["model"] = {"source": "m", "sha256": "x"}
    for facts, say in (
        ({"parts": 3, "dim": "8"}, 'parts is 3, dim is "8"; expected'),
        ({"parts": [{"file": "p"}]}, r'parts is \[{"file": "p"}\]; expected'),
        ({"parts": ["p"]}, r'parts is \["p"\]; expected'),
        ({"model": {}}, "model is {}; expected embed's manifest$"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(whole | facts))
        with pytest.raises(ValueError, match=rf"^{tmp_path}/manifest.json: {say}"):
            Embeddings(tmp_path)
    for content in (b"\xff", b"null"):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"^{tmp_path}/manifest.json: "):
            Embeddings(tmp_path)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_damaged_part_is_named(where, tmp_path):
    folder = tmp_path / "run" if where == "local" else f"memory://{tmp_path.name}/damaged"
    x = np.random.default_rng(0).standard_normal((900, 8)).astype(np.float32)
    write_run(folder, [x[:300], x[300:]])
    storage, root = fsspec.core.url_to_fs(str(folder))
    path = f"{root}/part-00001.parquet"
    whole = storage.cat_file(path)
    middle = len(whole) // 2
    pages = whole[: middle - 8000] + bytes(8000) + whole[middle:]
    for data in (whole[:middle], b"", pages):
        storage.pipe_file(path, data)
        with pytest.raises(ValueError, match="part-00001.parquet: damaged .*; remove it"):
            list(Embeddings(folder).blocks())
    storage.pipe_file(path, whole[:middle])
    with pytest.raises(ValueError, match="part-00001.parquet: damaged .*; remove it"):
        Embeddings(folder).ids([0, 899])
    storage.rm(path)
    with pytest.raises(FileNotFoundError):
        list(Embeddings(folder).blocks())


def test_arrow_reads_the_parts_by_their_name(run):
    parts = sorted(str(path) for path in run.glob("part-*.parquet"))
    want = [row["id"] for row in Embeddings(run).ids(range(9))]
    assert len(parts) == 4 and dataset.dataset(parts).to_table()["id"].to_pylist() == want


def test_pandas_reads_the_parts_by_their_name(run):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(sorted(str(path) for path in run.glob("part-*.parquet")))
    assert len(frame) == 9 and len(frame["embedding"][0]) == 16


def test_duckdb_reads_the_parts_by_their_name(run):
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(f"SELECT id, embedding FROM '{run}/part-*.parquet'").fetchall()
    assert len(found) == 9 and len(found[0][1]) == 16


def test_memory_does_not_grow_with_the_run(tmp_path):
    """Peak memory of a process that searches twelve times as many rows."""
    code = (
        "import sys, resource, numpy as np\n"
        "from medsiglip_jax.embeddings.store import Embeddings\n"
        "from medsiglip_jax.embeddings.nearest import top_k\n"
        "top_k(np.ones((4, 256), np.float32), Embeddings(sys.argv[1]), 10)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    x, peaks = np.random.default_rng(0).standard_normal((8192, 256), np.float32), []
    for count in (8, 96):
        folder = write_run(tmp_path / str(count), [x], row_group_size=8192)
        content = json.loads((folder / "manifest.json").read_text())
        content["parts"] *= count
        (folder / "manifest.json").write_text(json.dumps(content))
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 200, peaks  # the 88 parts more hold 738 MB


# ------------------------------------------------------------------------------ with a model


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


@pytest.fixture
def run(model, pictures, tmp_path):
    """Seven images and two texts, embedded with another preset than the default."""
    (tmp_path / "notes.txt").write_text("photo of a b\nscan of a c\n")
    rows = inputs.rows([pictures, tmp_path / "notes.txt"])
    embed(model, rows, tmp_path / "run", EmbedOptions("serving", normalize=False, shard_size=3))
    return tmp_path / "run"


def test_search_finds_the_images_of_texts_and_of_images(model, run, pictures):
    texts, images = ["drawing of a b", "photo of a b"], [str(pictures / "2.png")]
    apart = rounding(model_terms(model.config))
    results = search(model, Embeddings(run), texts, images, k=7)
    assert [r["query"] for r in results] == texts + images
    assert results[2]["hits"][0]["id"] == "2.png"
    assert results[2]["hits"][0]["score"] == pytest.approx(1, abs=apart)  # so it was "serving"
    sources = [hit["source"] for hit in results[0]["hits"]]
    zimg = np.asarray(model.encode_image(model.processor.images(sources, "serving")))
    ztxt = np.asarray(model.encode_text(model.processor.texts(texts[:1])))
    want = cosines(ztxt, zimg)[0]
    np.testing.assert_allclose([h["score"] for h in results[0]["hits"]], want, rtol=0, atol=apart)
    assert (np.diff(want) < apart).all() and len(sources) == 7
    (result,) = search(model, Embeddings(run, "text"), texts[1:], k=5)
    assert [h["id"] for h in result["hits"]][0] == "notes.txt:1" and len(result["hits"]) == 2


def test_search_without_rows_says_so(model, tmp_path):
    facts = {"model": {"source": model.source, "sha256": model.sha256}, "dim": 16}
    write_run(tmp_path, [np.ones((2, 16), np.float32)], ["text"] * 2, facts)
    with pytest.raises(ValueError, match="no rows of kind image; choose another"):
        search(model, Embeddings(tmp_path), ["a"])
    write_run(tmp_path, [np.ones((0, 16), np.float32)], [], facts)
    for approximate in (False, True):
        with pytest.raises(ValueError, match="no rows of kind image, nor of any"):
            search(model, Embeddings(tmp_path), ["a"], approximate=approximate)


def test_search_refuses_another_model(model, run, tmp_path):
    other = tmp_path / "other"
    medsiglip_jax.save(medsiglip_jax.init(model.config, seed=1), other)
    with pytest.raises(ValueError, match=f"{run}: .*as with {other}: sha256 .*{model.sha256}'"):
        search(medsiglip_jax.load(other), Embeddings(run), ["photo of a a"])
    with pytest.raises(ValueError, match="as with weights never saved: sha256 "):
        search(medsiglip_jax.init(model.config, seed=1), Embeddings(run), ["photo of a a"])


def test_duplicates_between_and_within_runs(model, run, pictures, tmp_path):
    (pictures / "again.png").write_bytes((pictures / "1.png").read_bytes())
    rows = inputs.rows([pictures])
    embed(model, rows, tmp_path / "b", EmbedOptions("serving", normalize=False))
    within = duplicates(Embeddings(tmp_path / "b"), 1.0)
    ids = {frozenset((p["id"], p["other_id"])) for p in within["pairs"]}
    assert ids == {frozenset(("1.png", "again.png"))} and within["groups"] == 1
    between = duplicates(Embeddings(tmp_path / "b"), 0.999999, Embeddings(run))
    named = {(p["id"], p["other_id"]) for p in between["pairs"]}
    assert {("1.png", "1.png"), ("again.png", "1.png"), ("2.png", "2.png")} <= named
    embed(model, rows, tmp_path / "c", EmbedOptions("big_vision"))
    with pytest.raises(ValueError, match="c, compared with .*run: .* is 'big_vision', wanted 'se"):
        duplicates(Embeddings(run), 0.9, Embeddings(tmp_path / "c"))


def test_runs_of_other_content_are_not_compared(tmp_path):
    vectors, many = [np.ones((2, 8), np.float32)], {"volume": "ct"}
    one = Embeddings(write_run(tmp_path / "a", vectors, facts={"normalized": True, "dicom": many}))
    for facts, say in (
        ({}, None),
        ({"dicom": {"volume": None}}, None),
        ({"dicom": {"volume": "percentile"}}, "volume is 'percentile', wanted 'ct'"),
        ({"dicom": {"ct_window": [350, 40]}}, "dicom is "),
    ):
        other = Embeddings(write_run(tmp_path / "b", vectors, facts=facts))
        with nullcontext() if say is None else pytest.raises(ValueError, match=say):
            assert len(duplicates(one, 0.9, other)["pairs"]) == 4


def test_queries_are_read_as_it_is_recorded():
    flagged = parser.Parser()
    reading.add_queries(flagged)
    recorded = Rules(frame=5, volume="ct")
    for flags, frame, series in (([], 5, False), (["--series"], 5, True), (["--frame", "3"], 3, 0)):
        rules, parts = reading.queries(flagged.parse_args(flags), recorded)
        assert (rules, parts) == (replace(recorded, frame=frame), Parts(frame, bool(series)))


def test_pairs_are_written(tmp_path):
    pair = {"id": "a,\n", "source": "é", "other_id": "b", "other_source": "y", "score": 0.1 + 0.2}
    write_pairs(tmp_path / "p.csv", [pair])
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert {**row, "score": float(row["score"])} == pair
    write_pairs(tmp_path / "p.parquet", [pair])
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == [pair]
    with pytest.raises(ValueError, match="p.xlsx: expected a name ending in"):
        write_pairs(tmp_path / "p.xlsx", [pair])


def test_hits_are_written(tmp_path):
    hits = [
        {"id": "a,\n", "source": "é", "score": 0.1 + 0.2},
        {"id": "b", "source": "y", "score": 0},
    ]
    results = [{"query": "q", "hits": hits}, {"query": "é\n", "hits": hits[:1]}]
    want = [("q", 1, "a,\n"), ("q", 2, "b"), ("é\n", 1, "a,\n")]
    write_hits(tmp_path / "h.csv", results)
    with open(tmp_path / "h.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["query"], int(r["rank"]), r["id"]) for r in rows] == want
    assert [float(r["score"]) for r in rows] == [0.1 + 0.2, 0, 0.1 + 0.2]
    write_hits(tmp_path / "h.parquet", results)
    rows = pq.read_table(tmp_path / "h.parquet").to_pylist()
    assert [(r["query"], r["rank"], r["id"]) for r in rows] == want
    assert list(rows[0]) == ["query", "rank", "id", "source", "score"]


# ------------------------------------------------------------------------------ contact sheet


@pytest.fixture
def results(pictures):
    with open(pictures / "packed.tar", "wb") as file:
        file.write(b"x" * 512 + (pictures / "0.png").read_bytes())
    size = (pictures / "0.png").stat().st_size
    hits = [
        {"id": "<b>0</b>", "source": str(pictures / "0.png"), "score": 0.5},
        {"id": "packed", "source": f"{pictures}/packed.tar#512:{size}", "score": 0.25},
        {"id": "gone & away", "source": "/no/where.png", "score": 0.125},
    ]
    query = str(pictures / "1.png")
    return [{"query": "<script>alert(1)</script>", "hits": hits}, {"query": query, "hits": hits}]


def test_an_html_sheet_holds_all_it_needs(results, tmp_path):
    contact_sheet.write(tmp_path / "hits.html", results, [results[1]["query"]])
    page = (tmp_path / "hits.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5 and page.count("<figure>") == 8
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;0&lt;/b&gt;" in page
    assert page.count("<p>gone &amp; away</p>") == 2 and "0.1250" in page
    assert "http" not in page and 'src="/' not in page


def test_a_png_sheet_shows_the_pictures(results, tmp_path):
    results[0]["hits"] = results[0]["hits"] * 4  # wraps
    contact_sheet.write(tmp_path / "hits.png", results, [results[1]["query"]])
    with Image.open(tmp_path / "hits.png") as image:
        page = np.asarray(image.convert("RGB"))
    line = contact_sheet.SIDE + contact_sheet.LABEL + 16
    assert page.shape[0] == 2 * contact_sheet.MARGIN + 3 * line
    first = page[contact_sheet.MARGIN :][: contact_sheet.SIDE]
    cells = [first[:, contact_sheet.MARGIN + i * contact_sheet.PITCH :][:, :160] for i in range(4)]
    colours = [len(np.unique(cell.reshape(-1, 3), axis=0)) for cell in cells]
    assert colours[1] > 300 and colours[2] > 300  # noise; text on paper has fewer
    assert colours[0] < 256 and colours[3] < 256
    with pytest.raises(ValueError, match="hits.pdf: expected"):
        contact_sheet.write(tmp_path / "hits.pdf", results)


# -------------------------------------------------------------------------------------- index


def test_the_index_and_what_it_misses(tmp_path):
    pytest.importorskip("usearch")
    from medsiglip_jax.embeddings import index

    x = np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)
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
    with pytest.raises(ValueError, match="stale or of other rows .*--kind any"):
        index.top_k(x[:1], Embeddings(folder, "any"), 5)
    write_run(folder, [x[:599]], kinds)
    with pytest.raises(ValueError, match="stale"):
        index.top_k(x[30:31], Embeddings(folder), 5)


# ------------------------------------------------------------------------------------ command


@pytest.fixture
def call(capsys):
    def run(*argv):
        code = cli.main(["search", *(str(a) for a in argv)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def test_command(call, checkpoint, run, pictures, tmp_path):
    flags = ["--embeddings", run, "--model", checkpoint, "--text", "photo of a b", "--image"]
    flags += [pictures / "0.png", "--top-k", 2]
    code, out, _ = call(*flags, "--json", "--sheet", tmp_path / "hits.html")
    results = json.loads(out)
    assert code == 0 and [r["query"] for r in results] == ["photo of a b", str(pictures / "0.png")]
    assert [set(hit) for r in results for hit in r["hits"]] == [{"id", "source", "score"}] * 4
    assert (tmp_path / "hits.html").read_text().count("data:image") == 5
    code, out, _ = call(*flags, "--json", "--output", tmp_path / "hits.parquet")
    written = pq.read_table(tmp_path / "hits.parquet").to_pylist()
    assert [r["score"] for r in written] == [h["score"] for r in json.loads(out) for h in r["hits"]]
    code, out, _ = call(*flags)
    assert code == 0 and out.count("score") == 2 and " 1.0000  0.png" in out


def test_command_for_pairs(call, run, tmp_path):
    flags = ["--embeddings", run, "--threshold", "0.01"]
    code, out, err = call(*flags, "--self", "--json", "--limit", 3, "--output", tmp_path / "p.csv")
    result = json.loads(out)
    assert code == 0 and len(result["pairs"]) == 3 and result["cut"] and "there are more" in err
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 4
    code, out, _ = call(*flags, "--against", run)
    assert (
        code == 0
        and out.splitlines()[-1].endswith("groups of connected rows: 1")
        and "0.png  0.png" in out
    )


def test_a_line_break_in_an_id_leaves_the_table_whole(call, model, checkpoint, tmp_path):
    facts = {"model": {"source": model.source, "sha256": model.sha256}}
    x = np.ones((2, 16), np.float32)
    write_run(tmp_path, [x], facts=facts, ids=["a\nb", "c"])
    flags = ["--embeddings", tmp_path, "--model", checkpoint, "--text", "photo\nof a b"]
    out = call(*flags)[1]
    assert out.count("\n") == 4 and r"'a\nb'" in out and r"'photo\nof a b'" in out
    out = call("--embeddings", tmp_path, "--self")[1]
    assert out.count("\n") == 2 and r"  'a\nb'  c" in out


def test_command_for_an_index(call, checkpoint, run):
    pytest.importorskip("usearch")
    code, out, _ = call("--embeddings", run, "--build-index", "--json")
    assert code == 0 and json.loads(out)["recall_at_10"] == 1
    flags = ["--embeddings", run, "--model", checkpoint, "--text", "photo of a b", "--json"]
    exact, near = json.loads(call(*flags)[1]), json.loads(call(*flags, "--approximate")[1])
    assert [h["id"] for h in near[0]["hits"]] == [h["id"] for h in exact[0]["hits"]]


def test_mistakes_are_one_line_and_exit_2(call, checkpoint, run, pictures, tmp_path):
    ok = ["--embeddings", run, "--model", checkpoint]
    medsiglip_jax.save(medsiglip_jax.init(medsiglip_jax.load(checkpoint).config, 1), tmp_path / "m")
    for argv, say in (
        (["--embeddings", run], "--build-index"),
        (ok, "--text or --image"),
        ([*ok, "--text", " "], "no text empty"),
        ([*ok, "--text", "a", "--top-k", 0], "k is 0"),
        ([*ok, "--image", pictures / "sub" / "damaged.jpg"], "damaged.jpg: "),
        ([*ok, "--image", "gone.png"], "gone.png: no such file"),
        ([*ok, "--text", "a", "--sheet", "hits.gif"], "hits.gif"),
        ([*ok, "--text", "a", "--kind", "video"], "video"),
        ([*ok, "--text", "a", "--approximate"], "--build-index makes"),
        (["--embeddings", run, "--model", tmp_path / "m", "--text", "a"], "sha256"),
        (["--embeddings", pictures, "--self"], "not a folder that embed wrote"),
        (["--embeddings", "gone", "--self"], "gone"),
        (["--embeddings", run, "--self", "--threshold", 2], "threshold is 2.0"),
        (["--embeddings", run, "--self", "--output", "p.doc"], "p.doc"),
        (["--embeddings", run, "--self", "--against", run], "not allowed with"),
        ([*ok, "--text", "a", "--output", "hits.doc"], "hits.doc: expected"),
        (["--embeddings", run, "--self", "--text", "a"], "no effect: --text"),
        (["--embeddings", run, "--against", run, "--image", "a"], "no effect: --image"),
        (["--embeddings", run, "--self", "--sheet", "hits.html"], "no effect: --sheet"),
        (["--embeddings", run, "--self", "--top-k", "3"], "no effect: --top-k"),
        (
            ["--embeddings", run, "--self", "--frame", "3", "--series", "--volume", "ct"],
            "near duplicates these flags have no effect: --frame, --volume, --series",
        ),
        (
            ["--embeddings", run, "--build-index", "--series"],
            "--build-index these flags have no effect: --series",
        ),
        (
            [*ok, "--text", "a", "--frame", "9"],
            "in a search by text these flags have no effect: --frame",
        ),
        (
            ["--embeddings", run, "--against", run, "--build-index", "--approximate"],
            "near duplicates these flags have no effect: --build-index, --approximate",
        ),
        (
            [*ok, "--build-index", "--text", "a", "--output", "p.csv"],
            "--build-index these flags have no effect: --text, --output",
        ),
        (
            [*ok, "--text", "a", "--threshold", "0.9"],
            "by text these flags have no effect: --threshold",
        ),
        (
            [*ok, "--image", "a", "--threshold", "0.9"],
            "by image these flags have no effect: --threshold",
        ),
        ([*ok, "--text", "a", "--limit", "9"], "no effect: --limit"),
        ([*ok, "--text", "a", "--top", "9"], "unrecognized arguments: --top 9"),
    ):
        code, out, err = call(*argv)
        assert (code, out, err.count("\n")) == (2, "", 1) and say in err, (argv, code, err)


@pytest.mark.parametrize("flags", [["--processes", "2"], ["--process-id", "1"]])
def test_a_process_of_several_has_to_know_where_the_others_are(flags):
    flagged = parser.Parser()
    loading.add_processes(flagged)
    with pytest.raises(ValueError, match="--processes and --process-id need --coordinator"):
        loading.join_other_processes(flagged.parse_args(flags))
    assert loading.join_other_processes(flagged.parse_args([]))


def test_no_flag_is_short_for_another(capsys):
    assert cli.main(["embed", "x", "--model", "m", "--output", "o", "--max-error=3"]) == 2
    assert "unrecognized arguments: --max-error=3" in capsys.readouterr().err
    assert cli.main(["--versio"]) == 2


def test_help_has_an_example(call):
    code, out, _ = call("--help")
    assert code == 0 and "example:" in out and "--against" in out


def test_gather_skips_what_is_of_another_kind(tmp_path):
    """In any order and more than once; blocks that hold only texts are no obstacle."""
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    kinds = ["text" if 10 <= i < 30 else "image" for i in range(40)]
    embeddings = Embeddings(write_run(tmp_path / "run", np.split(x, [10, 20, 30]), kinds))
    rows = np.array([35, 2, 39, 2, 0])
    np.testing.assert_array_equal(embeddings.gather(rows), x[rows])
    with pytest.raises(ValueError, match="1 of 2 rows asked for are not of kind image"):
        embeddings.gather(np.array([3, 15]))
