"""Reading embedding runs: any part, little memory, and errors that name the file."""

import json
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_runs import all_pairs, crowd, ranking, write_run
from pyarrow import dataset

from medsiglip_jax.embeddings.near_duplicates import near_duplicates
from medsiglip_jax.embeddings.nearest import top_k
from medsiglip_jax.embeddings.store import Embeddings


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


def test_gather_skips_what_is_of_another_kind(tmp_path):
    """In any order and more than once; blocks that hold only texts are no obstacle."""
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    kinds = ["text" if 10 <= i < 30 else "image" for i in range(40)]
    embeddings = Embeddings(write_run(tmp_path / "run", np.split(x, [10, 20, 30]), kinds))
    rows = np.array([35, 2, 39, 2, 0])
    np.testing.assert_array_equal(embeddings.gather(rows), x[rows])
    with pytest.raises(ValueError, match="1 of 2 rows asked for are not of kind image"):
        embeddings.gather(np.array([3, 15]))


def test_what_is_no_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder: .*gone"):
        Embeddings(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="not finished"):
        Embeddings(tmp_path)
    write_run(tmp_path / "run", [np.ones((5, 8), np.float32)])
    with pytest.raises(ValueError, match="kind is 'video'; expected one of image, text, any"):
        Embeddings(tmp_path / "run", "video")
    for facts, say in (
        (
            {"parts": [{"file": "part-00000.parquet", "rows": 6}]},
            "part-00000.parquet: 5 rows, the manifest says 6; was it changed",
        ),
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
        ({"parts": 3, "dim": "8"}, "dim is '8'; expected int; parts is 3; expected tuple"),
        ({"parts": [{"file": "p"}]}, r"parts\[0\] lacks rows"),
        ({"parts": ["p"]}, r"parts\[0\] is 'p'; expected a mapping of file, rows"),
        ({"parts": [{"file": "p", "rows": -1}]}, r"parts\[0\].rows is -1; expected 0 to"),
        ({"model": None}, "manifest lacks model"),
        (
            {"parts": [{"file": "../p", "rows": 1}]},
            r"parts\[0\].file is '../p'; expected a plain fi",
        ),
        ({"parts": [{"file": "/p", "rows": 1}]}, r"parts\[0\].file is '/p'; expected a plain file"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(whole | facts))
        with pytest.raises(ValueError, match=rf"^{tmp_path}/manifest.json: not a mani.*\({say}"):
            Embeddings(tmp_path)
    for content in (b"\xff", b"null"):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"^{tmp_path}/manifest.json: "):
            Embeddings(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_null_vectors_shift_no_rows(dtype, tmp_path):
    """Arrow leaves null vectors out of what it flattens: every later row was taken for the one
    before it. Null numbers were an error about copies."""
    x = np.random.default_rng(0).standard_normal((9, 4)).astype(dtype)
    rows = x.tolist()
    rows[2], rows[5] = None, [0.5, None, 1.0, 2.0]
    folder = write_run(tmp_path, [x])
    change_part(folder, "embedding", pa.array(rows, pa.list_(pa.from_numpy_dtype(dtype), 4)))
    run = Embeddings(folder)
    (block,) = run.blocks()
    good = [0, 1, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(block.vectors[good], x[good])
    assert np.isnan(block.vectors[2]).all() and np.isnan(block.vectors[5, 1])
    assert run.without_direction == {2, 5} and block.vectors.dtype == dtype
    named = [("row2", "part-00000.parquet"), ("row5", "part-00000.parquet")]
    assert [(row.id, row.file) for row in run.left_out().first] == named
    np.testing.assert_array_equal(run.gather(np.array([7, 3])), x[[7, 3]].astype(np.float32))
    with pytest.raises(
        ValueError, match="1 embeddings are null, zero or .* row5 in part-00000.par"
    ):
        run.gather(np.array([7, 5]))


def test_columns_that_embed_does_not_write_are_one_line(tmp_path):
    """Of any other type, not there, there twice, or with nulls."""
    x = np.ones((3, 4), np.float32)
    for name, column, say in (
        (
            "embedding",
            pa.array(x.tolist()),
            "'embedding' holds list<element: double>, expected vec",
        ),
        ("embedding", pa.array([[1] * 4] * 3, pa.list_(pa.int32(), 4)), "int32>.4., expected vec"),
        ("embedding", pa.array("abc"), "holds string, expected vectors of 4 float numbers"),
        ("embedding", None, "expected one column 'embedding', the columns are id, source, kind"),
        ("id", None, "expected one column 'id', the columns are source, kind, emb"),
        ("id", pa.array([1, 2, 3]), "column 'id' holds int64, expected strings"),
        ("id", pa.array(["a", None, "c"]), "1 of 3 rows have no id"),
        ("kind", pa.array(["image", None, "image"]), "1 of 3 rows have no kind"),
        ("kind", pa.array([b"image"] * 3), "column 'kind' holds binary"),
    ):
        run = Embeddings(write_run(tmp_path, [x]))
        change_part(tmp_path, name, column)
        with pytest.raises(
            ValueError, match=f"part-00000.parquet: .*{say}.*; was it changed"
        ) as got:
            list(run.blocks())
            run.ids([0])
        assert "\n" not in str(got.value)


def change_part(folder, name, column):
    """Replaces a column of the first part, or removes it."""
    path = folder / "part-00000.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    table = table.remove_column(place)
    pq.write_table(table if column is None else table.add_column(place, name, column), path)


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


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(tmp_path):
    """Peak memory of a process that then searches six times as many rows."""
    code = (
        "import sys, resource, numpy as np\n"
        "from medsiglip_jax.embeddings.store import Embeddings\n"
        "from medsiglip_jax.embeddings.nearest import top_k\n"
        "for folder in sys.argv[1:]:\n"
        "    top_k(np.ones((4, 256), np.float32), Embeddings(folder), 10)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    x, folders = np.random.default_rng(0).standard_normal((8192, 256), np.float32), []
    for count in (8, 48):
        folders.append(write_run(tmp_path / str(count), [x], row_group_size=8192))
        content = json.loads((folders[-1] / "manifest.json").read_text())
        content["parts"] *= count
        (folders[-1] / "manifest.json").write_text(json.dumps(content))
    command = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = list(map(float, done.stdout.split()))
    assert peaks[1] - peaks[0] < 100, peaks  # the 40 parts more hold 335 MB
