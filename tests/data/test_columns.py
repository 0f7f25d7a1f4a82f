"""Files of rows -> Arrow columns; what is wrong with a file is one line with its place."""

import gzip
import json
import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from medsiglip_jax.data import columns
from medsiglip_jax.data.columns import read_lines
from medsiglip_jax.data.parquet_columns import ParquetColumns


def put(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_lines_are_where_a_row_ends(tmp_path):
    path = put(tmp_path, "m.csv", 'image, text \r\na,"two\nlines"\r\n\r\nb,x\r\n')
    found, lines, refused = read_lines(path)
    assert {name: column.to_pylist() for name, column in found.items()} == {
        "image": ["a", "b"], "text": ["two\nlines", "x"],
    }  # fmt: skip
    assert list(lines) == [3, 5] and not refused


def test_a_compressed_file_is_read(tmp_path):
    path = put(tmp_path, "m.csv.gz", gzip.compress(b"image\na\n"))
    assert read_lines(path)[0]["image"].to_pylist() == ["a"]
    with pytest.raises(ValueError, match="m.csv.gz: not readable as gzip"):
        read_lines(put(tmp_path, "m.csv.gz", b"image\na\n"))


def test_cells_that_json_lacks_are_null_and_lists_are_refused(tmp_path):
    lines = [{"image": "a", "n": 1.0}, {"text": "é", "boxes": [1]}, {"boxes": {"x": 1}}]
    path = put(tmp_path, "m.jsonl", "".join(json.dumps(line) + "\n\n" for line in lines))
    found, numbers, refused = read_lines(path)
    assert found["image"].to_pylist() == ["a", None, None] and list(numbers) == [1, 3, 5]
    assert found["n"].to_pylist() == ["1", None, None]
    assert refused == {"boxes": "holds a list in line 3, expected strings"}


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("m.csv", "image,image\na,b\n", "columns given twice: 'image'"),
        ("m.csv", "image,text\na,b\nc\n", "line 3: 1 fields, expected 2"),
        ("m.csv", 'image,text\na,"b\n', "not CSV"),
        ("m.csv", b"image,text\na,\xff\n", "line 2: not UTF-8"),
        ("m.jsonl", '{"image": "a"}\n{oops\n', "line 2: not JSON"),
        ("m.jsonl", "[1]\n", "line 1: expected an object"),
    ],
)
def test_a_bad_file_is_one_message(tmp_path, name, data, message):
    path = put(tmp_path, name, data)
    with pytest.raises(ValueError, match=message) as caught:
        read_lines(path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["é", "日本", "😀"])  # of 2, 3 and 4 bytes, cut anywhere
def test_a_text_file_is_not_in_memory_as_a_string(tmp_path, monkeypatch, text):
    monkeypatch.setattr(columns, "_PART", 1 << 16)
    size = 3 << 20
    count = size // len(text.encode())
    path = put(tmp_path, "m.csv", f"\ufeffimage\n{text * count}\n")
    columns._open_text(path, "").close()
    tracemalloc.start()
    columns._open_text(path, "").close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * size  # with the text 3 to 6
    assert read_lines(path)[0]["image"].to_pylist() == [text * count]
    bad = put(tmp_path, "n.csv", f"image\n{text * count}\n".encode() + text.encode()[:1])
    with pytest.raises(ValueError, match="n.csv, line 3: not UTF-8 text"):
        read_lines(bad)


def test_a_cell_that_is_not_unicode_is_told_and_ends_nothing(tmp_path):
    path = put(tmp_path, "m.jsonl", '{"image": "a"}\n{"image": "\\ud800b"}\n')
    with pytest.warns(UserWarning, match="m.jsonl, to line 2: 1 cells are not Unicode"):
        found, *_ = read_lines(path)
    assert found["image"].to_pylist() == ["a", r"\ud800b"]


def test_columns_of_parquet_are_read_when_asked_for(tmp_path, monkeypatch):
    table = pa.table({"image": ["a"], "pixels": [b"\x89PNG"], "n": [7]})
    parquet.write_table(table, tmp_path / "m.parquet")
    found = ParquetColumns(str(tmp_path / "m.parquet"))
    read = []
    whole = parquet.ParquetFile.read
    monkeypatch.setattr(
        parquet.ParquetFile, "read", lambda self, names: (read.extend(names), whole(self, names))[1]
    )
    assert list(found) == ["image", "pixels", "n"] and found.rows == 1 and "n" in found
    assert found["image"].to_pylist() == ["a"] and found["n"].to_pylist() == [7]
    assert len(found["pixels"]) == 0 and read == ["image", "n"], "bytes are never a cell"
    with pytest.raises(KeyError):
        found["none"]
    with pytest.raises(ValueError, match="not a Parquet file"):
        ParquetColumns(put(tmp_path, "n.parquet", "image\n"))


@pytest.mark.parametrize(
    "values",
    [
        pa.array([" 1", None, "2 "]), pa.array([1, None, 2], pa.int16()),
        pa.array([1.0, np.nan, 2.0]), pa.array(["1", None, "2"]).dictionary_encode(),
    ],
)  # fmt: skip
def test_values_as_strings(values):
    assert columns.strings(values).to_pylist() == ["1", "", "2"]


# ------------------------------------------------------------------------------------- separators


@pytest.mark.parametrize("name, data, delimiter", [
    ("m.csv", "left;right\na.png;b.png\n", ";"),
    ("m.csv", "a;b\n1,5;2,5\n", ";"),  # decimal commas
    ("m.csv", "a;b, c\n1;2\n3;4\n", ";"),
    ("m.csv", "\ufeffa\tb\n1\t2\n", "\t"),
    ("m.csv", "a|b\n1|2\n", "|"),
    ("m.tsv", "a,b\n1,2\n", ","),
    ("m.tsv", 'a;b\n"1;1";2\n', ";"),
])  # fmt: skip
def test_other_separators_are_read_and_said(tmp_path, name, data, delimiter):
    path = put(tmp_path, name, data)
    with pytest.warns(UserWarning, match=re.escape(f"read as cells separated by {delimiter!r}")):
        found, *_ = read_lines(path)
    header = data.lstrip("\ufeff").splitlines()[0].split(delimiter)
    assert list(found) == header


@pytest.mark.parametrize("name, data, header", [
    ("m.csv", "image,labels\na,x;y\nb,x;z\n", ["image", "labels"]),
    ("m.csv", 'image,"a;b"\nx;1,y;2\n', ["image", "a;b"]),
    ("m.csv", "image,a|b\nx|1,y|2\n", ["image", "a|b"]),
    ("m.csv", "text\na; b\nc; d\n", ["text"]),
    ("m.csv", "a;b\n1\n2;3\n", ["a;b"]),
    ("m.csv", 'image,text\na,"x;\ny"\n', ["image", "text"]),
    ("m.tsv", "a,x\tb,x\n1,1\t2,2\n", ["a,x", "b,x"]),
    ("m.csv", "a,b\n", ["a", "b"]),
])  # fmt: skip
def test_what_the_usual_separator_fits_is_read_with_it(tmp_path, name, data, header):
    assert list(columns.read_lines(put(tmp_path, name, data))[0] or header) == header


def test_separators_of_compressed_files(tmp_path):
    found, *_ = read_lines(put(tmp_path, "m.tsv.gz", gzip.compress(b"a\tb\n1\t2\n")))
    assert {name: column.to_pylist() for name, column in found.items()} == {"a": ["1"], "b": ["2"]}
    found, *_ = read_lines(put(tmp_path, "m.jsonl.gz", gzip.compress(b'{"a": 1}\n')))
    assert found["a"].to_pylist() == ["1"]
    with pytest.warns(UserWarning, match="separated by ';'"):
        found, *_ = read_lines(put(tmp_path, "m.CSV.gz", gzip.compress(b"a;b\n1;2\n")))
    assert found["b"].to_pylist() == ["2"]


def test_a_ragged_file_says_so_with_the_usual_separator(tmp_path):
    with pytest.raises(ValueError, match="line 3: 3 fields, expected 2 as in the header"):
        read_lines(put(tmp_path, "m.csv", "a,b\n1,2\n1,2,3\n"))
