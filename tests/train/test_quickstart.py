"""The quickstart, short: what it writes, that it repeats, and that it never sees what it holds out.
The real length is marked slow."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import medsiglip_jax
from medsiglip_jax.data import examples
from medsiglip_jax.files import locks
from medsiglip_jax.preprocess.text import Tokenizer
from medsiglip_jax.train import quickstart

SHORT = quickstart.QuickstartSettings(total_steps=3, warmup_steps=1, batch_size=16)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart")
    return quickstart.run(workdir, seed=7, progress=False, settings=SHORT)


@pytest.fixture(scope="module")
def digits():
    return quickstart.load_digits(seed=0, held_out=0.25)


def test_the_result(first):
    assert set(first) == {"held_out_accuracy", "macro_auc", "model", "picture", "seconds"}
    assert 0 <= first["held_out_accuracy"] <= 1 and 0 <= first["macro_auc"] <= 1
    assert first["seconds"] > 0
    with Image.open(first["picture"]) as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
        picture.load()


def test_the_folder_is_an_ordinary_model(first):
    """What run reports is what anyone gets from the folder, by the public names alone."""
    model = medsiglip_jax.load(first["model"])
    held_out = quickstart.load_digits(7, SHORT.held_out)[1]
    prompts = [f"a handwritten {word}" for word in quickstart.WORDS]
    logits = model.similarity(
        model.encode_image(model.processor.images(list(held_out.scans))),
        model.encode_text(model.processor.texts(prompts)),
    )
    assert np.mean(logits.argmax(axis=1) == held_out.labels) == first["held_out_accuracy"]
    workdir = Path(first["model"]).parent
    assert len(list((workdir / "digits" / "images").iterdir())) == len(held_out.labels)
    sample = workdir / "held_out" / "3.png"
    assert model.processor.images(sample).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(first, tmp_path, capfd):
    again = quickstart.run(tmp_path, seed=7, settings=SHORT)
    out, err = capfd.readouterr()
    assert out == "" and "training: 100%" in err
    for name in ("model/model.safetensors", "model/spiece.model", "predictions.png"):
        want = (Path(first["model"]).parent / name).read_bytes()
        assert (tmp_path / name).read_bytes() == want, name
    assert again["macro_auc"] == first["macro_auc"]

    training, _ = quickstart.load_digits(7, SHORT.held_out)
    with jax.default_device(jax.devices("cpu")[0]):  # as run does, or it is another compilation
        other = quickstart.fit(training, 8, SHORT, tmp_path / "other", progress=False)
    kernels = [
        np.asarray(model.params["img"]["embedding"]["kernel"])
        for model in (other, medsiglip_jax.load(again["model"]))
    ]
    assert not np.allclose(*kernels)


def test_only_a_quickstart_is_replaced(first, tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def reached(*args):
        raise Reached

    monkeypatch.setattr(quickstart, "load_digits", reached)
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model: exists, and no quickstart wrote it"):
        quickstart.run(tmp_path)
    with pytest.raises(Reached):
        quickstart.run(Path(first["model"]).parent)


def test_an_earlier_training_that_cannot_be_removed_is_not_resumed(tmp_path, monkeypatch):
    """It may be of another seed."""

    def held(path, ignore_errors=False, **_):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "training").mkdir()
    (tmp_path / ".quickstart").touch()
    monkeypatch.setattr(quickstart.shutil, "rmtree", held)
    monkeypatch.setattr(quickstart, "fit", lambda *_: pytest.fail("the training was resumed"))
    with pytest.raises(PermissionError, match="training"):
        quickstart.run(tmp_path)


def test_a_second_run_on_the_folder_is_refused(tmp_path):
    with locks.lock(tmp_path / ".quickstart.lock"):
        with pytest.raises(FileExistsError, match="another run"):
            quickstart.run(tmp_path)


def test_interrupted_training_leaves_no_model(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quickstart.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".quickstart"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs optax, orbax, sklearn; pip install"):
        quickstart.run(tmp_path)


# ---------------------------------------------------------------------------------- the split


def test_split_is_stratified_and_disjoint(digits):
    training, held_out = digits
    assert len(training.labels) + len(held_out.labels) == 1797
    total = np.bincount(np.concatenate([training.labels, held_out.labels]))
    np.testing.assert_allclose(np.bincount(held_out.labels) / total, 0.25, atol=0.005)
    seen = {scan.tobytes() for scan in training.scans}
    assert not any(scan.tobytes() in seen for scan in held_out.scans)
    assert training.scans.min() == 0 and training.scans.max() == 255


def test_split_depends_on_the_seed_alone(digits):
    np.testing.assert_array_equal(quickstart.load_digits(0, 0.25)[1].scans, digits[1].scans)
    other = quickstart.load_digits(1, 0.25)[1]
    assert not np.array_equal(other.scans, digits[1].scans)


def test_the_table_holds_what_was_held_out(digits, tmp_path):
    """For those who train further: every digit is in every split, in the same shares."""
    _, held_out = digits
    quickstart.write_table(tmp_path, held_out)
    rows = examples.read(tmp_path / "digits.csv", label="label", classes=quickstart.WORDS)
    scans = [np.asarray(Image.open(path)) for path in rows.images]
    np.testing.assert_array_equal(scans, held_out.scans)
    np.testing.assert_array_equal(rows.labels, held_out.labels)
    for split, share in {"train": 0.6, "validation": 0.15, "test": 0.25}.items():
        counts = np.bincount(rows.of_split(split).labels, minlength=10)
        np.testing.assert_allclose(counts / np.bincount(held_out.labels), share, atol=0.06)


# -------------------------------------------------------------------------------- the batches


@pytest.fixture(scope="module")
def model():
    """Only its processor is used."""
    tokenizer = quickstart.train_tokenizer(SHORT.text.vocab_size)
    text = dataclasses.replace(SHORT.text, vocab_size=Tokenizer(tokenizer).vocab_size)
    config = medsiglip_jax.ModelConfig(SHORT.vision, text)
    return medsiglip_jax.Model({}, config, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def few(digits):
    """10 batches and a rest: all images are resized before the first batch."""
    return quickstart.Digits(digits[0].scans[:165], digits[0].labels[:165])


def test_batches_are_functions_of_seed_and_step(few, model):
    recipe = dataclasses.replace(SHORT, total_steps=16)  # 10 steps are an epoch
    once, again = (list(quickstart.batches(few, model, 0, recipe)) for _ in range(2))
    other = next(quickstart.batches(few, model, 1, recipe))
    assert len(once) == 16
    for a, b in zip(once, again, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert not np.array_equal(once[0]["image"], other["image"])
    assert not np.array_equal(once[0]["image"], once[10]["image"])
    longer = quickstart.batches(few, model, 0, dataclasses.replace(recipe, total_steps=600))
    np.testing.assert_array_equal(next(longer)["text"], once[0]["text"])


def test_an_epoch_shows_each_image_once(few, model):
    recipe = dataclasses.replace(SHORT, total_steps=10, shift=0)
    batches = list(quickstart.batches(few, model, 0, recipe))
    seen = {image.tobytes() for batch in batches for image in batch["image"]}
    assert len(seen) == 10 * 16
    assert seen <= {x.tobytes() for x in model.processor.images(list(few.scans))}


def test_captions_and_images_show_the_digit_of_positives(few, model):
    recipe = dataclasses.replace(SHORT, shift=0)
    digit_of = {
        image.tobytes(): label
        for image, label in zip(model.processor.images(list(few.scans)), few.labels, strict=True)
    }
    texts = [model.processor.texts(quickstart.captions(digit)).tolist() for digit in range(10)]
    for batch in quickstart.batches(few, model, 0, recipe):
        assert batch["image"].dtype == np.uint8 and batch["text"].dtype == np.int32
        assert batch["mask"].all()
        for image, tokens, label in zip(
            batch["image"], batch["text"], batch["positives"], strict=True
        ):
            assert digit_of[image.tobytes()] == label
            assert tokens.tolist() in texts[label]


def test_captions_are_distinct_and_uncut(model):
    tokens = [model.processor.texts(quickstart.captions(digit)) for digit in range(10)]  # or warns
    assert len({row.tobytes() for row in np.concatenate(tokens)}) == 10 * len(quickstart.CAPTIONS)
    assert "one of the handwritten sixes" in quickstart.captions(6)


@pytest.mark.parametrize("down, right", [*itertools.product((-1, 0, 2), repeat=2)])
def test_shift(down, right):
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 2] = 7, 8, 9
    (moved,) = quickstart.shift(image[None], np.array([[down, right]]))
    want = np.zeros_like(image)
    want[2 + down, 2 + right] = 7, 8, 9
    np.testing.assert_array_equal(moved, want)


# -------------------------------------------------------------------------------- the picture


@pytest.mark.parametrize("mistakes", [0, 1, 450])
def test_picture_marks_mistakes(digits, mistakes):
    held_out = digits[1]
    predicted = held_out.labels.copy()
    predicted[-mistakes or len(predicted) :] += 1
    scores = np.full((len(predicted), 10), -5, np.float32)
    scores[np.arange(len(predicted)), predicted % 10] = 3
    page = np.asarray(quickstart.draw(held_out, scores)).astype(int)
    red = (page[..., 0] > page[..., 1] + 100).sum()
    assert (red > 1000) == (mistakes > 0)


# ------------------------------------------------------------------------------ at full length


@pytest.mark.float
@pytest.mark.slow
@pytest.mark.parametrize("seed", (2, 3, 4))  # tests/trust/test_toy.py trains with 0 and 1
def test_accuracy(tmp_path, seed):
    result = quickstart.run(tmp_path, seed)
    assert result["held_out_accuracy"] >= 0.95
    assert result["macro_auc"] >= 0.99


@pytest.mark.slow
def test_transformers_reads_the_folder(first):
    transformers = pytest.importorskip("transformers", reason="a check against transformers")
    torch = pytest.importorskip("torch")
    ours = medsiglip_jax.load(first["model"])
    prompts = [quickstart.PROMPT.format(word=word) for word in quickstart.WORDS]
    theirs = transformers.AutoModel.from_pretrained(first["model"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(first["model"])
    tokens = tokenizer(prompts, padding="max_length", return_tensors="pt")["input_ids"]
    np.testing.assert_array_equal(tokens.numpy(), ours.processor.texts(prompts))
    images = ours.processor.images(list(quickstart.load_digits(7, 0.25)[1].scans[:9]))
    pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.inference_mode():
        want = theirs(input_ids=tokens, pixel_values=pixels).logits_per_image.numpy()
    got = ours.similarity(ours.encode_image(images), ours.encode_text(tokens.numpy()))
    np.testing.assert_allclose(got, want, atol=1e-4)
