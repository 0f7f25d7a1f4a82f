"""The engine: batches in order, every row with a vector or a reason, nothing left running."""

import threading
import time

import numpy as np
import pytest
import references
from dicom_files import made
from PIL import Image

import medsiglip_jax
from medsiglip_jax.data import inputs
from medsiglip_jax.inference.encode import image_rows
from medsiglip_jax.inference.engine import Engine
from medsiglip_jax.preprocess import sources

SIZE = 3


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


@pytest.fixture
def rows(pictures, tmp_path):
    """Seven images, one damaged and one missing, and two texts of which one is too long."""
    (tmp_path / "rows.csv").write_text(
        "image\n" + "".join(f"{path}\n" for path in sorted(pictures.rglob("[!.]*.[pj][np]g")))
        + f"{pictures}/gone.png\n"
    )  # fmt: skip
    (tmp_path / "notes.txt").write_text("photo of a b\n" + "scan of a c " * 99 + "\n")
    return inputs.rows([tmp_path / "rows.csv", tmp_path / "notes.txt"])


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("loader", "fetcher"))]


def test_every_row_has_a_vector_or_a_reason_in_order(model, rows):
    engine = Engine(model, "big_vision", True, SIZE)
    batches = list(engine.run(rows.batches(SIZE)))
    assert [len(batch.rows) for batch in batches] == [3, 3, 3, 2] and 0 < engine.busy() <= 1
    assert [row.id for batch in batches for row in batch.rows] == [row.id for row in rows]
    reasons = [reason for batch in batches for reason in batch.reasons]
    assert "truncated" in reasons[7].lower() and reasons[8] == "no such file"
    assert not any(reasons[:7] + reasons[9:])
    errors = [error for batch in batches for error in batch.errors]
    assert errors == [(rows[7].source, reasons[7]), (rows[8].source, reasons[8])]
    images = model.encode_image(model.processor.images([rows[i].source for i in range(7)]))
    texts = model.encode_text(model.processor.texts([rows[9].text]))
    got = np.concatenate([batch.vectors for batch in batches])
    assert got.shape == (9, 16)
    terms = references.model_terms(model.config)
    references.assert_close(got[:8], np.concatenate([images, texts]), terms)
    assert [batch.cut for batch in batches] == [0, 0, 0, 1] and not threads()


def test_what_a_decoder_tells_is_counted(model, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (9, 7), "red").save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGB", (9, 7), "red").save(tmp_path / "b.jpg")
    coloured = made(np.zeros((9, 7), np.uint16), PixelPresentation="COLOR")  # has no palette
    (tmp_path / "c.dcm").write_bytes(coloured)
    (batch,) = Engine(model, "serving", True, 3).run(inputs.rows([tmp_path]).batches(3))
    assert (batch.turned, batch.burned_in, batch.multi_frame, batch.unusual) == (1, 0, 0, 1)
    assert batch.subjects[:2] == [None, None] and batch.readable.all()


def test_vectors_that_are_not_finite_are_errors(checkpoint, pictures):
    model = medsiglip_jax.load(checkpoint)
    model.params["img"]["embedding"]["bias"] *= np.nan
    rows = inputs.rows([pictures / "0.png"])
    (batch,) = Engine(model, "big_vision", True, 1).run(rows.batches(1))
    assert batch.vectors.shape == (0, 16) and "not finite" in batch.reasons[0]


def test_vectors_that_the_stored_type_cannot_hold_are_errors(checkpoint, pictures):
    """65504 is the largest float16; raw vectors may be longer."""
    model = medsiglip_jax.load(checkpoint)
    model.params["img"]["MAPHead_0"]["MlpBlock_0"]["Dense_1"]["bias"] += 1e5
    rows = inputs.rows([pictures / "0.png"])
    for stored, readable in (("float32", 1), ("float16", 0)):
        (batch,) = Engine(model, "big_vision", False, 1, stored=stored).run(rows.batches(1))
        assert len(batch.vectors) == readable
    assert "float16 cannot hold" in batch.reasons[0]


def test_a_broken_loader_is_not_a_hang(model, rows, monkeypatch):
    """A bug in a thread is raised in the caller after the batches before it; no thread is left."""

    def read(source, *args, real=sources.read):
        if source == rows[4].source:
            raise RuntimeError("bug")
        return real(source, *args)

    monkeypatch.setattr(sources, "read", read)
    done = []
    with pytest.raises(RuntimeError, match="bug"):
        for batch in Engine(model, "big_vision", True, SIZE).run(rows.batches(SIZE)):
            done.append(batch)
    assert len(done) == 1 and not threads()


def test_reading_runs_ahead_but_not_away(model, pictures, monkeypatch):
    """While the caller holds one batch, only so many more are read; it may stop at any time."""
    read, real = [], sources.read
    monkeypatch.setattr(sources, "read", lambda *a: (read.append(a), real(*a))[1])
    engine = Engine(model, "big_vision", True, 1)
    results = engine.run(image_rows([pictures / "0.png"] * 200).batches(1))
    next(results)
    time.sleep(0.2)
    assert len(read) <= 2 + engine._workers + 4
    results.close()
    assert not threads()


def test_a_batch_has_at_least_one_row(model):
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        Engine(model, "big_vision", True, 0)
