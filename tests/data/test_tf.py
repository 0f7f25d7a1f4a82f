"""TensorFlow's kernels give the batches of the loader without them; TFRecord round trips."""

import io
import sys

import numpy as np
import pytest
from PIL import Image
from test_loader import equal

from medsiglip_jax.data import examples, inputs, loader
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.loader import Input
from medsiglip_jax.data.order import Order
from medsiglip_jax.preprocess.augment import Augment
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.image import PRESETS
from medsiglip_jax.preprocess.sources import read_bytes

tf = pytest.importorskip("tensorflow")

from medsiglip_jax.data import tf as data  # noqa: E402

SIZE = 24


def codec(input):
    return data.tf_codec(input.preprocess)


def jpeg(mode="RGB", size=(53, 41), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """One of every kind that could come out differently, readable or not."""
    folder = tmp_path_factory.mktemp("images")
    whole = jpeg()
    files = {
        "444.jpg": jpeg(subsampling=0),
        "420.jpg": jpeg(subsampling=2, quality=60),
        "grey.jpg": jpeg("L"),
        "cmyk.jpg": jpeg("CMYK"),
        "progressive.jpg": jpeg(progressive=True),
        "restart.jpg": jpeg(restart_marker_blocks=2),
        "size.jpg": jpeg(size=(SIZE, SIZE)),
        "one.jpg": jpeg(size=(1, 1)),
        "wide.jpg": jpeg(size=(300, 5)),
        "half.jpg": whole[: len(whole) // 2],
        "header.jpg": whole[:30],
        "text.jpg": b"no image",
        "empty.jpg": b"",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16)).save(folder / "16.png")
    Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)).save(folder / "alpha.png")
    return [str(path) for path in sorted(folder.iterdir())] + [str(folder / "none.jpg")]


def make(images, **kwargs):
    labels = np.arange(len(images), dtype=np.int32)
    classes = tuple(str(i) for i in labels)
    texts = [f"text {i}" for i in labels]
    source = Examples(images, texts, labels, classes, positives=labels // 3)
    return Input((source,), Order((len(images),)), SIZE, **kwargs)


@pytest.mark.parametrize("preprocess", PRESETS)
@pytest.mark.parametrize("augment", [Augment(), Augment((0.2, 0.9), True, 0.4)])
def test_batches_are_those_without_tensorflow(images, preprocess, augment):
    input = make(images, preprocess=preprocess, augment=augment)
    with_tf, without = [], []
    left = loader.batches(input, 8, 1, 5, on_error=lambda *a: with_tf.append(a), codec=codec(input))
    right = loader.batches(input, 8, 1, 5, on_error=lambda *a: without.append(a))
    for one, other in zip(left, right, strict=True):
        equal(one, other)
    assert with_tf == without and len({path for path, _ in with_tf}) == 5


def test_an_epoch_and_a_host_are_those_without_tensorflow(images):
    kwargs = dict(process_index=1, process_count=2)
    input = make(images)
    left = loader.epoch_batches(input, 6, codec=codec(input), **kwargs)
    for one, other in zip(left, loader.epoch_batches(input, 6, **kwargs), strict=True):
        equal(one, other)


def test_plain_jpeg_is_decoded_by_tensorflow(images):
    plain = [path for path in images if type(_decoded(path)) is not np.ndarray]
    names = {path.rpartition("/")[2] for path in plain}
    assert names == {"444.jpg", "420.jpg", "grey.jpg", "restart.jpg", "size.jpg", "one.jpg",
                     "wide.jpg"}  # fmt: skip


def _decoded(path):
    try:
        return data.tf_codec("big_vision").decode(read_bytes(path))
    except UnreadableImage:
        return np.zeros(0)


def test_damaged_jpeg_has_one_verdict(torture, capfd):
    """Mutations anywhere in the file: the same pixels, or the same refusal."""
    rng, tf_decode = np.random.default_rng(2), data.tf_codec("big_vision").decode
    sources = [jpeg(), jpeg("L", quality=30), jpeg(progressive=True)]
    for i in range(300 * torture):
        damaged = bytearray(sources[i % 3])
        for place in rng.integers(2, len(damaged), 2):
            damaged[place] = rng.integers(256)
        damaged = bytes(damaged[: rng.integers(2, 2 * len(damaged))])
        try:
            expected = decode(damaged)
        except UnreadableImage as error:
            with pytest.raises(UnreadableImage) as caught:
                tf_decode(damaged)
            assert str(caught.value) == str(error)
        else:
            np.testing.assert_array_equal(np.asarray(tf_decode(damaged)), expected)


def test_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr("medsiglip_jax.preprocess.facts.MAX_PIXELS", 1000)
    path = tmp_path / "big.jpg"
    path.write_bytes(jpeg())
    said = []
    input = make([str(path)])
    next(loader.batches(input, 1, on_error=lambda *a: said.append(a), codec=codec(input)))
    assert "more than the limit of 1000" in said[0][1]


def test_real_jpeg(real_data):
    paths = [str(path) for path in sorted((real_data / "images").glob("*.jp*g"))]
    input = make(paths)
    equal(
        next(loader.epoch_batches(input, 2, codec=codec(input))),
        next(loader.epoch_batches(input, 2)),
    )


@pytest.fixture
def readable(images):
    return [path for path in images if not path.endswith("none.jpg")]


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
    data.write_tfrecords(written, tmp_path / "shards", shards)
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
    data.write_tfrecords(full(readable), tmp_path / "shards", 3)
    rows = inputs.rows([tmp_path / "shards"])
    images, texts = rows[: len(readable)], rows[len(readable) :]
    assert [read_bytes(row.source) for row in images] == [read_bytes(p) for p in readable]
    assert [row.text for row in texts] == full(readable).texts
    assert [row.id for row in texts] == [row.id for row in images]


def test_a_glob_reads_some_of_the_shards(readable, tmp_path):
    data.write_tfrecords(full(readable), tmp_path / "shards", 3)
    found = examples.read(tmp_path / "shards" / "00001-*.tfrecord")
    assert 0 < len(found) < len(readable)
    assert found.texts == full(readable).texts[5 : 5 + len(found)]


def test_shards_hold_several_labels(readable, tmp_path):
    labels = np.float32([[0, np.nan], [1, 1]])
    data.write_tfrecords(Examples(readable[:2], labels=labels, classes=("a", "b")), tmp_path / "s")
    found = examples.read(tmp_path / "s")
    np.testing.assert_array_equal(found.labels, labels)
    assert found.classes == ("a", "b") and found.texts is None


def test_shards_are_standard_examples_and_can_be_indexed(readable, tmp_path):
    written = full(readable)
    data.write_tfrecords(written, tmp_path / "shards", 2)
    paths = sorted(map(str, (tmp_path / "shards").glob("*.tfrecord")))
    records = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(paths)]
    features = [record.features.feature for record in records]
    assert [f["image"].bytes_list.value[0] for f in features] == list(map(read_bytes, readable))
    found = data.index_tfrecords(paths, label="label")
    assert found.images == examples.read(tmp_path / "shards").images
    assert found.texts == written.texts and found.classes == ("0", "1", "2")
    np.testing.assert_array_equal(found.labels, written.labels)
    assert data.index_tfrecords(paths, label="group").classes == ("p0", "p1", "p2", "p3", "p4")


def test_what_is_no_shard_is_refused(readable, tmp_path):
    data.write_tfrecords(full(readable), tmp_path / "shards", 1)
    (path,) = (tmp_path / "shards").glob("*.tfrecord")
    with pytest.raises(
        ValueError, match="no single value of feature 'jpg'; there are group, image"
    ):
        data.index_tfrecords([str(path)], image="jpg")
    cut = tmp_path / "cut.tfrecord"
    cut.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a TFRecord file, or cut off, at byte"):
        data.index_tfrecords([str(cut)])
    with pytest.raises(FileNotFoundError, match="index_tfrecords"):
        examples.read(tmp_path / "*.tfrecord")
    with pytest.raises(UnreadableImage, match="none.jpg: no such file"):
        data.write_tfrecords(Examples([str(tmp_path / "none.jpg")]), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError):
        data.write_tfrecords(full(readable), tmp_path / "shards")


def test_tensorflow_sees_no_accelerator():
    data.tf_codec("big_vision")
    assert not tf.config.get_visible_devices("GPU") and "tensorflow" in sys.modules


def test_tensorboard_gets_the_numbers(tmp_path):
    tf = pytest.importorskip("tensorflow")
    write = data.EventFile(tmp_path / "tensorboard")
    write({"step": 3, "loss": 1.5, "val_auc": 0.75, "grad_norm": "nan"})
    write({"step": 6, "loss": 1})
    (file,) = (tmp_path / "tensorboard").iterdir()
    records = [tf.compat.v1.Event.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(file))]
    found = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in records]
    assert found == [(0, {}), (3, {"loss": 1.5, "val_auc": 0.75}), (6, {"loss": 1.0})]
