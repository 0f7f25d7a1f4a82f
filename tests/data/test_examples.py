"""Manifests and folders -> examples; splits without leaks."""

import json
import re
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from medsiglip_jax.data import examples
from medsiglip_jax.data.examples import Examples, check_disjoint, split_by_group

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
def manifest(request, tmp_path):
    path = tmp_path / f"m.{request.param}"
    if request.param == "parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif request.param == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    else:
        text = CSV if request.param == "csv" else CSV.replace("left, ", "left; ").replace(",", "\t")
        path.write_bytes(text.replace("left; ", "left, ").encode())
    return path


def test_every_format_reads_the_same(manifest):
    found = examples.read(manifest, label="finding", group="patient", positives="text")
    folder = str(manifest.parent)
    assert found.images == [
        f"{folder}/a.png", f"{folder}/b/c.png", "/abs/d.png", "gs://bucket/e.png",
    ]  # fmt: skip
    assert found.texts == [row["text"] for row in ROWS]
    assert found.classes == ("effusion", "none")
    assert found.labels.dtype == np.int32 and found.labels.tolist() == [0, 1, 0, -1]
    assert found.groups == ["p1", "p2", "p1", "p3"] and found.splits is None
    ids = found.positives
    assert ids[2] == ids[3] and len(set(ids.tolist())) == 3


def csv(tmp_path, text, name="m.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_labels_of_several_columns_keep_the_unknown(tmp_path):
    path = csv(tmp_path, "image,edema,mass\na,1,0\nb,,1.0\n")
    found = examples.read(path, label=["edema", "mass"])
    np.testing.assert_array_equal(found.labels, np.float32([[1, 0], [np.nan, 1]]))
    assert found.labels.dtype == np.float32 and found.classes == ("edema", "mass")


def test_classes_sort_as_numbers_or_as_given(tmp_path):
    path = csv(tmp_path, "image,label\na,10\nb,9\n")
    assert examples.read(path, label="label").classes == ("9", "10")
    found = examples.read(path, label="label", classes=("10", "11", "9"))
    assert found.labels.tolist() == [0, 2]


def test_captions_are_made_of_labels(tmp_path):
    path = csv(tmp_path, "image,label\na,cat\nb,dog\nc,cat\n")
    found = examples.read(path, label="label", captions="a photo of {label}", positives="label")
    assert found.texts == ["a photo of cat", "a photo of dog", "a photo of cat"]
    assert found.positives.tolist() == [0, 1, 0]
    found = examples.read(path, label="label", captions={"cat": "x", "dog": "y"})
    assert found.texts == ["x", "y", "x"]


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("img,text\na,b\n", {}, "no column 'image'; there are img, text"),
        ("image\na\n", dict(label="dx"), "no column 'dx'; there are image"),
        ("image\na\n", dict(text="caption"), "no column 'caption'"),
        ("image,image\na,b\n", {}, "columns given twice: 'image'"),
        ("image,text\na,b\nc\n", {}, "line 3: 1 fields, expected 2"),
        ('image,text\na,"b\n', {}, "not CSV"),
        ("image,text\n", {}, "no rows"),
        ("", {}, "no rows"),
        ("image,text\n,b\nc,d\n,e\n", {}, r"'image', line 2: no value \(2 rows in all\)"),
        (
            "image,y\na,cat\nb,cow\n",
            dict(label="y", classes=("cat",)),
            "'y', line 3: not among the classes cat: 'cow'",
        ),
        ("image,y\na,1\nb,-1\n", dict(label=["y"]), "'y', line 3: expected 0, 1 or nothing"),
        ("image,y\na,cat\n", dict(label="y", captions="photo"), "a template with {label}"),
        ("image,y\na,cat\n", dict(label="y", captions={}), "none for the classes cat"),
        ("image\na\n", dict(captions="{label}"), "captions need label="),
        ("image\na\n", dict(positives="text"), "needs a text column"),
        ("image\na\n", dict(positives="label"), "needs label="),
        ("img\na\n", dict(label="y", split="fold"), "'image'.*'fold'.*'y'"),
    ],
)
def test_a_bad_manifest_is_one_message(tmp_path, text, arguments, message):
    path = csv(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        examples.read(path, **arguments)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("m.jsonl", b'{"image": "a"}\n{oops\n', "line 2: not JSON"),
        ("m.jsonl", b"[1]\n", "line 1: expected an object"),
        ("m.csv", b"image,text\na,\xff\n", "line 2: not UTF-8"),
        ("m.parquet", b"image,text\n", "not a Parquet file"),
        ("m.xlsx", b"PK", "not a manifest; expected .csv"),
    ],
)
def test_an_unreadable_manifest_is_one_message(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        examples.read(path)


@pytest.mark.parametrize("name", ["none.csv", "none"])
def test_a_missing_manifest_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
        examples.read(tmp_path / name)


def test_a_remote_manifest_is_read_with_its_folder():
    with fsspec.open("memory://bucket/m.csv", "wb") as file:
        file.write(b"image\na.png\nmemory://other/b.png\n")
    found = examples.read("memory://bucket/m.csv")
    assert found.images == ["memory://bucket/a.png", "memory://other/b.png"]
    with pytest.raises(FileNotFoundError, match="memory://bucket/n.csv"):
        examples.read("memory://bucket/n.csv")


@pytest.mark.parametrize("several", [False, True])
def test_what_is_written_is_read_again(tmp_path, several):
    many, one = np.float32([[0, np.nan], [1, 1], [0, 1]]), np.array([1, -1, 0], np.int32)
    written = Examples(
        ["/a#1:2", f"{tmp_path}/b", "gs://c"], ["x", "y, z", "x"],
        many if several else one, ("q", "p"), ["1", "1", "2"],
        ["train", "train", "test"], np.array([7, -1, 7], np.int32),
    )  # fmt: skip
    examples.write(written, tmp_path / "m.parquet")
    (tmp_path / "m.parquet").rename(tmp_path / "moved.parquet")
    found = examples.read(tmp_path / "moved.parquet", positives="positives")
    for name in ("images", "texts", "classes", "groups", "splits"):
        assert getattr(found, name) == getattr(written, name)
    np.testing.assert_array_equal(found.labels, written.labels)
    assert found.positives.tolist() == [0, -1, 0]
    with pytest.raises(ValueError, match="named like other columns: text"):
        examples.write(replace(written, labels=many, classes=("text", "p")), tmp_path / "n.parquet")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(folder / name)


def test_class_folders(tmp_path):
    touch(tmp_path, "dog/2.png", "dog/1.png", "cat/sub/3.png", "cat/.hidden.png")
    (tmp_path / "cat" / "notes.md").write_text("no image")
    found = examples.read(tmp_path, captions="a {label}")
    assert [p.removeprefix(f"{tmp_path}/") for p in found.images] == [
        "cat/sub/3.png", "dog/1.png", "dog/2.png",
    ]  # fmt: skip
    assert found.classes == ("cat", "dog") and found.labels.tolist() == [0, 1, 1]
    assert found.texts == ["a cat", "a dog", "a dog"] and found.splits is None


def test_split_folders(tmp_path):
    touch(tmp_path, "train/dog/1.png", "train/cat/2.png", "val/dog/3.png")
    found = examples.read(tmp_path)
    assert found.classes == ("cat", "dog") and found.labels.tolist() == [0, 1, 1]
    assert found.of_split("val").images == [f"{tmp_path}/val/dog/3.png"]
    with pytest.raises(ValueError, match="no examples of split 'test'; there are 'train', 'val'"):
        found.of_split("test")


def test_folders_without_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        examples.read(tmp_path)
    touch(tmp_path, "1.png", "dog/2.png")
    with pytest.raises(ValueError, match="images outside of class folders"):
        examples.read(tmp_path)


def patients(n, rows=3):
    groups = [f"p{i % n}" for i in range(rows * n)]
    return Examples([f"{i}.png" for i in range(len(groups))], groups=groups)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_of_whole_groups(fraction, seed):
    data = patients(50)
    train, held_out = split_by_group(data, fraction, seed)
    check_disjoint(train, held_out)
    assert sorted(train.images + held_out.images) == sorted(data.images)
    assert abs(len(held_out) - min(max(150 * fraction, 3), 147)) <= 1.5


def test_splits_are_repeatable_and_keep_patients_when_more_come():
    first = set(split_by_group(patients(100), 0.3, 0)[1].groups)
    assert first == set(split_by_group(patients(100), 0.3, 0)[1].groups)
    assert first != set(split_by_group(patients(100), 0.3, 1)[1].groups)
    more = set(split_by_group(patients(110), 0.3, 0)[1].groups)
    assert len(first - more) <= 6


def test_without_groups_an_image_is_one(tmp_path):
    data = Examples(["a", "b", "a", "c"], texts=["1", "2", "3", "4"])
    for seed in range(5):
        train, held_out = split_by_group(data, 0.5, seed)
        assert len(train) + len(held_out) == 4
        check_disjoint(train, held_out)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="of one group"):
        split_by_group(patients(1), 0.5, 0)
    with pytest.raises(ValueError, match="fraction is 1.0"):
        split_by_group(patients(5), 1.0, 0)


def test_leaks_are_named():
    left, right = patients(20).select(range(10)), patients(20).select(range(5, 25))
    with pytest.raises(ValueError, match="^10 groups are in both .* p0, p1, p2, p3, p4, …"):
        check_disjoint(left, right)
    with pytest.raises(ValueError, match="^1 images are in both .*: b; split"):
        check_disjoint(Examples(["a", "b"]), Examples(["b", "c"]))


def test_columns_must_be_of_one_length():
    with pytest.raises(ValueError, match="texts has 1 entries for 2 images"):
        Examples(["a", "b"], texts=["x"])
