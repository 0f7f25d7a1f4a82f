"""TensorFlow's kernels give the batches of the loader without them, bit for bit."""

import dataclasses
import io
import sys

import numpy as np
import pytest
from PIL import Image
from test_loader import equal

from medsiglip_jax.data import loader
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.loader import Input
from medsiglip_jax.data.order import Order
from medsiglip_jax.preprocess import xla
from medsiglip_jax.preprocess.augment import Augment
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.image import PRESETS
from medsiglip_jax.preprocess.sources import read_bytes

tf = pytest.importorskip("tensorflow")

from medsiglip_jax.data.tf import tf_codec  # noqa: E402

SIZE = 24


def codec(input):
    """As training has it."""
    return tf_codec(input.preprocess, input.dicom, others=xla.codec(input.preprocess, input.dicom))


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
        return tf_codec("big_vision").decode(read_bytes(path))
    except UnreadableImage:
        return np.zeros(0)


def test_damaged_jpeg_has_one_verdict(torture, capfd):
    """Mutations anywhere in the file: the same pixels, or the same refusal."""
    rng, tf_decode = np.random.default_rng(2), tf_codec("big_vision").decode
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


def test_bombs_are_refused_before_decoding(tmp_path):
    path = tmp_path / "big.jpg"
    path.write_bytes(jpeg())
    said = []
    input = dataclasses.replace(make([str(path)]), dicom=Rules(max_pixels=1000))
    next(loader.batches(input, 1, on_error=lambda *a: said.append(a), codec=codec(input)))
    assert "more than the limit of 1000" in said[0][1]


def test_real_jpeg(real_data):
    paths = [str(path) for path in sorted((real_data / "images").glob("*.jp*g"))]
    input = make(paths)
    equal(
        next(loader.epoch_batches(input, 2, codec=codec(input))),
        next(loader.epoch_batches(input, 2)),
    )


def test_tensorflow_sees_no_accelerator():
    tf_codec("big_vision")
    assert not tf.config.get_visible_devices("GPU") and "tensorflow" in sys.modules
