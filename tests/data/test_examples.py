"""Tables -> examples; splits without leaks."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from medsiglip_jax.data import examples, loader
from medsiglip_jax.data.examples import Examples, check_disjoint, split_by_group
from medsiglip_jax.data.order import Once


def csv(tmp_path, text, name="m.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_labels_of_several_columns_keep_the_unknown(tmp_path):
    path = csv(tmp_path, "image,edema,mass\na,1,0\nb,,1.0\n")
    found = examples.read(path, label=["edema", "mass"])
    np.testing.assert_array_equal(found.labels, np.float32([[1, 0], [np.nan, 1]]))
    assert found.labels.dtype == np.float32 and found.classes == ("edema", "mass")


def test_classes_are_in_their_order_or_as_given(tmp_path):
    path = csv(tmp_path, "image,label\na,10\nb,9\nc,\n")
    found = examples.read(path, label="label")
    assert found.classes == ("9", "10") and found.labels.tolist() == [1, 0, -1]
    found = examples.read(path, label="label", classes=("10", "11", "9"))
    assert found.labels.tolist() == [0, 2, -1] and found.labels.dtype == np.int32


def test_a_class_that_is_called_minus_1_is_told(tmp_path):
    """It is one beside a cell that is no label of a finding, such as 2."""
    path = csv(tmp_path, "image,grade\na,-1\nb,2\nc,0\n")
    with pytest.warns(UserWarning, match="'grade' is read as names of classes, of which -1 is one"):
        assert examples.read(path, label="grade").classes == ("-1", "0", "2")
    assert examples.read(path, label="grade", classes=("-1", "0", "2")).labels.tolist() == [0, 2, 1]


def test_equal_entries_are_positive_pairs(tmp_path):
    path = csv(tmp_path, "image,text,study\na,x,1\nb,y,\nc,x,1\n")
    for column in ("text", "study"):
        ids = examples.read(path, positives=column).positives
        assert ids[0] == ids[2] != ids[1] and ids.dtype == np.int32
    assert examples.read(path, positives="study").positives[1] == -1


def test_rows_of_ids_alone_are_selected_split_and_kept_apart(tmp_path):
    path = csv(tmp_path, "key,label\na,x\nb,y\nc,x\n")
    found = examples.read(path, image=None, id="key", text=None, label="label")
    assert found.names == found.ids == ["a", "b", "c"] and not len(found.images)
    assert found.select([2, 0]).ids == ["c", "a"] and len(found) == 3
    train, held_out = split_by_group(found, 0.3)
    assert sorted([*train.ids, *held_out.ids]) == found.ids
    with pytest.raises(ValueError, match="1 ids are in both .*: b;"):
        check_disjoint(found.select([0, 1]), found.select([1, 2]))
    with pytest.raises(ValueError, match="'key', line 3: no value"):
        examples.read(csv(tmp_path, 'key\na\n""\n'), image=None, id="key")


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
        ("scan,text\na,b\n", {}, "no column 'image'; there are scan, text"),
        ("image\na\n", dict(label="dx"), "no column 'dx'; there are image"),
        ("image\na\n", dict(text="caption"), "no column 'caption'"),
        ("image,text\n,b\nc,d\n,e\n", {}, r"'image', line 2: no value \(2 rows in all\)"),
        (
            "image,y\na,cat\nb,cow\n",
            dict(label="y", classes=("cat",)),
            "'y', line 3: not among the classes cat: 'cow'",
        ),
        ("image,y\na,cat\n", dict(label="y", captions="photo"), "a template with {label}"),
        ("image,y\na,cat\n", dict(label="y", captions={}), "none for the classes cat"),
        ("image\na\n", dict(captions="{label}"), "captions need label="),
        ("image\na\n", dict(positives="text"), "needs a text column"),
        ("image\na\n", dict(positives="label"), "needs label="),
        ("scan\na\n", dict(label="y", split="fold"), "'image'.*'fold'.*'y'"),
    ],
)
def test_all_problems_of_a_table_are_one_message(tmp_path, text, arguments, message):
    path = csv(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        examples.read(path, **arguments)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


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


def test_a_split_that_is_not_there_is_refused():
    found = Examples(["a", "b"], splits=["val", "train"])
    assert found.of_split("val").images == ["a"]
    with pytest.raises(ValueError, match="no examples of split 'test'; there are 'train', 'val'"):
        found.of_split("test")
    with pytest.raises(ValueError, match="no splits at all"):
        Examples(["a"]).of_split("train")


def test_columns_must_be_of_one_length():
    with pytest.raises(ValueError, match="texts has 1 entries for 2 images"):
        Examples(["a", "b"], texts=["x"])


def test_pictures_in_parquet_train_as_files_do(tmp_path):
    """The same batches as from the files that were packed."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    names, texts = [f"{i}.png" for i in range(3)], list("abc")
    cells = [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in names]
    for name, column in (("files", names), ("cells", cells)):
        table = pa.table({"image": column, "caption": texts})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    batches = []
    for name in ("files", "cells"):
        with pytest.warns(UserWarning, match="'caption' is read as texts"):
            found = examples.read(tmp_path / f"{name}.parquet")
        assert found.texts == texts
        source = loader.Input((found,), Once((3,)), 8)
        batches += list(loader.epoch_batches(source, 3))
    np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])
    assert batches[1]["mask"].all()
