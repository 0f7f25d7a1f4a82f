"""WebDataset shards: no member is lost, and a bad one costs no other."""

import io
import json
import tarfile
import tracemalloc
from collections import Counter

import pytest
from image_files import cells, contents, put
from PIL import Image
from test_inputs import tar_of

from medsiglip_jax.data import examples, inputs, tables, tar
from medsiglip_jax.preprocess.parts import Parts
from medsiglip_jax.preprocess.sources import read_bytes


def pairs(tmp_path, members):
    """(key, kind, text or reason) of what is in a shard of these members, and what is skipped."""
    skipped = Counter()
    path = put(f"{tmp_path}/s.tar", tar_of(members))
    found = [(e.key, e.kind, e.reason or e.text) for e in tar.entries(path, skipped)]
    return found, dict(skipped)


@pytest.mark.parametrize(
    "members, want",
    [
        ({"s.input.jpg": b"", "s.outputs.txt": b"t"}, [("s", "image", None), ("s", "text", "t")]),
        (  # a DICOM UID has dots of its own
            {"1.2.840.7.input.dcm": b"", "1.2.840.7.outputs.txt": b"t"},
            [("1.2.840.7", "image", None), ("1.2.840.7", "text", "t")],
        ),
        ({"1.2.dcm": b"", "1.3.dcm": b""}, [("1.2", "image", None), ("1.3", "image", None)]),
        (
            {"d/a.b.png": b"", "d/a.b.json": b'"t"'},
            [("d/a.b", "image", None), ("d/a.b", "text", "t")],
        ),
        (  # which image the text belongs to, nobody says
            {"0.left.jpg": b"", "0.right.jpg": b"", "0.txt": b"t"},
            [("0.left", "image", None), ("0.right", "image", None), ("0", "text", "t")],
        ),
        ({"v.final.jpg": b""}, [("v.final", "image", None)]),
    ],
)
def test_the_key_is_what_makes_a_pair(tmp_path, members, want):
    assert pairs(tmp_path, members) == (want, {})


def test_captions_are_those_of_img2dataset(tmp_path):
    """.txt and .json of the same key say the same; one of them may be missing or empty."""
    said = lambda **content: json.dumps({"url": "http://x", "width": 9, **content}).encode()  # noqa: E731
    members = {
        "0.jpg": b"", "0.json": said(caption="zero"),
        "1.jpg": b"", "1.json": said(caption="one"), "1.txt": b"one, as text",
        "2.jpg": b"", "2.json": said(caption=None),
        "3.jpg": b"", "3.txt": b" ", "3.json": said(Caption="three"),
    }  # fmt: skip
    found, skipped = pairs(tmp_path, members)
    texts = {key: text for key, kind, text in found if kind == "text"}
    assert texts == {"0": "zero", "1": "one, as text", "3": "three"} and skipped == {".json": 1}
    assert [key for key, kind, _ in found if kind == "image"] == list("0123")


def test_what_is_wrong_with_a_member_is_its_own_row(tmp_path):
    members = {
        "0.jpg": b"", "0.png": b"", "0.txt": b"t",
        "1.jpg": b"", "1.txt": "café".encode("latin1"),
        "2.jpg": b"", "2.json": b"{", "3.jpg": b"",
    }  # fmt: skip
    found, _ = pairs(tmp_path, members)
    good, bad = ([e for e in found if (e[0] in members) == is_bad] for is_bad in (False, True))
    assert good == [
        ("0", "image", None), ("0", "text", "t"), *((key, "image", None) for key in "123"),
    ]  # fmt: skip
    assert [(key, kind) for key, kind, _ in bad] == [
        ("0.png", "image"), ("1.txt", "text"), ("2.json", "text"),
    ]  # fmt: skip
    for (_, _, reason), said in zip(
        bad, ("second image of the key '0', after 0.jpg", "1.txt, line 1: not UTF", "not JSON"),
        strict=True,
    ):  # fmt: skip
        assert said in reason
    for parts in (Parts(), Parts("all")):
        rows = inputs.rows([tmp_path / "s.tar"], parts=parts)
        assert len(rows) == len(found) and [r is None for r in rows.reasons].count(False) == 3


def member_of(type, name="a.png", **fields):
    member = tarfile.TarInfo(name)
    member.type = type
    for field, value in fields.items():
        setattr(member, field, value)
    return member


@pytest.mark.parametrize(
    "member, said",
    [
        (member_of(tarfile.SYMTYPE, linkname="b.png"), "a.png is a link"),
        (member_of(tarfile.LNKTYPE, linkname="b.png"), "a.png is a link"),
        (member_of(tarfile.FIFOTYPE), "a.png is not a file"),
        (member_of(tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}),
         "a.png is sparse"),
    ],
)  # fmt: skip
def test_members_that_are_no_files_are_bad_rows(tmp_path, member, said):
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        file.addfile(member)
        file.addfile(tarfile.TarInfo("b.png"))
    found = inputs.rows([tmp_path / "s.tar"])
    assert [row.id for row in found] == ["a.png", "b"]
    first, second = found.reasons
    assert second is None and first is not None and first.startswith(f"{said}; expected")


def test_names_that_begin_alike_are_samples_of_their_own(tmp_path):
    names = [f"scan.x{i}" for i in range(3)]
    members = {f"{name}{suffix}": b"t" for name in names for suffix in (".png", ".txt")}
    found, _ = pairs(tmp_path, members)
    assert [key for key, kind, _ in found if kind == "text"] == names


def test_other_members_are_counted_or_known_by_their_content(tmp_path):
    Image.new("L", (8, 8)).save(picture := io.BytesIO(), "JPEG")
    members = {
        "0.png": b"x", "1.heic": b"ftypheic", "2.img": picture.getvalue(), "3.cap": b"a text",
        "4.png.gz": b"x", "5.jpe": picture.getvalue(), "d/.hidden": b"", "6": picture.getvalue(),
    }  # fmt: skip
    path = put(f"{tmp_path}/s.tar", tar_of(members))
    found = inputs.rows([path])
    want = {".heic": 1, ".img": 1, ".cap": 1, ".gz": 1, ".jpe": 1, "no suffix": 1}
    assert cells(found) == [("0", "image", None)] and found.skipped == want
    found = inputs.rows([path], all_files=True)
    assert set(contents(found)) == {"0", "2", "5", "6"}
    assert found.skipped == {".heic": 1, ".cap": 1, ".gz": 1}


def test_shards_are_examples_to_train_on(tmp_path):
    """One, several and a glob of them; what has no partner is named, not dropped."""
    for shard in ("0", "1"):
        pairs = [(f"k{i}.{kind}", f"{shard} {i}") for i in range(3) for kind in ("png", "txt")]
        put(f"{tmp_path}/{shard}.tar", tar_of({name: text.encode() for name, text in pairs}))
    for path, count in ((tmp_path, 6), (f"{tmp_path}/*.tar", 6), (tmp_path / "1.tar", 3)):
        found = examples.read(path)
        assert len(found) == count and found.texts[-3:] == ["1 0", "1 1", "1 2"]
        assert [read_bytes(image).decode() for image in found.images] == found.texts
    put(f"{tmp_path}/2.tar", tar_of({"a.txt": b"alone", "b.png": b"x"}))
    with pytest.raises(ValueError, match="2.tar: the text 'a' has no image.*sample b: no value"):
        examples.read(tmp_path)
    (tmp_path / "class").mkdir()  # then the tar is what class folders were unpacked from
    (tmp_path / "class" / "1.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped other files.*[.]tar 3"):
        assert examples.read(tmp_path).classes == ("class",)


@pytest.mark.parametrize(
    "names",
    [("{}.png", "{}.cls"), ("{}.input.jpg", "{}.cls"), ("1.2.{}.dcm", "1.2.{}.txt", "1.2.{}.cls"),
     ("{}.input.png", "{}.outputs.txt", "{}.target.cls")],
)  # fmt: skip
def test_class_labels_are_those_of_webdataset(tmp_path, names):
    """Numbers in ASCII, with or without a line end; an empty one is unknown."""
    for shard, labels in enumerate((["0", "10\n"], ["2", " "])):
        cells = [(name.format(i), label) for i, label in enumerate(labels) for name in names]
        members = {name: label if name.endswith(".cls") else "x" for name, label in cells}
        put(f"{tmp_path}/{shard}.tar", tar_of({n: text.encode() for n, text in members.items()}))
    found = examples.read(tmp_path, label="label")
    assert found.classes == ("0", "2", "10") and found.labels.tolist() == [0, 2, 1, -1]
    assert (found.texts is None) == (len(names) == 2)
    assert examples.read(tmp_path).labels is None  # nobody has asked for them


def test_class_labels_that_cannot_be_used_are_named(tmp_path):
    members = {
        "a.cls": b"1", "b.png": b"x", "b.cls": "é".encode("latin1"), "c.png": b"x", "c.cls": b"cat",
    }  # fmt: skip
    put(f"{tmp_path}/s.tar", tar_of(members))
    with pytest.raises(ValueError, match="the label 'a' has no image; .*b.cls, line 1: not UTF-8"):
        examples.read(tmp_path / "s.tar", label="label")
    assert len(examples.read(tmp_path / "s.tar")) == 2  # without labels all is well
    put(f"{tmp_path}/t.tar", tar_of({"b.png": b"x", "b.cls": b"\xff"}))
    with pytest.raises(ValueError, match="'label' cannot be used: .*b.cls, line 1: not UTF-8") as e:
        examples.read(tmp_path / "t.tar", label="label")
    assert "cell" not in str(e.value) and "expected strings" not in str(e.value)
    found = inputs.rows([tmp_path / "s.tar"])  # which embeds images and texts
    assert [row.id for row in found] == ["b", "c"] and found.skipped == {".cls": 3}


def test_several_labels_of_a_sample_part_no_image_from_its_text(tmp_path):
    members = {"s.input.jpg": b"x", "s.outputs.txt": b"t", "s.age.cls": b"1", "s.sex.cls": b"0"}
    put(f"{tmp_path}/s.tar", tar_of(members))
    assert examples.read(tmp_path / "s.tar").texts == ["t"]
    with pytest.raises(ValueError, match="s.sex.cls is a second label of the key 's', after s.age"):
        examples.read(tmp_path / "s.tar", label="label")


def test_only_one_shard_is_in_memory_as_python_objects(tmp_path, monkeypatch):
    def pairs(shard, *_):
        for i in range(2000):
            yield tar.Entry(f"k{i}", f"{shard}#{i}:1", "image", f"{i} {'word ' * 500}")

    def peak(count):
        tracemalloc.start()
        tables._webdataset("s", [f"{n}.tar" for n in range(count)], False)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    monkeypatch.setattr(tables.tar, "pairs", pairs)
    peak(1)
    assert peak(8) < 1.5 * peak(1)  # the keys of all are kept


@pytest.mark.parametrize("folders", [("a", "b"), ("site-1/x", "site-2"), ("site", "site/deeper")])
def test_shards_of_equal_names_in_several_folders_are_told_apart(tmp_path, monkeypatch, folders):
    for folder in folders:
        pairs = [(f"k{i}.{kind}", f"{folder} {i}") for i in range(2) for kind in ("png", "txt")]
        content = tar_of({name: text.encode() for name, text in pairs})
        put(f"{tmp_path}/{folder}/000.tar", content)
    paths = sorted(f"{tmp_path}/{folder}/000.tar" for folder in folders)
    monkeypatch.setattr(tables.glob, "glob", lambda pattern: paths)
    found = examples.read(f"{tmp_path}/*/000.tar")
    assert len(found) == len(set(found.images)) == 4
    assert [read_bytes(image).decode() for image in found.images] == found.texts


def test_shards_below_the_folder_of_the_process_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        put(f"{tmp_path}/{folder}/000.tar", tar_of({"k.png": folder.encode()}))
    found = examples.read("*/000.tar").images
    assert [read_bytes(image) for image in found] == [b"a", b"b"]
