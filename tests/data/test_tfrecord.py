"""TFRecord shards: what is written is read again, and shards of others are indexed."""

import numpy as np
import pytest

from medsiglip_jax.data import examples, inputs
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.sources import read_bytes

tf = pytest.importorskip("tensorflow")

from medsiglip_jax.data import tfrecord  # noqa: E402


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    """Files as they are, images or not, one of them empty: shards hold bytes."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for i in range(8):
        (folder / f"{i}.jpg").write_bytes(rng.bytes(500 * i))
    return [str(path) for path in sorted(folder.iterdir())]


def full(readable):
    n = len(readable)
    return Examples(
        readable,
        [f"text, {i}" for i in range(n)],
        (np.arange(n, dtype=np.int32) % 4) - 1,
        ("z", "y", "x"),
        [f"p{i % 5}" for i in range(n)],
        ["train" if i % 2 else "test" for i in range(n)],
        np.arange(n, dtype=np.int32) // 2 - 1,
    )


@pytest.mark.parametrize("shards", [None, 3])
def test_shards_hold_what_was_written(readable, tmp_path, shards):
    written = full(readable)
    tfrecord.write_shards(written, tmp_path / "shards", shards)
    (tmp_path / "shards").rename(tmp_path / "moved")
    found = examples.read(tmp_path / "moved", positives="positives")
    assert [read_bytes(p) for p in found.images] == [read_bytes(p) for p in readable]
    assert found.texts == written.texts and found.classes == written.classes
    np.testing.assert_array_equal(found.labels, written.labels)
    assert found.groups == written.groups and found.splits == written.splits
    same = found.positives[:, None] == found.positives
    np.testing.assert_array_equal(same, written.positives[:, None] == written.positives)
    assert len(list((tmp_path / "moved").glob("*.tfrecord"))) == (shards or 1)


def test_shards_can_be_embedded(readable, tmp_path):
    tfrecord.write_shards(full(readable), tmp_path / "shards", 3)
    rows = inputs.rows([tmp_path / "shards"])
    images, texts = rows[: len(readable)], rows[len(readable) :]
    assert [read_bytes(row.source) for row in images] == [read_bytes(p) for p in readable]
    assert [row.text for row in texts] == full(readable).texts
    assert [row.id for row in texts] == [row.id for row in images]


def test_a_glob_reads_some_of_the_shards(readable, tmp_path):
    tfrecord.write_shards(full(readable), tmp_path / "shards", 3)
    found = examples.read(tmp_path / "shards" / "00001-*.tfrecord")
    assert 0 < len(found) < len(readable)
    assert found.texts == full(readable).texts[3 : 3 + len(found)]


def test_shards_hold_several_labels(readable, tmp_path):
    labels = np.float32([[0, np.nan], [1, 1]])
    tfrecord.write_shards(Examples(readable[:2], labels=labels, classes=("a", "b")), tmp_path / "s")
    found = examples.read(tmp_path / "s")
    np.testing.assert_array_equal(found.labels, labels)
    assert found.classes == ("a", "b") and found.texts is None


def test_shards_are_standard_examples_and_can_be_indexed(readable, tmp_path):
    written = full(readable)
    tfrecord.write_shards(written, tmp_path / "shards", 2)
    paths = sorted(map(str, (tmp_path / "shards").glob("*.tfrecord")))
    records = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(paths)]
    features = [record.features.feature for record in records]
    assert [f["image"].bytes_list.value[0] for f in features] == list(map(read_bytes, readable))
    found = tfrecord.index_shards(paths, label="label")
    assert found.images == examples.read(tmp_path / "shards").images
    assert found.texts == written.texts and found.classes == ("0", "1", "2")
    np.testing.assert_array_equal(found.labels, written.labels)
    assert tfrecord.index_shards(paths, label="group").classes == ("p0", "p1", "p2", "p3", "p4")


@pytest.mark.parametrize(
    "feature, value, message",
    [
        ("label", b"caf\xe9", "'label' is not UTF-8 text"),
        ("label", 0.5, "'label' is 0.5; expected text"),
        ("text", b"\xff", "'text' is not UTF-8 text"),
        ("text", 3, "'text' is 3; expected text"),
        ("label", None, "no examples"),
    ],
)
def test_features_of_the_wrong_type_are_named_with_their_place(tmp_path, feature, value, message):
    path = str(tmp_path / "s.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for cell in () if value is None else (b"a" if feature == "text" else b"b", value):
            cell = np.float32([cell]) if isinstance(cell, float) else cell
            cell = np.int64(cell) if isinstance(cell, int) else cell
            features = {"image": b"x", "text": b"t", "label": b"l", feature: cell}
            features = {name: tfrecord._feature(cell) for name, cell in features.items()}
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    with pytest.raises(ValueError, match=message) as error:
        tfrecord.index_shards([path], label="label")
    assert str(error.value).startswith(path)


def test_what_is_no_shard_is_refused(readable, tmp_path):
    tfrecord.write_shards(full(readable), tmp_path / "shards", 1)
    (path,) = (tmp_path / "shards").glob("*.tfrecord")
    with pytest.raises(
        ValueError, match="feature 'jpg' has 0 values, expected one; the features are group"
    ):
        tfrecord.index_shards([str(path)], image="jpg")
    cut = tmp_path / "cut.tfrecord"
    cut.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a TFRecord file, or cut off, at byte"):
        tfrecord.index_shards([str(cut)])
    with pytest.raises(FileNotFoundError, match="index_shards"):
        examples.read(tmp_path / "*.tfrecord")
    with pytest.raises(UnreadableImage, match="none.jpg: no such file"):
        tfrecord.write_shards(Examples([str(tmp_path / "none.jpg")]), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError):
        tfrecord.write_shards(full(readable), tmp_path / "shards")
