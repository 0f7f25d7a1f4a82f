"""Whatever holds the images, the rows are the same: names, order and bytes."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from medsiglip_jax.data import inputs as manifest
from medsiglip_jax.data import rows, tables
from medsiglip_jax.data.inputs import Row, Rows
from medsiglip_jax.files.places import file_system
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.sources import read_bytes

FILES = {
    "b.png": b"\x89PNG b", "sub/1.2.840.png": b"\x89PNG uid", "sub/deep/c.JPEG": b"\xff\xd8 c",
    "z.tif": b"II z",
}  # fmt: skip
WORDS = ["a lung", "zwölf\nlines", "knee", "x"]


@pytest.fixture(autouse=True)
def bucket():
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    return f"{tmp_path}/place" if request.param == "local" else "memory://bucket/place"


@pytest.fixture
def folder(place):
    """The images, among things that are none of them."""
    noise = {".hidden.png": b"x", "sub/.git/d.png": b"x", "notes.md": b"x", "list.csv": b"id\n1\n"}
    for name, content in {**FILES, **noise}.items():
        put(f"{place}/{name}", content)
    return place


def put(path, content):
    content = content.encode() if isinstance(content, str) else content
    if "://" in path:
        system, name = file_system(path)
        system.pipe_file(name, content)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    return path


def tar_of(files, format=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def contents(found):
    return {row.id: read_bytes(row.source) for row in found if row.kind == "image"}


def cells(found):
    return [(row.id, row.kind, row.text) for row in found]


def test_a_folder_is_its_images(folder):
    found = manifest.rows([folder])
    assert contents(found) == FILES and sorted(row.id for row in found) == sorted(FILES)
    assert all(row.source == f"{folder}/{row.id}" for row in found)
    assert [row.id for row in manifest.rows([f"{folder}/"])] == [row.id for row in found]


def test_remote_folders_have_the_order_of_local_ones(tmp_path):
    rng = np.random.default_rng(0)
    for depth in rng.integers(1, 5, 200):
        name = "/".join("".join(rng.choice(list("ab-z"), 2)) for _ in range(depth))
        for place in (tmp_path / "x", "memory://x"):
            put(f"{place}/{name}.png", name)
    local, remote = manifest.rows([tmp_path / "x"]), manifest.rows(["memory://x"])
    assert cells(local) == cells(remote) and contents(local) == contents(remote)


def test_a_folder_is_named_as_it_was_given(folder, tmp_path, monkeypatch):
    if "://" not in folder:
        monkeypatch.chdir(folder)
        assert manifest.rows(["."])[0].source == "b.png"
        monkeypatch.chdir(tmp_path)
        assert manifest.rows(["place//"])[0].source == "place/b.png"


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    put(f"{tmp_path}/far/x/1.png", b"1")
    put(f"{tmp_path}/near/2.png", b"2")
    for name, target in [
        ("near/link", "far"), ("near/again", "near"), ("far/x/back", "far"),
        ("far/self", "far/self"), ("near/3.png", "far/x/1.png"),
    ]:  # fmt: skip
        (tmp_path / name).symlink_to(tmp_path / target)
    found = manifest.rows([tmp_path / "near"])
    assert contents(found) == {"2.png": b"2", "3.png": b"1", "link/x/1.png": b"1"}
    (tmp_path / "given").symlink_to(tmp_path / "near")
    assert [row.id for row in manifest.rows([tmp_path / "given"])] == [row.id for row in found]
    table = tables.read_table(f"{tmp_path}/far")  # folders of classes
    assert table.columns["image"].to_pylist() == ["x/1.png"]


def test_other_files_of_folders_are_counted(place):
    assert manifest.rows([put(f"{place}/a.png", b"a")]).skipped == {}
    others = ["1.mha", "b/2.MHA", "s.tar.gz", "rows.csv", "README", "1.2.840.1", "b/c/x.mha"]
    others += ["y.svs"]  # nobody says how it is cut
    for name in [*others, ".hidden", ".git/x.py", "t.tfrecord", "b/t.txt"]:
        put(f"{place}/{name}", b"x")
    file = io.BytesIO()
    parquet.write_table(pa.table({"image": ["t.tfrecord#0:1"]}), file)
    for name in ("", "b/"):  # the index of the shard, and a table that nobody reads
        put(f"{place}/{name}{tables.INDEX}", file.getvalue())
    found = manifest.rows([place])
    assert [row.id for row in found] == ["a.png", "t.tfrecord#0:1", "b/t.txt:1"]
    want = {".mha": 3, ".svs": 1, ".tar.gz": 1, ".csv": 1, "no suffix": 2, ".parquet": 1}
    assert found.skipped == want
    with pytest.raises(ValueError, match=r"nothing to .*/c \(files skipped: .mha 1\); expected"):
        manifest.rows([f"{place}/b/c"])


def test_two_colons_are_part_of_a_name(place):
    folder = f"{place}/w::x"
    put(f"{folder}/a::b.png", b"1")
    put(f"{folder}/s::t.tar", tar_of({"k.png": b"2"}))
    put(f"{folder}/t::u.txt", "text")
    found = manifest.rows([folder])
    assert [row.id for row in found] == ["a::b.png", "k", "t::u.txt:1"]
    assert [row.id for row in manifest.rows([f"{folder}/*::*.png"])] == ["a::b.png"]
    for suffix in ("csv", "jsonl", "parquet"):
        path = write_manifest(f"{folder}/m::n.{suffix}", {"image": ["a::b.png"]})
        assert [row.source for row in manifest.rows([path])] == [f"{folder}/a::b.png"]
    assert [row.source for row in manifest.rows([f"{folder}/a::b.png"])] == [f"{folder}/a::b.png"]


def test_local_uris_are_local(tmp_path):
    put(f"{tmp_path}/d/a.png", b"1")
    path = write_manifest(f"{tmp_path}/d/m.csv", {"image": ["a.png"]})
    for given in (f"file://{tmp_path}/d", f"file://{tmp_path}/d/*.png", f"file://{path}"):
        assert contents(manifest.rows([given])) == {"a.png": b"1"}


@pytest.mark.parametrize(
    "pattern, ids",
    [
        ("**/*.png", ["b.png", "sub/1.2.840.png"]),
        ("*", ["b.png", "notes.md", "z.tif"]),
        ("sub/*/c.*", ["deep/c.JPEG"]),
        ("[bz].*", ["b.png", "z.tif"]),
    ],
)
def test_a_glob_is_the_files_that_it_matches(folder, pattern, ids):
    if pattern == "*":
        fsspec.core.url_to_fs(folder)[0].rm(f"{folder}/list.csv")
    found = manifest.rows([f"{folder}/{pattern}"])
    start = folder + "/sub" * pattern.startswith("sub")
    assert [(row.id, row.source) for row in found] == [(id, f"{start}/{id}") for id in ids]


def test_a_file_that_looks_like_a_glob_is_that_file(tmp_path):
    put(f"{tmp_path}/scan[1].png", b"1")
    put(f"{tmp_path}/scan1.png", b"2")
    assert contents(manifest.rows([tmp_path / "scan[1].png"])) == {"scan[1].png": b"1"}


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
    found = manifest.rows([write_manifest(f"{folder}/m.{suffix}", columns)])
    assert cells(found[:4]) == [(id, "image", None) for id in columns["id"]]
    assert cells(found[4:]) == [
        (id, "text", text) for id, text in zip(columns["id"], WORDS, strict=True)
    ]
    assert list(contents(found).values()) == list(FILES.values())
    assert {row.source for row in found[4:]} == {f"{folder}/m.{suffix}"}


@FORMATS
def test_empty_cells_give_no_row_and_ids_are_made_where_there_are_none(folder, suffix):
    columns = {"image": ["b.png", "", "b.png", "z.tif", ""], "text": ["b", "none", "again", "", ""]}
    found = manifest.rows([write_manifest(f"{folder}/m.{suffix}", columns)])
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
    found = manifest.rows([write_manifest(f"{tmp_path}/m.csv", {"image": images, "text": images})])
    met, ids = set(), []
    for line, image in enumerate(images, start=2):
        ids.append(image if image and image not in met else f"m.csv:{line}")
        met.add(image)
    listed = [(id, image) for id, image in zip(ids, images, strict=True) if image]
    places = [image if image[0] == "/" else f"{tmp_path}/{image}" for _, image in listed]
    assert [(r.id, r.source) for r in found[: len(listed)]] == [
        (id, place) for (id, _), place in zip(listed, places, strict=True)
    ]
    assert [(row.id, row.text) for row in found[len(listed) :]] == listed


def test_numbers_and_categories_are_ids_and_texts(tmp_path):
    table = pa.table(
        {"id": pa.array([3, 10], pa.int16()), "text": pa.array(["a", "b"]).dictionary_encode()}
    )
    parquet.write_table(table, tmp_path / "m.parquet")
    found = manifest.rows([tmp_path / "m.parquet"])
    assert cells(found) == [("3", "text", "a"), ("10", "text", "b")]


def test_columns_and_root_are_chosen(folder, tmp_path):
    absolute = put(f"{tmp_path}/elsewhere.png", b"e")
    put("memory://other/o.png", b"o")
    paths = ["b.png", absolute, "memory://other/o.png"]
    columns = {"path": paths, "note": ["1", "2", "3"], "key": ["x", "y", "z"]}
    path = write_manifest(f"{tmp_path}/lists/m.csv", columns)
    found = manifest.rows([path], image="path", text="note", id="key", root=folder)
    assert contents(found) == {"x": FILES["b.png"], "y": b"e", "z": b"o"}
    assert [row.text for row in found] == [None] * 3 + ["1", "2", "3"]
    assert len(manifest.rows([path], image="path", text=None, root=folder)) == 3
    columns["text"] = columns.pop("note")
    path = write_manifest(f"{tmp_path}/lists/m.csv", columns)
    assert [row.id for row in manifest.rows([path], id="key")] == ["x", "y", "z"]


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("path,note\na,b\n", {}, "no column 'image' or 'text'; there are path, note"),
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
        manifest.rows([path], **arguments)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_pictures_in_a_manifest_are_refused_unread(tmp_path, monkeypatch):
    table = pa.table({"image": [{"bytes": b"\x89PNG", "path": None}], "text": ["a"]})
    parquet.write_table(table, tmp_path / "m.parquet")
    assert len(manifest.rows([tmp_path / "m.parquet"], image=None)) == 1
    monkeypatch.setattr(parquet.ParquetFile, "read", forbidden := Mock())
    with pytest.raises(ValueError, match="'image' holds struct<bytes: binary.*expected strings"):
        manifest.rows([tmp_path / "m.parquet"], text=None)
    forbidden.assert_not_called()


def test_lists_and_objects_in_json_are_no_paths(place):
    lines = [{"image": "a", "boxes": [1, 2]}, {"image": ["b"]}, {"image": {"path": "c"}}]
    path = put(f"{place}/m.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError) as caught:
        manifest.rows([path])
    assert str(caught.value) == f"{path}: column 'image' holds a list in line 2, expected strings"
    put(path, json.dumps(lines[0]))
    assert [row.id for row in manifest.rows([path])] == ["a"]
    put(path, json.dumps(lines[2]))
    with pytest.raises(ValueError, match="'image' holds an object in line 1, expected strings$"):
        tables_problems(path)


def tables_problems(path):
    """As training reads it: first whether cells are empty, then the cells."""
    table = tables.read_table(path)
    table.column("image")
    table.raise_problems()


def test_ids_of_several_inputs_are_told_apart_by_paths(tmp_path):
    for name in "pq":
        put(f"{tmp_path}/{name}/a.png", name)
        put(f"{tmp_path}/{name}/t.txt", f"\n{name}\n")
        write_manifest(f"{tmp_path}/{name}/m.csv", {"image": ["./a.png", ""], "text": ["", name]})
    found = manifest.rows([tmp_path / "p", tmp_path / "q" / "a.png"])
    assert [row.id for row in found] == [
        f"{tmp_path}/p/a.png", f"{tmp_path}/p/t.txt:2", f"{tmp_path}/q/a.png",
    ]  # fmt: skip
    write_manifest(f"{tmp_path}/p/m.csv", {"image": ["./a.png", "", "/b"], "text": ["", "p", ""]})
    found = manifest.rows([tmp_path / "p" / "m.csv", tmp_path / "q" / "m.csv"])
    assert [row.id for row in found] == [
        f"{tmp_path}/p/./a.png", "/b", f"{tmp_path}/p/m.csv:3",
        f"{tmp_path}/q/./a.png", f"{tmp_path}/q/m.csv:3",
    ]  # fmt: skip


def test_ids_of_a_column_are_never_changed(tmp_path):
    one = write_manifest(f"{tmp_path}/1.csv", {"id": ["a.png", "p"], "text": ["1", "2"]})
    two = write_manifest(f"{tmp_path}/2.csv", {"id": ["q", "p"], "text": ["3", "4"]})
    image = put(f"{tmp_path}/a.png", b"")
    assert [row.id for row in manifest.rows([one, image])] == ["a.png", "p", "a.png"]
    with pytest.raises(ValueError, match="^p is given twice, the second time as .*2.csv"):
        manifest.rows([one, two])


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_shard_is_the_folder_that_was_put_in_it(place, format):
    long = {f"{'n' * 90}/{'m' * 90}.png": b"long" * 300}
    texts = {f"{os.path.splitext(name)[0]}.txt": name.encode() for name in FILES}
    noise = {"sub/.h.png": b"x", "b.json": b"{}", "b.cls": b"1", "e.txt": b" \n", "README": b"x"}
    members = {f"./{n}": c for n, c in {**FILES, **long, **texts, **noise}.items()}
    found = manifest.rows([put(f"{place}/s.tar", tar_of(members, format))])
    images = {os.path.splitext(name)[0]: content for name, content in {**FILES, **long}.items()}
    assert contents(found) == images and [r.id for r in found[: len(images)]] == list(images)
    want = [(os.path.splitext(name)[0], "text", name) for name in FILES]
    assert cells(found[len(images) :]) == want


def test_shards_are_found_and_their_equal_keys_told_apart(place):
    for name in ("1", "2"):
        put(f"{place}/{name}.tar", tar_of({"k.png": name.encode(), "k.txt": b"t"}))
    put(f"{place}/3.png", b"3")
    want = {f"{place}/1.tar/k": b"1", f"{place}/2.tar/k": b"2", f"{place}/3.png": b"3"}
    assert contents(manifest.rows([place])) == want
    del want[f"{place}/3.png"]
    for inputs in ([f"{place}/*.tar"], [f"{place}/1.tar", f"{place}/2.tar"]):
        assert contents(manifest.rows(inputs)) == want
    assert [row.id for row in manifest.rows([f"{place}/2.tar"])] == ["k", "k"]
    put(f"{place}/1.tar", tar_of({"k.png": b"", "k.jpg": b""}))
    with pytest.raises(ValueError, match="1.tar/k is given twice"):
        manifest.rows([f"{place}/1.tar"])


SHARD = tar_of({f"{i}.png": bytes([i]) * (300 * i) for i in range(5)} | {"0.txt": b"text"})


def refused(path, data, message=""):
    with pytest.raises(ValueError, match=message) as caught:
        manifest.rows([put(str(path), data)])
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


def test_a_shard_that_is_cut_off_is_refused_wherever_it_is(tmp_path):
    end = len(SHARD.rstrip(b"\0")) // 512 * 512 + 512
    for length in [*range(0, end, 101), *range(0, end + 1, 512)]:
        refused(tmp_path / "s.tar", SHARD[:length], "not a tar file, or cut off")
    put(f"{tmp_path}/s.tar", SHARD[: end + 512])
    assert len(manifest.rows([tmp_path / "s.tar"])) == 6


def test_a_damaged_shard_gives_its_rows_or_one_line(tmp_path, torture):
    rng, path = np.random.default_rng(0), f"{tmp_path}/s.tar"
    headers = np.flatnonzero([SHARD[i : i + 6] == b"ustar\0" for i in range(len(SHARD))]) - 257
    errors = 0
    for _ in range(300 * torture):
        data = bytearray(SHARD)
        at = rng.choice(headers)
        for place in rng.choice([*range(100, 160), *range(512)], rng.integers(1, 4)):
            data[at + place] = rng.choice([0, 0x30, 0x7F, 0x80, 0xFF])
        if rng.random() < 0.8:  # else the wrong sum would hide the rest
            total = sum(data[at : at + 148]) + 256 + sum(data[at + 156 : at + 512])
            data[at + 148 : at + 156] = b"%06o\0 " % total
        put(path, bytes(data))
        try:
            found = manifest.rows([path])
        except ValueError as error:
            errors += 1
            assert "\n" not in str(error) and path in str(error) and len(str(error)) < 400
        else:
            contents(found)  # no source reaches beyond the file
    assert 0 < errors < 300 * torture


def negative_size():
    """Its next header would be itself, for ever."""
    data = bytearray(tar_of({"a.png": b""}))
    data[124:136] = (-512).to_bytes(12, "big", signed=True)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    return bytes(data)


SPARSE = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}


def member_of(type, name="a.png", **fields):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type = type
        for field, value in fields.items():
            setattr(member, field, value)
        tar.addfile(member)
    return file.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (gzip.compress(SHARD), "gzip file; decompress it"),
        (b"\x28\xb5\x2f\xfd\0\0\0\0", "zstd file"),
        (b"\x89PNG and so on" * 100, "not a tar"),
        (negative_size(), "negative size"),
        (member_of(tarfile.SYMTYPE, linkname="b.png"), "a.png is a link"),
        (member_of(tarfile.LNKTYPE, linkname="b.png"), "a.png is a link"),
        (member_of(tarfile.FIFOTYPE), "a.png is not a file"),
        (member_of(tarfile.REGTYPE, pax_headers=SPARSE), "a.png is sparse"),
        (tar_of({"a.txt": b"\xff"}), "a.txt is not UTF-8"),
    ],
)  # fmt: skip
def test_a_shard_without_places_for_its_images_is_refused(tmp_path, data, message):
    refused(tmp_path / "s.tar", data, message)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst"])
def test_a_compressed_shard_is_not_taken_for_an_image(tmp_path, suffix):
    refused(tmp_path / f"s{suffix}", gzip.compress(SHARD), "gzip file; decompress")


def tfrecords(place):
    """As `data.write_tfrecords` leaves them; only the index knows what is in the shards."""
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
    for inputs, images in [
        ([place], want), ([f"{place}/1.0.0"], want), ([f"{place}/1.0.0/*.tfrecord"], want),
        ([f"{place}/1.0.0/00000-of-00002.tfrecord"], first), ([f"{place}/*/*0-of-*"], first),
        ([f"{place}/1.0.0/{tables.INDEX}"], want),
    ]:  # fmt: skip
        found = manifest.rows(inputs, image="path", root="/no") if inputs == [place] else None
        found = found or manifest.rows(inputs)
        assert contents(found) == {id: name.encode() for id, name in images.items()}
        texts = [("t0", "t1")[i] for i in range(len(images))]
        assert cells(found[len(images) :]) == [
            (id, "text", text) for id, text in zip(images, texts, strict=True)
        ]
    put(f"{place}/1.0.0/new.tfrecord", b"")
    with pytest.raises(ValueError, match="has no rows of new.tfrecord"):
        manifest.rows([place])
    put(f"{place}/other/x.tfrecord-00000-of-00001", b"")
    with pytest.raises(FileNotFoundError, match=r"no manifest.parquet .*other; data.index_tfrec"):
        manifest.rows([f"{place}/other"])


def test_all_that_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        manifest.rows([folder, f"{folder}/none.png", f"{folder}/*.dcm", "no/where", "memory://x/y"])
    want = f"no such file or folder: {folder}/none.png, {folder}/*.dcm, no/where, memory://x/y"
    assert str(caught.value) == want
    with pytest.raises(ValueError, match="nothing to embed in no input"):
        manifest.rows([])
    with pytest.raises(ValueError, match="nowhere://a: nowhere:// cannot be reached"):
        manifest.rows(["nowhere://a"])


def test_a_name_that_no_table_can_hold_is_one_image_that_cannot_be_read(tmp_path):
    for name in (b"\xfe.png", b"\xff.png", b"a.png", b"\xff.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"a line")
    found = {row.id: row for row in manifest.rows([tmp_path])}
    assert list(found) == ["a.png", r"\udcfe.png", r"\udcff.png", r"\udcff.txt:1"]
    assert found[r"\udcff.txt:1"].text == "a line"
    with pytest.raises(UnreadableImage, match="no such file"):
        read_bytes(found[r"\udcff.png"].source)
    member = tar_of({os.fsdecode(b"\xff.png"): b"7"})
    assert contents(manifest.rows([put(f"{tmp_path}/s.tar", member)])) == {r"\udcff": b"7"}


def test_texts_are_lines(place):
    path = put(f"{place}/t.TXT", "\ufeffone\r\n\n two \n")
    assert cells(manifest.rows([path])) == [("t.TXT:1", "text", "one"), ("t.TXT:3", "text", "two")]
    put(path, "one\x0cline\u2028of\x85four\x1cparts\rtwo")
    assert [row.text for row in manifest.rows([path])] == [
        "one\x0cline\u2028of\x85four\x1cparts", "two",
    ]  # fmt: skip
    put(path, b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"t.TXT, line 2: not UTF-8"):
        manifest.rows([path])


def some_rows(n=70_000):
    ids = (f"{i}" for i in range(n))
    kinds = ("image" if i % 3 else "text" for i in range(n))
    texts = ("" if i % 2 else None for i in range(n))
    return list(zip(ids, (f"/{i}" for i in range(n)), kinds, texts, strict=True))


def test_rows_are_a_sequence():
    want = [Row(*cells) for cells in some_rows()]
    found = Rows(rows.from_tuples(some_rows()))
    assert list(found) == want and len(found) == len(want)
    assert found[66_000] == want[66_000] and found[-1] == want[-1]
    for part in (slice(65_530, 65_540), slice(-3, None), slice(9, 2), slice(None, None, -20_000)):
        assert isinstance(found[part], Rows) and list(found[part]) == want[part]
    assert found[5:][2:4][1] == want[8]
    with pytest.raises(IndexError):
        found[len(want)]


def test_the_digest_is_of_the_cells_alone():
    cells = some_rows(1000)
    found = Rows(rows.from_tuples(cells))
    digest = found.sha256()
    pieces = [found[i : i + 7].table for i in range(0, 1000, 7)]
    assert Rows(pa.concat_tables(pieces)).sha256() == digest
    assert Rows(pa.concat_tables(pieces).combine_chunks()).sha256() == digest
    assert found[3:8].sha256() == Rows(rows.from_tuples(cells[3:8])).sha256()
    digests = {digest, found[1:].sha256(), found[:0].sha256()}
    for changes in [
        {500: ("é", "/500", "image", None)}, {500: ("abc", "/500", "image", None)},
        {500: ("500", "/x", "image", None)}, {500: ("500", "/500", "text", None)},
        {500: ("500", "/500", "image", "t")},
        {10: ("101", *cells[10][1:]), 11: ("1", *cells[11][1:])},  # the same bytes, cut elsewhere
        {0: (*cells[0][:3], ""), 1: (*cells[1][:3], None)},
    ]:  # fmt: skip
        changed = [changes.get(i, row) for i, row in enumerate(cells)]
        assert len(changed) == 1000 and changed != cells
        digests.add(Rows(rows.from_tuples(changed)).sha256())
    assert len(digests) == 10


@pytest.mark.parametrize("collide", [False, True])
def test_rows_seen_before(monkeypatch, collide):
    if collide:
        monkeypatch.setattr(rows, "hash", lambda row: len(row[1]), raising=False)
    rng = np.random.default_rng(0)
    kinds, ids = rng.choice(["a", "b"], 20_000), rng.integers(0, 30_000, 20_000).astype(str)
    met, want = set(), []
    for row in zip(kinds, ids, strict=True):
        want.append(row in met)
        met.add(row)
    columns = pa.chunked_array([kinds.tolist()]), pa.chunked_array([ids[:99], ids[99:]])
    assert rows.seen_before(*columns).tolist() == want
    assert any(want) and not rows.seen_before(pa.chunked_array([[]], pa.string())).any()


@pytest.mark.parametrize("given", [("image", "text", "id"), ("image", "text"), ("text",)])
def test_a_long_manifest_is_not_python_objects(tmp_path, given):
    n = 50_000
    columns = {"image": [f"images/{i}.png" for i in range(n)]}
    columns |= {"text": [f"text {i}" for i in range(n)], "id": [str(i) for i in range(n)]}
    write_manifest(f"{tmp_path}/m.csv", {name: columns[name] for name in given})
    table = pa.table({name: columns[name] for name in given})
    parquet.write_table(table, tmp_path / "m.parquet")
    manifest.rows([tmp_path / "m.parquet"])  # what is imported for it
    tracemalloc.start()
    found = manifest.rows([tmp_path / "m.parquet"])
    found.sha256()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Measured: 55 bytes, the hashes and their order; one string would be as much, a Row twice that.
    assert peak / len(found) < 80 and len(found) == n * (1 + ("image" in given))
