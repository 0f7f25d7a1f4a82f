"""Batches: pixels of the processor, the same from any step and on any number of hosts."""

import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from medsiglip_jax.data import loader
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.loader import Input
from medsiglip_jax.data.order import Order
from medsiglip_jax.files import limits
from medsiglip_jax.files.threads import Stalled
from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess.augment import Augment, recolour, window
from medsiglip_jax.preprocess.codec import load_image, pil_codec
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.image import PRESETS
from medsiglip_jax.preprocess.load import load_images

SIZE = 24


def tokenize(texts):
    return np.array([[len(text), sum(map(ord, text))] for text in texts], np.int32)


@pytest.fixture
def images(pictures):
    return sorted(str(p) for p in pictures.rglob("[0-9].*"))


def make(images, n=None, **kwargs):
    n = len(images)
    source = Examples(
        images,
        [f"text {i}" for i in range(n)],
        np.arange(n, dtype=np.int32),
        tuple("abcdefghi"[:n]),
        positives=np.arange(n, dtype=np.int32) // 2,
    )
    return Input((source,), Order((n,), seed=1), SIZE, tokenize=tokenize, **kwargs)


def equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
        assert left[name].dtype == right[name].dtype


@pytest.mark.parametrize("preprocess", PRESETS)
def test_pixels_are_those_of_the_processor(images, preprocess):
    data = make(images, preprocess=preprocess)
    (batch,) = loader.epoch_batches(data, len(images))
    np.testing.assert_array_equal(batch["image"], load_images(images, SIZE, preprocess))
    assert batch["mask"].all() and batch["label"].tolist() == list(range(7))
    np.testing.assert_array_equal(batch["text"], tokenize(data.examples[0].texts))
    assert {k: v.dtype.name for k, v in batch.items()} == {
        "image": "uint8", "text": "int32", "label": "int32", "positives": "int32", "mask": "bool",
    }  # fmt: skip


def test_columns_stay_with_their_image(images):
    pixels = load_images(images, SIZE)
    for batch in loader.batches(make(images), 5, 0, 4):
        np.testing.assert_array_equal(batch["image"], pixels[batch["label"]])
        np.testing.assert_array_equal(batch["positives"], batch["label"] // 2)
        expected = tokenize([f"text {i}" for i in batch["label"]])
        np.testing.assert_array_equal(batch["text"], expected)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_step_and_any_number_of_hosts_give_the_same_rows(images, hosts):
    data = make(images, augment=Augment(crop=(0.3, 1.0), flip=True, colour=0.3))
    run = list(loader.batches(data, 4, 0, 5, workers=1))
    parts = [
        loader.batches(data, 4, 2, 5, process_index=h, process_count=hosts) for h in range(hosts)
    ]
    resumed = [
        {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert len(resumed) == 3
    for left, right in zip(run[2:], resumed, strict=True):
        equal(left, right)


def test_augmentation_differs_between_epochs_and_seeds(images):
    augment = Augment(crop=(0.3, 0.9), flip=True, colour=0.3)
    first, second = loader.batches(make(images, augment=augment), 7, 0, 2)
    other = next(loader.batches(make(images, augment=augment, seed=5), 7))
    by_label = [b["image"][np.argsort(b["label"])] for b in (first, second, other)]
    assert all((by_label[0][i] != by_label[1][i]).any() for i in range(7))
    assert all((by_label[0][i] != by_label[2][i]).any() for i in range(7))


def test_unreadable_images_are_masked_and_reported_in_order(pictures, images, tmp_path):
    bad = [str(pictures / "sub" / "damaged.jpg"), str(tmp_path / "none.png"), str(pictures)]
    data = make([images[0], *bad, images[1]])
    said = []
    batches = list(loader.batches(data, 5, 0, 3, on_error=lambda *a: said.append(a)))
    assert len(said) == 9
    for step, batch in enumerate(batches):
        masked = [data.examples[0].images[i] for i in batch["label"][~batch["mask"]]]
        assert masked == [path for path, _ in said[3 * step : 3 * step + 3]]
        assert not batch["image"][~batch["mask"]].any() and batch["mask"].sum() == 2
    reasons = dict(said)
    assert "truncated" in reasons[bad[0]] and "image of" not in reasons[bad[0]]
    assert reasons[bad[1]] == "no such file" and reasons[bad[2]] == "a folder"


@pytest.mark.parametrize("hosts", [1, 2])
def test_an_epoch_is_every_row_once_and_padding(images, hosts):
    data, said = make(images), []
    rows = []
    for host in range(hosts):
        found = list(
            loader.epoch_batches(
                data, 4, process_index=host, process_count=hosts,
                on_error=lambda *a: said.append(a),
            )
        )  # fmt: skip
        assert len(found) == 2 and all(len(b["mask"]) == 4 // hosts for b in found)
        rows += [label for b in found for label in b["label"][b["mask"]]]
        last = found[-1]
        assert (last["label"][~last["mask"]] == -1).all()
        assert (last["positives"][~last["mask"]] == -1).all()
    assert sorted(rows) == list(range(7)) and not said


def test_sources_mix_and_their_positives_stay_apart(images):
    left = Examples(images[:3], positives=np.array([0, -1, 0], np.int32))
    right = Examples(images[3:5], positives=np.array([0, 0], np.int32))
    data = Input((left, right), Order((3, 2)), SIZE)
    (batch,) = loader.epoch_batches(data, 5)
    assert batch["positives"].tolist() == [0, -1, 0, 1, 1]
    np.testing.assert_array_equal(batch["image"], load_images(images[:5], SIZE))
    assert not {"text", "label"} & batch.keys()


def test_part_of_a_file_and_a_remote_one(images, tmp_path):
    data = [Path(path).read_bytes() for path in images[:2]]
    shard = tmp_path / "shard"
    shard.write_bytes(b"head" + data[0] + data[1])
    first, second = f"{shard}#4:{len(data[0])}", f"{shard}#{4 + len(data[0])}:{len(data[1])}"
    with fsspec.open("memory://bucket/a.png", "wb") as file:
        file.write(data[0])
    codec = pil_codec("big_vision")
    expected = load_images(images[:2], SIZE)
    remote = "memory://bucket/a.png"
    parts = [(first, 0), (second, 1), (remote, 0), (f"{remote}#0:{len(data[0])}", 0)]
    for path, pixels in parts:
        np.testing.assert_array_equal(load_image(path, SIZE, codec), expected[pixels])
    for path, reason in [
        ("memory://bucket/a.png#9:999999", "the file ends before byte 1000008"),
        (f"{shard}#4:999999", "the file ends before byte 1000003"),
        ("memory://bucket/none.png", "no such file"),
        (f"{tmp_path}/none#0:3", "no such file"),
    ]:
        with pytest.raises(UnreadableImage, match=f"^{path}: {reason}$"):
            load_image(path, SIZE, codec)


def test_threads_end_when_the_consumer_stops(images):
    before = threading.active_count()
    stream = loader.batches(make(images), 2, workers=3)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_a_dead_mount_ends_the_stream_and_names_the_image(images, monkeypatch):
    release, real = threading.Event(), content._read

    def hang(file, span):
        if file == images[2]:
            release.wait()
        return real(file, span)

    monkeypatch.setattr(content, "_read", hang)
    monkeypatch.setattr(limits, "_limits", limits.parse(None, None, None, 0.2))
    with pytest.raises(Stalled, match=f"^{images[2]}: not read within"):
        list(loader.epoch_batches(make(images), 2, workers=1))
    release.set()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(batch_size=6, process_count=4), "a multiple of 4 hosts"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(batch_size=4, process_index=2, process_count=2), "process_index is 2"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_at_once(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        loader.batches(make(images), **arguments)


def test_an_input_that_does_not_fit_is_refused(images):
    source, other = make(images).examples[0], Examples(images)
    with pytest.raises(ValueError, match="have texts"):
        Input((source, other), Order((7, 7)), SIZE)
    with pytest.raises(ValueError, match="order.sizes is"):
        Input((source,), Order((8,)), SIZE)
    with pytest.raises(ValueError, match="unknown preprocess"):
        Input((source,), Order((7,)), SIZE, "squash")
    with pytest.raises(ValueError, match="nonesuch:// cannot be reached here"):
        loader.batches(Input((Examples(["nonesuch://a"]),), Order((1,)), SIZE), 1)


def test_windows_are_within_the_image_and_of_the_share_asked_for():
    augment = Augment(crop=(0.2, 0.6))
    shares = []
    for i in range(300):
        top, left, h, w = window(augment, 90, 120, (0, 0, 0, i))
        assert 0 <= top <= 90 - h and 0 <= left <= 120 - w
        assert 0.7 <= w / h <= 1.4
        shares.append(h * w / (90 * 120))
    assert 0.19 < min(shares) < 0.25 and 0.55 < max(shares) < 0.61
    assert window(augment, 1, 500, (0, 0, 0, 0)) == (0, 0, 1, 500)
    assert window(Augment(), 9, 8, (0, 0, 0, 0)) == (0, 0, 9, 8)


def test_flip_and_colour(images):
    pixels = decode(images[0])
    flipped = [recolour(Augment(flip=True), pixels, (0, 0, 0, i)) for i in range(200)]
    share = np.mean([(f == pixels[:, ::-1]).all() for f in flipped])
    assert 0.4 < share < 0.6
    assert recolour(Augment(), pixels, (0, 0, 0, 0)) is pixels
    grey = np.full((4, 4, 3), 100, np.uint8)
    levels = {int(recolour(Augment(colour=0.2), grey, (0, 0, 0, i))[0, 0, 0]) for i in range(200)}
    assert 80 <= min(levels) < 85 and 115 < max(levels) <= 120
    with pytest.raises(ValueError, match="colour is 2.0"):
        Augment(colour=2.0)
    with pytest.raises(ValueError, match="crop is"):
        Augment(crop=(0.0, 1.0))


def test_pixels_of_every_kind_of_file(real_data, tmp_path):
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(tmp_path / "16.png")
    paths = [*map(str, sorted((real_data / "images").glob("*.jp*g"))), str(tmp_path / "16.png")]
    (batch,) = loader.epoch_batches(make(paths), len(paths))
    np.testing.assert_array_equal(batch["image"], load_images(paths, SIZE))
