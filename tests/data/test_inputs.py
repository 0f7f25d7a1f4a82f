"""Whatever holds the images, the rows are the same: names, order and bytes."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from image_files import FILES, cells, contents, put
from pyarrow import parquet

from medsiglip_jax.data import examples, inputs, tables
from medsiglip_jax.preprocess.sources import read_bytes

WORDS = ["a lung", "zwölf\nlines", "knee", "x"]


def tar_of(files, format=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_other_files_of_folders_are_counted(place):
    assert inputs.rows([put(f"{place}/a.png", b"a")]).skipped == {}
    others = ["1.mha", "b/2.MHA", "s.tar.gz", "rows.csv", "README", "1.2.840.1", "b/c/x.mha"]
    others += ["y.svs"]  # nobody says how it is cut
    for name in [*others, ".hidden", ".git/x.py", "t.tfrecord", "b/t.txt"]:
        put(f"{place}/{name}", b"x")
    file = io.BytesIO()
    parquet.write_table(pa.table({"image": ["t.tfrecord#0:1"]}), file)
    for name in ("", "b/"):  # the index of the shard, and a table that nobody reads
        put(f"{place}/{name}{tables.INDEX}", file.getvalue())
    found = inputs.rows([place])
    assert [row.id for row in found] == ["a.png", "t.tfrecord#0:1", "b/t.txt:1"]
    want = {".mha": 3, ".svs": 1, ".tar.gz": 1, ".csv": 1, "no suffix": 2, ".parquet": 1}
    assert found.skipped == want
    with pytest.raises(ValueError, match=r"nothing to .*/c \(files skipped: .mha 1\); expected"):
        inputs.rows([f"{place}/b/c"])


def test_two_colons_are_part_of_a_name(place):
    folder = f"{place}/w::x"
    put(f"{folder}/a::b.png", b"1")
    put(f"{folder}/s::t.tar", tar_of({"k.png": b"2"}))
    put(f"{folder}/t::u.txt", "text")
    found = inputs.rows([folder])
    assert [row.id for row in found] == ["a::b.png", "k", "t::u.txt:1"]
    assert [row.id for row in inputs.rows([f"{folder}/*::*.png"])] == ["a::b.png"]
    for suffix in ("csv", "jsonl", "parquet"):
        path = write_manifest(f"{folder}/m::n.{suffix}", {"image": ["a::b.png"]})
        assert [row.source for row in inputs.rows([path])] == [f"{folder}/a::b.png"]
    assert [row.source for row in inputs.rows([f"{folder}/a::b.png"])] == [f"{folder}/a::b.png"]


def test_local_uris_are_local(tmp_path):
    put(f"{tmp_path}/d/a.png", b"1")
    path = write_manifest(f"{tmp_path}/d/m.csv", {"image": ["a.png"]})
    for given in (f"file://{tmp_path}/d", f"file://{tmp_path}/d/*.png", f"file://{path}"):
        assert contents(inputs.rows([given])) == {"a.png": b"1"}


def write_manifest(path, columns):
    names, lines = list(columns), list(zip(*columns.values(), strict=True))
    if path.endswith(".parquet"):
        file = io.BytesIO()
        columns = {n: [cell or None for cell in column] for n, column in columns.items()}
        parquet.write_table(pa.table(columns), file, row_group_size=2)
        return put(path, file.getvalue())
    if path.endswith(".jsonl"):
        objects = [{n: cell for n, cell in zip(names, line, strict=True) if cell} for line in lines]
        return put(path, "".join(json.dumps(o) + "\n" for o in objects))
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in [names, *lines]]
    separator = "\t" if path.endswith(".tsv") else ","
    return put(path, "".join(separator.join(line) + "\r\n" for line in quoted))


FORMATS = pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])


@FORMATS
def test_a_manifest_is_all_its_images_then_all_its_texts(folder, suffix):
    columns = {"text": WORDS, "id": ["7", "p,1", "ü", "0"], "image": list(FILES)}
    found = inputs.rows([write_manifest(f"{folder}/m.{suffix}", columns)])
    assert cells(found[:4]) == [(id, "image", None) for id in columns["id"]]
    assert cells(found[4:]) == [
        (id, "text", text) for id, text in zip(columns["id"], WORDS, strict=True)
    ]
    assert list(contents(found).values()) == list(FILES.values())
    assert {row.source for row in found[4:]} == {f"{folder}/m.{suffix}"}


@FORMATS
def test_empty_cells_give_no_row_and_ids_are_made_where_there_are_none(folder, suffix):
    columns = {"image": ["b.png", "", "b.png", "z.tif", ""], "text": ["b", "none", "again", "", ""]}
    found = inputs.rows([write_manifest(f"{folder}/m.{suffix}", columns)])
    first = 2 if suffix in ("csv", "tsv") else 1  # the line of the first row
    second, third = f"m.{suffix}:{first + 1}", f"m.{suffix}:{first + 2}"
    assert cells(found) == [
        ("b.png", "image", None), (third, "image", None), ("z.tif", "image", None),
        ("b.png", "text", "b"), (second, "text", "none"), (third, "text", "again"),
    ]  # fmt: skip
    assert contents(found)[third] == FILES["b.png"]


def test_rows_are_the_same_on_both_sides_of_a_block(tmp_path):
    rng, n = np.random.default_rng(0), 70_000
    picked = rng.integers(0, n, n).tolist()
    images = [f"{'/' * (i % 3 == 0)}{i}.png" if i % 50 else "" for i in picked]
    found = inputs.rows([write_manifest(f"{tmp_path}/m.csv", {"image": images, "text": images})])
    met, ids = set(), []
    for line, image in enumerate(images, start=2):
        ids.append(image if image and image not in met else f"m.csv:{line}")
        met.add(image)
    listed = [(id, image) for id, image in zip(ids, images, strict=True) if image]
    places = [image if image[0] == "/" else f"{tmp_path}/{image}" for _, image in listed]
    columns = {name: found.table.column(name).to_pylist() for name in ("id", "source", "text")}
    assert columns["id"] == [id for id, _ in listed] * 2
    assert columns["source"][: len(listed)] == places
    assert columns["text"][len(listed) :] == [image for _, image in listed]


def test_numbers_and_categories_are_ids_and_texts(tmp_path):
    table = pa.table(
        {"id": pa.array([3, 10], pa.int16()), "text": pa.array(["a", "b"]).dictionary_encode()}
    )
    parquet.write_table(table, tmp_path / "m.parquet")
    found = inputs.rows([tmp_path / "m.parquet"])
    assert cells(found) == [("3", "text", "a"), ("10", "text", "b")]


def test_columns_and_root_are_chosen(folder, tmp_path):
    absolute = put(f"{tmp_path}/elsewhere.png", b"e")
    put("memory://other/o.png", b"o")
    paths = ["b.png", absolute, "memory://other/o.png"]
    columns = {"path": paths, "note": ["1", "2", "3"], "key": ["x", "y", "z"]}
    path = write_manifest(f"{tmp_path}/lists/m.csv", columns)
    found = inputs.rows([path], image="path", text="note", id="key", root=folder)
    assert contents(found) == {"x": FILES["b.png"], "y": b"e", "z": b"o"}
    assert [row.text for row in found] == [None] * 3 + ["1", "2", "3"]
    assert len(inputs.rows([path], image="path", text=None, root=folder)) == 3
    columns["text"] = columns.pop("note")
    path = write_manifest(f"{tmp_path}/lists/m.csv", columns)
    assert [row.id for row in inputs.rows([path], image=None, id="key")] == ["x", "y", "z"]


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("scan,note\na,b\n", {}, "no column 'image' or 'text'; there are scan, note; name it"),
        ("image\na\n", {"text": "note"}, "no column 'note'; there are image"),
        ("x\na\n", {"text": "note", "id": "key"}, "no column 'note'.*; no column 'key'"),
        (
            "id,image\np1,a\np2,b\np1,c\np2,c\n", {},
            r"column 'id': 'p1' in line 2 and line 4 \(2 such rows\)",
        ),
        ("id,image,text\n1,a,x\n,,\n,b,y\n,,z\n", {}, r"'id', line 4: no value \(2 rows in all\)"),
        ("image,text\na,b\nc\n", {}, "line 3: 1 fields, expected 2"),
        ("image\n", {}, "no rows"),
    ],
)  # fmt: skip
def test_a_bad_manifest_is_one_line(tmp_path, text, arguments, message):
    path = put(f"{tmp_path}/m.csv", text)
    with pytest.raises(ValueError, match=message) as caught:
        inputs.rows([path], **arguments)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # of Hugging Face's datasets


def test_pictures_in_parquet_are_images(place):
    """Named as they were outside, or by their row where they had no name or that of another."""
    cells = [
        {"bytes": b"\x89PNG 0", "path": "a.png"}, {"bytes": b"\x89PNG 1", "path": None},
        {"bytes": None, "path": "b.png"}, None, {"bytes": b"\xff\xd8 4", "path": "a.png"},
    ]  # fmt: skip
    table = pa.table({"image": pa.array(cells, IMAGE), "text": ["0", "1", "2", "3", ""]})
    want = {"a.png": b"\x89PNG 0", "m.parquet:2": b"\x89PNG 1", "b.png": b"outside"}
    want["m.parquet:5"] = b"\xff\xd8 4"
    put(f"{place}/b.png", b"outside")
    for name, rows in (("m.parquet", table), ("n.parquet", table[:2])):
        parquet.write_table(rows, file := io.BytesIO(), row_group_size=2)
        put(f"{place}/{name}", file.getvalue())
    found = inputs.rows([f"{place}/m.parquet"])
    assert contents(found) == want
    assert [row.id for row in found[4:]] == ["a.png", "m.parquet:2", "b.png", "m.parquet:4"]
    assert found[1].source == f"{place}/m.parquet#row=1,image"
    both = inputs.rows([f"{place}/m.parquet", f"{place}/n.parquet"], text=None)
    assert len(both) == 6 and f"{place}/n.parquet/a.png" in contents(both)
    plain = pa.table({"image": [b"\x89PNG", None, b""]})  # without names
    parquet.write_table(plain, file := io.BytesIO())
    found = inputs.rows([put(f"{place}/p.parquet", file.getvalue())])
    assert contents(found) == {"p.parquet:1": b"\x89PNG"}
    assert found.skipped == {"table rows without an image or a text": 2}


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.binary(4)], ids=str)
def test_bytes_of_any_type_are_pictures(tmp_path, kind):
    """None is taken for a path; the name of the column may have blanks around it."""
    held = pa.array([b"\x89PNG", None, b"GIF8"], kind)
    parquet.write_table(pa.table({" image": held, "text": list("abc")}), tmp_path / "m.parquet")
    found = inputs.rows([tmp_path / "m.parquet"])
    assert contents(found) == {"m.parquet:1": b"\x89PNG", "m.parquet:3": b"GIF8"}


def test_a_column_that_is_called_like_the_path_of_another_is_another(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array([{"bytes": b"\x89PNG", "path": "a.png"}], kind)
    parquet.write_table(
        pa.table({"image.path": ["b.png"], "image": pictures}), tmp_path / "m.parquet"
    )
    assert contents(inputs.rows([tmp_path / "m.parquet"])) == {"a.png": b"\x89PNG"}


def test_pictures_in_parquet_are_not_read_when_they_are_listed(tmp_path, monkeypatch):
    table = pa.table({"image": pa.array([{"bytes": b"\x89PNG", "path": "a"}], IMAGE)})
    parquet.write_table(table, tmp_path / "m.parquet")
    read, whole = [], parquet.ParquetFile.read
    monkeypatch.setattr(
        parquet.ParquetFile, "read", lambda self, names: (read.extend(names), whole(self, names))[1]
    )
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", forbidden := Mock())
    assert len(inputs.rows([tmp_path / "m.parquet"])) == 1 and read == ["image.path"]
    forbidden.assert_not_called()


def test_lists_and_objects_in_json_are_no_paths(place):
    lines = [{"image": "a", "boxes": [1, 2]}, {"image": ["b"]}, {"image": {"path": "c"}}]
    path = put(f"{place}/m.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError) as caught:
        inputs.rows([path])
    assert str(caught.value) == f"{path}: column 'image' holds a list in line 2, expected strings"
    put(path, json.dumps(lines[0]))
    assert [row.id for row in inputs.rows([path])] == ["a"]
    put(path, json.dumps(lines[2]))
    with pytest.raises(ValueError, match="'image' holds an object in line 1, expected strings$"):
        examples.read(path)


def test_ids_of_several_inputs_are_told_apart_by_paths(tmp_path):
    for name in "pq":
        put(f"{tmp_path}/{name}/a.png", name)
        put(f"{tmp_path}/{name}/t.txt", f"\n{name}\n")
        write_manifest(f"{tmp_path}/{name}/m.csv", {"image": ["./a.png", ""], "text": ["", name]})
    found = inputs.rows([tmp_path / "p", tmp_path / "q" / "a.png"])
    assert [row.id for row in found] == [
        f"{tmp_path}/p/a.png", f"{tmp_path}/p/t.txt:2", f"{tmp_path}/q/a.png",
    ]  # fmt: skip
    write_manifest(f"{tmp_path}/p/m.csv", {"image": ["./a.png", "", "/b"], "text": ["", "p", ""]})
    found = inputs.rows([tmp_path / "p" / "m.csv", tmp_path / "q" / "m.csv"])
    assert [row.id for row in found] == [
        f"{tmp_path}/p/./a.png", "/b", f"{tmp_path}/p/m.csv:3",
        f"{tmp_path}/q/./a.png", f"{tmp_path}/q/m.csv:3",
    ]  # fmt: skip


def test_ids_of_a_column_are_never_changed(tmp_path):
    one = write_manifest(f"{tmp_path}/1.csv", {"id": ["a.png", "p"], "text": ["1", "2"]})
    two = write_manifest(f"{tmp_path}/2.csv", {"id": ["q", "p"], "text": ["3", "4"]})
    image = put(f"{tmp_path}/a.png", b"")
    assert [row.id for row in inputs.rows([one, image])] == ["a.png", "p", "a.png"]
    with pytest.raises(ValueError, match="^p is given twice, the second time as .*2.csv"):
        inputs.rows([one, two])


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_shard_is_the_folder_that_was_put_in_it(place, format):
    long = {f"{'n' * 90}/{'m' * 90}.png": b"long" * 300}
    texts = {f"{os.path.splitext(name)[0]}.txt": name.encode() for name in FILES}
    noise = {"sub/.h.png": b"x", "c.json": b"{}", "b.cls": b"1", "e.txt": b" \n", "README": b"x"}
    members = {f"./{n}": c for n, c in {**FILES, **long, **texts, **noise}.items()}
    found = inputs.rows([put(f"{place}/s.tar", tar_of(members, format))])
    images = {os.path.splitext(name)[0]: content for name, content in {**FILES, **long}.items()}
    assert contents(found) == images and [r.id for r in found[: len(images)]] == list(images)
    want = [(os.path.splitext(name)[0], "text", name) for name in FILES]
    assert cells(found[len(images) :]) == want
    assert found.skipped == {".cls": 1, ".json": 1, "no suffix": 1}


def test_shards_are_found_and_their_equal_keys_told_apart(place):
    for name in ("1", "2"):
        put(f"{place}/{name}.tar", tar_of({"k.png": name.encode(), "k.txt": b"t"}))
    put(f"{place}/3.png", b"3")
    want = {f"{place}/1.tar/k": b"1", f"{place}/2.tar/k": b"2", f"{place}/3.png": b"3"}
    assert contents(inputs.rows([place])) == want
    del want[f"{place}/3.png"]
    for given in ([f"{place}/*.tar"], [f"{place}/1.tar", f"{place}/2.tar"]):
        assert contents(inputs.rows(given)) == want
    assert [row.id for row in inputs.rows([f"{place}/2.tar"])] == ["k", "k"]


SHARD = tar_of({f"{i}.png": bytes([i]) * (300 * i) for i in range(5)} | {"0.txt": b"text"})


def refused(path, data, message=""):
    with pytest.raises(ValueError, match=message) as caught:
        inputs.rows([put(str(path), data)])
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


def test_a_shard_that_is_cut_off_is_refused_wherever_it_is(tmp_path):
    end = len(SHARD.rstrip(b"\0")) // 512 * 512 + 512
    for length in [*range(0, end, 101), *range(0, end + 1, 512)]:
        refused(tmp_path / "s.tar", SHARD[:length], "not a tar file, or cut off")
    put(f"{tmp_path}/s.tar", SHARD[: end + 512])
    assert len(inputs.rows([tmp_path / "s.tar"])) == 6


def test_a_damaged_shard_gives_its_rows_or_one_line(tmp_path, torture):
    rng, path = np.random.default_rng(0), f"{tmp_path}/s.tar"
    headers = np.flatnonzero([SHARD[i : i + 6] == b"ustar\0" for i in range(len(SHARD))]) - 257
    errors = 0
    for _ in range(150 * torture):
        data = bytearray(SHARD)
        at = rng.choice(headers)
        for place in rng.choice([*range(100, 160), *range(512)], rng.integers(1, 4)):
            data[at + place] = rng.choice([0, 0x30, 0x7F, 0x80, 0xFF])
        if rng.random() < 0.8:  # else the wrong sum would hide the rest
            total = sum(data[at : at + 148]) + 256 + sum(data[at + 156 : at + 512])
            data[at + 148 : at + 156] = b"%06o\0 " % total
        put(path, bytes(data))
        try:
            found = inputs.rows([path])
        except ValueError as error:
            errors += 1
            assert "\n" not in str(error) and path in str(error) and len(str(error)) < 400
        else:
            contents(found)  # no source reaches beyond the file
    assert 0 < errors < 150 * torture


def negative_size():
    """Its next header would be itself, for ever."""
    data = bytearray(tar_of({"a.png": b""}))
    data[124:136] = (-512).to_bytes(12, "big", signed=True)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    return bytes(data)


@pytest.mark.parametrize(
    "data, message",
    [
        (gzip.compress(SHARD), "gzip file; decompress it"),
        (b"\x28\xb5\x2f\xfd\0\0\0\0", "zstd file"),
        (b"\x89PNG and so on" * 100, "not a tar"),
        (negative_size(), "negative size"),
    ],
)  # fmt: skip
def test_a_shard_without_places_for_its_images_is_refused(tmp_path, data, message):
    refused(tmp_path / "s.tar", data, message)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst"])
def test_a_compressed_shard_is_not_taken_for_an_image(tmp_path, suffix):
    refused(tmp_path / f"s{suffix}", gzip.compress(SHARD), "gzip file; decompress")


def tfrecords(place):
    """As `tfrecord.write_shards` leaves them; only the index knows what is in the shards."""
    names = [f"0000{i}-of-00002.tfrecord" for i in range(2)]
    for name in names:
        put(f"{place}/{name}", f"....{name}....")
    images = [f"{name}#4:{len(name)}" for name in names]
    file = io.BytesIO()
    parquet.write_table(pa.table({"image": images, "text": ["t0", "t1"]}), file)
    put(f"{place}/{tables.INDEX}", file.getvalue())
    return dict(zip(images, names, strict=True))


def test_tfrecord_shards_are_read_through_their_index(place):
    want = tfrecords(f"{place}/1.0.0")
    first = dict(list(want.items())[:1])
    for given, images in [
        ([place], want), ([f"{place}/1.0.0"], want), ([f"{place}/1.0.0/*.tfrecord"], want),
        ([f"{place}/1.0.0/00000-of-00002.tfrecord"], first), ([f"{place}/*/*0-of-*"], first),
        ([f"{place}/1.0.0/{tables.INDEX}"], want),
    ]:  # fmt: skip
        found = inputs.rows(given, image="path", root="/no") if given == [place] else None
        found = found or inputs.rows(given)
        assert contents(found) == {id: name.encode() for id, name in images.items()}
        texts = [("t0", "t1")[i] for i in range(len(images))]
        assert cells(found[len(images) :]) == [
            (id, "text", text) for id, text in zip(images, texts, strict=True)
        ]
    put(f"{place}/1.0.0/new.tfrecord", b"")
    with pytest.raises(ValueError, match="has no rows of new.tfrecord"):
        inputs.rows([place])
    put(f"{place}/other/x.tfrecord-00000-of-00001", b"")
    with pytest.raises(FileNotFoundError, match=r"no index manifest.parquet .*other; make"):
        inputs.rows([f"{place}/other"])


def test_all_that_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        inputs.rows([folder, f"{folder}/none.png", f"{folder}/*.dcm", "no/where", "memory://x/y"])
    want = f"no such file or folder: {folder}/none.png, {folder}/*.dcm, no/where, memory://x/y"
    assert str(caught.value) == want
    with pytest.raises(ValueError, match="nothing to embed in no input"):
        inputs.rows([])
    with pytest.raises(ValueError, match="nowhere://a: nowhere:// cannot be reached"):
        inputs.rows(["nowhere://a"])


def test_a_file_whose_name_no_table_can_hold_is_found_by_its_escaped_name(tmp_path):
    for name in (b"\xfe.png", b"\xff.png", b"a.png", b"\xff.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"a line")
    found = {row.id: row for row in inputs.rows([tmp_path])}
    assert list(found) == ["a.png", r"\udcfe.png", r"\udcff.png", r"\udcff.txt:1"]
    assert found[r"\udcff.txt:1"].text == "a line"
    assert read_bytes(found[r"\udcff.png"].source) == b"a line"
    member = tar_of({os.fsdecode(b"\xff.png"): b"7"})
    assert contents(inputs.rows([put(f"{tmp_path}/s.tar", member)])) == {r"\udcff": b"7"}


def test_texts_are_lines(place):
    path = put(f"{place}/t.TXT", "\ufeffone\r\n\n two \n")
    assert cells(inputs.rows([path])) == [("t.TXT:1", "text", "one"), ("t.TXT:3", "text", "two")]
    put(path, "one\x0cline\u2028of\x85four\x1cparts\rtwo")
    assert [row.text for row in inputs.rows([path])] == [
        "one\x0cline\u2028of\x85four\x1cparts", "two",
    ]  # fmt: skip
    put(path, b"a\n\xff\nb\n")
    found = inputs.rows([path])
    assert [(row.id, row.text) for row in found] == [
        ("t.TXT:1", "a"), ("t.TXT:2", ""), ("t.TXT:3", "b"),
    ]  # fmt: skip
    assert found.reasons == [None, "line 2: not UTF-8 text (invalid start byte)", None]
    (row,) = inputs.rows([put(path, "a\nb\n".encode("utf-16"))])
    assert row.reason is not None and "UTF-16" in row.reason


def test_lines_that_name_images_are_images(tmp_path):
    put(f"{tmp_path}/in/a.png", b"1")
    put(f"{tmp_path}/b.JPG", b"2")
    path = put(f"{tmp_path}/in/list.txt", f"a.png\n\n{tmp_path}/b.JPG\na.png\n")
    with pytest.warns(UserWarning, match="list.txt: its lines are read as names of images"):
        found = inputs.rows([path])
    assert contents(found) == {"a.png": b"1", f"{tmp_path}/b.JPG": b"2", "list.txt:4": b"1"}
    with pytest.warns(UserWarning, match="read as names"):
        found = inputs.rows([path], root=tmp_path)
    assert found[0].source == f"{tmp_path}/a.png"
    found = inputs.rows([tmp_path / "in"])
    assert contents(found) == {"a.png": b"1"} and found.skipped == {"lists of images (.txt)": 1}
    put(path, "a.png\na text\n")
    with pytest.warns(UserWarning, match="1 of its 2 lines are names of images"):
        assert [row.kind for row in inputs.rows([path])] == ["text", "text"]


@pytest.mark.parametrize("given", [("image", "text", "id"), ("image", "text"), ("text",)])
def test_a_long_manifest_is_not_python_objects(tmp_path, given):
    n = 50_000
    columns = {"image": [f"images/{i}.png" for i in range(n)]}
    columns |= {"text": [f"text {i}" for i in range(n)], "id": [str(i) for i in range(n)]}
    write_manifest(f"{tmp_path}/m.csv", {name: columns[name] for name in given})
    table = pa.table({name: columns[name] for name in given})
    parquet.write_table(table, tmp_path / "m.parquet")
    inputs.rows([tmp_path / "m.parquet"])  # what is imported for it
    tracemalloc.start()
    found = inputs.rows([tmp_path / "m.parquet"])
    found.sha256()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Measured: 55 bytes, the hashes and their order; one string would be as much, a Row twice that.
    assert peak / len(found) < 80 and len(found) == n * (1 + ("image" in given))
