"""Search and near duplicates of runs: Python, tables, and the command."""

import csv
import importlib.util
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pyarrow.parquet as pq
import pytest
from embedding_runs import cosines, write_run
from references import model_terms, rounding

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.data import inputs
from medsiglip_jax.data.columns import read_lines
from medsiglip_jax.embeddings import output
from medsiglip_jax.embeddings.search import duplicates, search, write_hits, write_pairs
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.inference.embed import EmbedOptions, embed


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


FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1", "＝1"]


def test_texts_in_csv_are_no_formulas_and_read_back_as_they_were(tmp_path):
    """Ids, sources, queries and the names of classes come from anywhere; numbers stay numbers."""
    pairs = [
        {"id": text, "source": text, "other_id": "a=b", "other_source": "'a", "score": -0.5}
        for text in FORMULAS
    ]
    write_pairs(tmp_path / "p.csv", pairs)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"'{text}" for text in FORMULAS]
    assert {(r["other_id"], r["other_source"], float(r["score"])) for r in rows} == {
        ("a=b", "'a", -0.5)
    }
    with pytest.warns(match="p.csv: 9 rows have text with an apostrophe before"):
        columns, *_ = read_lines(str(tmp_path / "p.csv"))
    assert columns["id"].to_pylist() == FORMULAS
    output.write(tmp_path / "s.csv", {"id": ["a"], "-1": np.array([-0.25])})
    assert (tmp_path / "s.csv").read_text() == "id,'-1\na,-0.25\n"
    with pytest.warns(match="s.csv: 1 rows"):
        columns, *_ = read_lines(str(tmp_path / "s.csv"))
    assert {n: c.to_pylist() for n, c in columns.items()} == {"id": ["a"], "-1": ["-0.25"]}


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


def test_rows_without_a_direction_are_left_out_and_counted(call, model, checkpoint, tmp_path):
    """On stderr and in JSON, by every kind of search, also through an index."""
    x = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    x[1, 3], x[2], x[3, 0] = np.nan, 0, -np.inf
    facts = {"model": {"source": model.source, "sha256": model.sha256}}
    run = write_run(tmp_path / "run", [x[:2], x[2:]], facts=facts)
    said = f"{run}: left out 3 embeddings that are null, zero or not finite, the first of row1"
    said += " in part-00000.parquet\n"
    left_out = {"rows": 3, "first": [
        {"id": "row1", "file": "part-00000.parquet"}, {"id": "row2", "file": "part-00001.parquet"},
        {"id": "row3", "file": "part-00001.parquet"},
    ]}  # fmt: skip
    flags = ["--embeddings", run, "--json"]
    code, out, err = call(*flags, "--model", checkpoint, "--text", "a scan")
    (result,) = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and {hit["id"] for hit in result["hits"]} == {"row0", "row4"} and said in err
    assert result["left_out"] == left_out
    code, out, err = call(*flags, "--against", run, "--threshold", "0.01")
    result = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and err.count(said) == 2
    assert result["left_out"] == result["other_left_out"] == left_out
    if importlib.util.find_spec("usearch"):
        for wanted in (["--build-index"], ["--approximate", "--model", checkpoint, "--text", "a"]):
            code, out, err = call(*flags, *wanted)
            assert code == 0 and said in err and str(left_out["rows"]) in out
    near = write_run(tmp_path / "small", [1e-30 * x[:1], 1e30 * x[4:]], facts=facts)
    assert "left out" not in call("--embeddings", near, "--self", "--threshold", "0.01")[2]


def test_command_for_an_index(call, checkpoint, run, tmp_path):
    pytest.importorskip("usearch")
    run = shutil.copytree(run, tmp_path / "run")
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
        ([*ok, "--text", " "], "none of them empty"),
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
        ([*ok, "--self"], "no effect: --model"),
        ([*ok, "--build-index", "--batch-size", 2], "no effect: --model, --batch-size"),
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


def test_help_has_an_example(call):
    code, out, _ = call("--help")
    assert code == 0 and "example:" in out and "--against" in out
