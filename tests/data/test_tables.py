"""Whatever holds the rows, the table is the same; and what is no table is refused in one line."""

import json
import re

import fsspec
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from medsiglip_jax.data import examples, inputs, tables
from medsiglip_jax.data.tables import read_table

ROWS = [
    {"image": "a.png", "text": 'left, "upper" lobe', "finding": "effusion", "patient": "p1"},
    {"image": "b/c.png", "text": "zwölf\nlines", "finding": "none", "patient": "p2"},
    {"image": "/abs/d.png", "text": "x", "finding": "effusion", "patient": "p1"},
    {"image": "gs://bucket/e.png", "text": "x", "finding": "", "patient": "p3"},
]
CSV = (
    '\ufeffimage,text,finding,patient\r\na.png,"left, ""upper"" lobe",effusion,p1\r\n'
    'b/c.png,"zwölf\nlines",none,p2\r\n\r\n/abs/d.png,x,effusion,p1\r\ngs://bucket/e.png,x,,p3\r\n'
)


@pytest.fixture(params=["csv", "tsv", "jsonl", "parquet"])
def table_file(request, tmp_path):
    path = tmp_path / f"m.{request.param}"
    if request.param == "parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif request.param == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    else:
        text = CSV if request.param == "csv" else CSV.replace("left, ", "left; ").replace(",", "\t")
        path.write_bytes(text.replace("left; ", "left, ").encode())
    return path


def test_every_format_reads_the_same(table_file):
    table = read_table(str(table_file))
    for name in ROWS[0]:
        assert table.column(name, blank=True) == [row[name] for row in ROWS]
    assert table.root == str(table_file.parent) and not table.problems
    assert table.column("split", optional=("split",)) is None and not table.problems
    found = examples.read(table, label="finding", group="patient")
    assert found.images == [
        f"{table.root}/a.png", f"{table.root}/b/c.png", "/abs/d.png", "gs://bucket/e.png",
    ]  # fmt: skip
    assert found.groups == ["p1", "p2", "p1", "p3"] and found.splits is None


def test_problems_are_collected(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("image,text\n,b\nc,\n,e\n")
    table = read_table(str(path))
    assert table.column("image") == ["", "c", ""] and table.column("patient") is None
    assert table.column("text", blank=True) == ["b", "", "e"]
    said = "column 'image', line 2: no value (2 rows in all); no column 'patient'; there are"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {said}')} image, text$"):
        table.raise_problems()


def test_what_is_no_table_is_refused(tmp_path):
    path = tmp_path / "m.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="not a table; expected .csv"):
        read_table(str(path))
    path = tmp_path / "m.csv"
    for text in ("image,text\n", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="no rows"):
            read_table(str(path))


@pytest.mark.parametrize("name", ["none.csv", "none"])
def test_a_missing_table_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
        read_table(str(tmp_path / name))


def test_a_remote_table_is_read_with_its_folder():
    with fsspec.open("memory://bucket/m.csv", "wb") as file:
        file.write(b"image\na.png\nmemory://other/b.png\n")
    found = examples.read("memory://bucket/m.csv")
    assert found.images == ["memory://bucket/a.png", "memory://other/b.png"]
    with pytest.raises(FileNotFoundError, match="memory://bucket/n.csv"):
        read_table("memory://bucket/n.csv")


def test_what_is_written_knows_its_label(tmp_path):
    columns = {"image": ["a"], "x": [1.0], "y": [None]}
    tables.write_parquet(tmp_path / "m.parquet", columns, ["x", "y"], ("x", "y"))
    table = read_table(str(tmp_path / "m.parquet"))
    assert table.label == table.classes == ("x", "y") and table.unit == "row"
    assert [table.column(n, blank=True) for n in columns] == [["a"], ["1"], [""]]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(folder / name)


def test_class_folders(tmp_path):
    touch(tmp_path, "dog/2.png", "dog/1.png", "cat/sub/3.png", "cat/.hidden.png")
    (tmp_path / "cat" / "notes.md").write_text("no image")
    with pytest.warns(UserWarning, match=f"^{tmp_path}: skipped other files .*: .md 1; --all-"):
        found = examples.read(tmp_path, captions="a {label}")
    assert [p.removeprefix(f"{tmp_path}/") for p in found.images] == [
        "cat/sub/3.png", "dog/1.png", "dog/2.png",
    ]  # fmt: skip
    assert found.classes == ("cat", "dog") and found.labels.tolist() == [0, 1, 1]
    assert found.texts == ["a cat", "a dog", "a dog"] and found.splits is None


def test_images_of_class_folders_are_those_that_embed_finds(tmp_path):
    """DICOM files without a suffix, too, which are known by their content."""
    touch(tmp_path, "cat/3.png")
    (tmp_path / "dog" / "x").mkdir(parents=True)
    (tmp_path / "dog" / "x" / "1.2.840.7").write_bytes(bytes(128) + b"DICM")
    found = examples.read(tmp_path)
    assert found.images == [row.source for row in inputs.rows([tmp_path])]
    assert found.labels.tolist() == [0, 1]
    (tmp_path / "dog" / "y.CT").write_bytes(bytes(128) + b"DICM")
    found = examples.read(tmp_path, all_files=True)
    assert found.images == [row.source for row in inputs.rows([tmp_path], all_files=True)]
    assert len(found) == 3


def test_split_folders(tmp_path):
    touch(tmp_path, "train/dog/1.png", "train/cat/2.png", "val/dog/3.png")
    found = examples.read(tmp_path)
    assert found.classes == ("cat", "dog") and found.labels.tolist() == [0, 1, 1]
    assert found.of_split("val").images == [f"{tmp_path}/val/dog/3.png"]


def test_folders_without_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        examples.read(tmp_path)
    touch(tmp_path, "1.png", "dog/2.png")
    with pytest.raises(ValueError, match="images outside of class folders"):
        examples.read(tmp_path)
