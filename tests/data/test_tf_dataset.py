"""The tf.data pipeline and its service give the batches of the threads, bit for bit."""

import io
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from dicom_files import made
from PIL import Image
from test_loader import equal, tokenize
from test_tf import SIZE, jpeg

from medsiglip_jax.data import examples, loader
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.loader import Input
from medsiglip_jax.data.order import Order
from medsiglip_jax.files import limits
from medsiglip_jax.files.threads import Stalled
from medsiglip_jax.preprocess import bytes as file_bytes
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.augment import Augment

tf = pytest.importorskip("tensorflow")

from medsiglip_jax.data import tf as pipelines  # noqa: E402
from medsiglip_jax.data import tfrecord  # noqa: E402
from medsiglip_jax.data.tf import rows, service  # noqa: E402

AUGMENT = Augment((0.2, 0.9), True, 0.4)


def png(mode="RGB", damage=False):
    pixels = np.random.default_rng(3).integers(0, 256, (31, 27, len(mode)), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels).save(file, "PNG")
    content = file.getvalue()
    return content[: len(content) // 2] if damage else content


def contents():
    """Name -> bytes: what the graph decodes, what it leaves to Python, and damage to both."""
    whole = jpeg(quality=85)
    slice_ = made(np.arange(600, dtype=np.uint16).reshape(20, 30), BitsStored=16, HighBit=15)
    return {
        "a.jpg": whole, "b.jpg": jpeg("L"), "progressive.jpg": jpeg(progressive=True),
        "cmyk.jpg": jpeg("CMYK"), "half.jpg": whole[: len(whole) // 2], "header.jpg": whole[:30],
        "rgb.png": png(), "grey.png": png("L"), "alpha.png": png("RGBA"),
        "half.png": png(damage=True), "slice.dcm": slice_, "half.dcm": slice_[: len(slice_) // 2],
        "empty.jpg": b"",
    }  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files, records of a TFRecord shard and members of a tar, readable or not; and one missing."""
    folder = tmp_path_factory.mktemp("kinds")
    files = contents()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    paths = [str(folder / name) for name in files]
    tfrecord.write_shards(Examples(paths[:6]), folder / "records", 2)
    members = {name: content for name, content in files.items() if content}
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{name.replace('.', '_')}.{name[-3:]}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    records = examples.read(folder / "records").images
    packed = examples.read(folder / "shard.tar").images
    return [*paths, *records, *packed, str(folder / "none.jpg")]


def make(images, **kwargs):
    numbers = np.arange(len(images), dtype=np.int32)
    texts = [f"text {i}" for i in numbers]
    source = Examples(images, texts, numbers, tuple(map(str, numbers)), positives=numbers // 3)
    order = Order((len(images),), seed=2)
    return Input((source,), order, SIZE, tokenize=tokenize, seed=7, **kwargs)


def same(maker, left, right, *arguments, **options):
    """Both make the same batches and the same reports -> the reports."""
    ours, theirs = [], []
    found = left(*arguments, on_error=lambda *a: ours.append(a), **maker, **options)
    expected = right(*arguments, on_error=lambda *a: theirs.append(a), **options)
    count = 0
    for one, other in zip(found, expected, strict=True):
        equal(dict(one), other)
        count += 1
    assert ours == theirs and count
    return ours


@pytest.mark.parametrize(
    "host, preprocess, augment",
    [(0, "big_vision", AUGMENT), (1, "big_vision", Augment()), (1, "serving", AUGMENT)],
)
def test_two_epochs_with_damage_resumed_on_two_hosts(images, host, preprocess, augment):
    """Every kind of source; the first steps are those of an earlier run."""
    input = make(images, preprocess=preprocess, augment=augment)
    steps = 2 * len(images) // 8 + 1
    process = dict(process_index=host, process_count=2)
    said = same({}, pipelines.batches, loader.batches, input, 8, 2, steps, **process)
    assert any("truncated" in reason for _, reason in said)  # refused by TensorFlow, not before


def test_an_epoch_has_every_row_once_and_padding(images):
    input = make(images, augment=AUGMENT)
    said = same({}, pipelines.epoch_batches, loader.epoch_batches, input, 12)
    broken = {path for path, _ in said}
    assert (
        len(said)
        == len(broken)
        == sum(
            any(word in path for word in ("half", "header", "empty", "none"))
            for path in images[:13]
        )
        + sum(path in broken for path in images[13:])
    )


def test_the_data_set_has_shapes_and_repeats_itself(images):
    input, said = make(images), []
    made = pipelines.dataset(input, 6, 1, 4, on_error=lambda *a: said.append(a))
    shapes = {name: spec.shape.as_list() for name, spec in made.element_spec.items()}
    assert shapes == {
        "image": [6, SIZE, SIZE, 3], "mask": [6], "text": [6, 2], "label": [6], "positives": [6],
    }  # fmt: skip
    first, again = list(made.as_numpy_iterator()), list(made.as_numpy_iterator())
    expected = []
    for one, two, other in zip(
        first, again,
        loader.batches(input, 6, 1, 4, on_error=lambda *a: expected.append(a)), strict=True,
    ):  # fmt: skip
        equal(one, other)
        equal(two, other)
    assert said == expected * 2
    once = pipelines.epoch_dataset(input, 6)
    assert sum(batch["mask"].sum() for batch in once.as_numpy_iterator()) == len(images) - len(
        list_of_unreadable(input)
    )


def list_of_unreadable(input):
    said = []
    list(loader.epoch_batches(input, 6, on_error=lambda *a: said.append(a)))
    return said


def test_nothing_before_the_first_step_is_read(images, monkeypatch):
    input, read = make(images[:5]), []

    def record(path, **_):
        read.append(path)
        return np.zeros((2, 2, 3), np.uint8), None

    monkeypatch.setattr(rows.sources, "read", record)
    list(pipelines.batches(input, 2, 2, 3))
    _, _, expected = input.order.at(np.arange(4, 6))
    assert sorted(read) == sorted(images[row] for row in expected)


def test_what_is_no_fault_of_an_image_ends_the_run_as_it_is(images, monkeypatch):
    def fail(path, **_):
        raise ModuleNotFoundError("no decoder for any of these")

    monkeypatch.setattr(rows.sources, "read", fail)
    with pytest.raises(ModuleNotFoundError, match="no decoder for any of these"):
        list(pipelines.batches(make(images), 2, 0, 1))


def test_what_fails_in_the_graph_is_no_unreadable_image(images, monkeypatch):
    """Once, as memory runs out: Python has no bytes to decode instead."""
    failed, real = [], rows.PixelRows.resize

    def fail_once(self, pixels):
        if not failed:
            failed.append(1)
            raise MemoryError("of the graph")
        return real(self, pixels)

    monkeypatch.setattr(rows.PixelRows, "resize", fail_once)
    (image,) = [path for path in images if path.endswith("/rgb.png")]
    with pytest.raises(MemoryError, match="of the graph"):
        list(pipelines.epoch_batches(make([image], preprocess="serving"), 1))


@pytest.mark.parametrize("make_batches", ["pixels", "pp"])
def test_a_disk_that_does_not_answer_ends_the_run(images, monkeypatch, make_batches):
    release, read = threading.Event(), file_bytes._read

    def hang(file, span):
        if file.endswith("b.jpg"):
            release.wait(60)
        return read(file, span)

    monkeypatch.setattr(file_bytes, "_read", hang)
    monkeypatch.setattr(limits, "_limits", limits.parse(None, None, None, 0.5))
    input = make([path for path in images if path.endswith((".jpg", ".png"))])
    with pytest.raises((Stalled, tf.errors.OpError), match="b.jpg: not read within 0.5 s"):
        if make_batches == "pixels":
            list(pipelines.epoch_batches(input, 2))
        else:
            string = f"decode|resize({SIZE})|keep('image')"
            list(pipelines.pp_dataset(input, string, 2, 0, 20))
    release.set()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(batch_size=6, process_count=4), "a multiple of 4 hosts"),
        (dict(batch_size=4, process_index=2, process_count=2), "process_index is 2"),
        (dict(batch_size=4, data_service="host:1"), "expected grpc://HOST:PORT"),
        (dict(batch_size=4, data_service="grpc://localhost:1"), "nobody answers"),
    ],
)
def test_what_cannot_be_is_refused_at_once(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipelines.batches(make(images), **arguments)


# ------------------------------------------------------------------------------------ the service


@pytest.fixture(scope="module")
def address():
    """A dispatcher with two workers."""
    dispatcher = service.start_dispatcher()
    workers = [service.start_worker(dispatcher.target) for _ in range(2)]
    yield dispatcher.target
    del workers


def test_two_workers_give_the_batches_in_order(images, address):
    input = make(images, augment=AUGMENT)
    given = {"data_service": address}
    process = dict(process_index=1, process_count=2)
    same(given, pipelines.batches, loader.batches, input, 8, 1, 12, **process)


def test_steps_that_are_late_or_lost_are_made_here():
    arriving = iter([{"step": [n]} for n in (3, 0, 1, 40, 39, *range(5, 30))])
    found = service.in_order(arriving, range(8), lambda step: {"step": [step], "made": True})
    numbers = [(batch["step"][0], "made" in batch) for batch in found]
    assert numbers == [(n, n in (2, 4)) for n in range(8)]


def test_a_worker_without_our_functions_is_named(images, address, monkeypatch):
    from tensorflow.python.ops import script_ops

    register = service.register
    monkeypatch.setattr(service, "register", lambda: None)
    script_ops._py_funcs._funcs.pop(service._TOKEN)
    try:
        with pytest.raises(ValueError, match="a plain one of TensorFlow.*worker grpc://"):
            list(pipelines.batches(make(images), 4, 0, 2, data_service=address))
    finally:
        register()


def test_what_travels_is_all_that_the_pixels_depend_on(images, monkeypatch):
    places = np.arange(2, 5)
    sent = rows.PixelRows.of(make(images, augment=AUGMENT), 8, places, "bilinear")
    packed = service._packed(sent)
    arrived = service._unpacked(packed)
    assert arrived.part == (2, 5) and arrived.augment == AUGMENT and arrived.order == sent.order
    for one, other in zip(arrived.plan(np.int64(3)), sent.plan(np.int64(3)), strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(service, "_versions", lambda: {"pillow": "1.0"})
    with pytest.raises(ValueError, match="install the same versions"):
        service._unpacked(packed)


def test_a_worker_keeps_what_it_needs_and_not_all_runs_that_there_were(images, monkeypatch):
    monkeypatch.setattr(service, "_known", {})
    packed = [
        service._packed(rows.PixelRows.of(make(images[n:]), 8, np.arange(8), "bilinear"))
        for n in range(len(images) - 8)
    ]
    for key, content in enumerate(packed):
        service._serve(bytes([key]), content, b"plan", np.int64(0))
        pixels = np.zeros((8, 8, 3), np.uint8)
        for kept in {0, key}:  # which a run calls again and again, and brings along once
            service._serve(bytes([kept]), b"", b"recolour", pixels, np.zeros(3, np.int64))
    assert len(service._known) == service._KEPT and bytes([0]) in service._known


@pytest.mark.slow
def test_a_worker_in_another_process(images):
    command = [sys.executable, "-m", "medsiglip_jax.data.tf.service"]
    dispatcher = service.start_dispatcher()
    worker = subprocess.Popen([*command, "worker", dispatcher.target, "--host", "localhost"])
    try:
        given = {"data_service": dispatcher.target}
        same(given, pipelines.batches, loader.batches, make(images, augment=AUGMENT), 8, 0, 4)
    finally:
        worker.kill()
        worker.wait()


# ---------------------------------------------------------------------------- what Python is told


def test_sources_of_the_two_kinds_of_shards_are_ranges_of_bytes(images):
    names = [path for path in images if "#" in path]
    assert any("shard.tar#" in name for name in names) and any("tfrecord#" in n for n in names)
    assert all(sources.read_bytes(name) for name in names)
