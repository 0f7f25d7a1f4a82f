"""The whole loop on a laptop's CPU, in about half a minute: train, save, load, classify, draw.

scikit-learn brings 1,797 handwritten digits. Two small towers learn from scratch, with SigLIP's
sigmoid loss, which caption belongs to which image. What is written is an ordinary checkpoint in
Hugging Face layout; loaded back, it classifies the digits held out, zero-shot, by prompts.
"""

import functools
import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from medsiglip_jax import metrics
from medsiglip_jax.files import locks, places, storage
from medsiglip_jax.model import api, towers
from medsiglip_jax.model.config import ModelConfig, TextConfig, VisionConfig
from medsiglip_jax.preprocess import text

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LAST = "digits"  # the folder that is written last: where it is, all is
PROMPT = "a handwritten {word}"
CAPTIONS = (
    PROMPT,
    "the digit {word}",
    "the digit {numeral}",
    "the number {word}",
    "the number {numeral}",
    "one of the handwritten {plural}",
    "digits and numbers: {word}",
    "{numeral}",
)


@dataclass(frozen=True)
class QuickstartSettings:
    """Sizes and hyperparameters, and why they are what they are.

    Accuracies are means (minima) over four seeds, on a fifth of the training images that was held
    out to choose them; as it stands 0.989 (0.985), without `positives` 0.986 (0.974).
    """

    held_out: float = 0.25  # of each digit's images
    # The scans are 8 x 8 and go through the processor like any image. Patches of 4 make 16 tokens:
    # 0.964 (0.937) in twice the time. Width 64: 0.987 (0.985).
    vision: VisionConfig = VisionConfig(
        image_size=16, patch_size=8, width=96, depth=2, mlp_dim=192, num_heads=2
    )
    # The longest caption takes 12 tokens. SentencePiece finds 52 of the 96 pieces it may make.
    text: TextConfig = TextConfig(
        vocab_size=96, context_length=16, width=64, depth=1, mlp_dim=128, num_heads=2, embed_dim=96
    )
    batch_size: int = 64
    total_steps: int = 600  # 400 give 0.956 (0.881): some seeds start late
    warmup_steps: int = 60
    learning_rate: float = 2e-3  # with patches of 4, the towers collapsed at this and batch 32
    weight_decay: float = 3e-3  # 1e-2 gives 0.977 (0.952)
    # A tenth of all pairs are positive, so log(0.1 / 0.9) is the best logit before training.
    # SigLIP's -10, for one positive pair in thousands, gives 0.969 (0.948).
    bias: float = -2.2
    shift: int = 1  # pixels of the 16, every way


@dataclass(frozen=True)
class Digits:
    """Scans uint8 [n, 8, 8], paper 0 and ink 255, and the digit each shows, int [n]."""

    scans: UInt8[np.ndarray, "n 8 8"]
    labels: Int[np.ndarray, " n"]


def run(
    workdir: str | os.PathLike,
    seed: int = 0,
    progress: bool = True,
    settings: QuickstartSettings = QuickstartSettings(),
) -> dict[str, Any]:
    """Trains, saves, loads, classifies and draws; the same seed gives the same model.

    Args:
        workdir: gets `training/` (metrics and checkpoint), `model/` (Hugging Face layout),
            `predictions.png`, `held_out/` (an image of each digit to try the model on) and
            `digits/` (all held-out images, and the table `digits.csv` of them, which the worked
            examples use). They replace those of an earlier quickstart.
        seed: of the split, the initial weights, the order and the augmentation.
        progress: whether a bar is shown on stderr.
        settings: sizes and hyperparameters.

    Returns:
        `held_out_accuracy` and `macro_auc` (each digit against the rest, averaged) on the held-out
        images, the paths `model` and `picture`, and `seconds` of wall time.

    Raises:
        ModuleNotFoundError: scikit-learn, optax or orbax is missing.
        FileExistsError: another quickstart is writing to `workdir`, or something there was not
            written by a quickstart.
    """
    places.refuse_remote(workdir)
    start, workdir = time.perf_counter(), Path(workdir)
    _check_installed()
    with locks.lock(workdir / ".quickstart.lock"), jax.default_device(jax.devices("cpu")[0]):
        _claim(workdir)
        training, held_out = load_digits(seed, settings.held_out)
        if (workdir / "training").exists():  # of an earlier quickstart, perhaps of another seed
            shutil.rmtree(workdir / "training")
        model = fit(training, seed, settings, workdir / "training", progress)
        api.save(model, workdir / "model", overwrite=True)
        scores = classify(api.load(workdir / "model"), held_out.scans)
        with storage.new_file(workdir / "predictions.png") as path:
            draw(held_out, scores).save(path, format="PNG")
        with storage.new_folder(workdir / "held_out", overwrite=True) as folder:
            for digit in range(10):
                scan = held_out.scans[held_out.labels == digit][0]
                Image.fromarray(scan).save(folder / f"{digit}.png")
        with storage.new_folder(workdir / LAST, overwrite=True) as folder:
            write_table(folder, held_out)
    return {
        "held_out_accuracy": metrics.accuracy(scores, held_out.labels),
        "macro_auc": metrics.macro_auc(scores, held_out.labels),
        "model": str(workdir / "model"),
        "picture": str(workdir / "predictions.png"),
        "seconds": time.perf_counter() - start,
    }


def _check_installed() -> None:
    packages = ("optax", "orbax", "sklearn")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"the quickstart needs {', '.join(missing)}; pip install 'medsiglip-jax[quickstart]'"
        )


def _claim(workdir: Path) -> None:
    """Refuses to replace a model that no quickstart wrote."""
    marker = workdir / ".quickstart"
    for name in ("training", "model", "predictions.png", "held_out", "digits"):
        if (workdir / name).exists() and not marker.exists():
            raise FileExistsError(
                f"{workdir / name}: exists, and no quickstart wrote it; choose another workdir"
            )
    marker.touch()


# ----------------------------------------------------------------------------------- training


def load_digits(seed: int, held_out: float) -> tuple[Digits, Digits]:
    """The digits as (training, held out), split by `seed`; the same fraction of every digit."""
    from sklearn import datasets

    raw: Any = datasets.load_digits()
    scans = np.round(raw.images * (255 / 16)).astype(np.uint8)
    rng, out = np.random.default_rng(seed), np.zeros(len(scans), bool)
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(raw.target == digit))
        out[rows[: round(held_out * len(rows))]] = True
    return Digits(scans[~out], raw.target[~out]), Digits(scans[out], raw.target[out])


def captions(digit: int) -> list[str]:
    """Every caption that fits a digit."""
    word = WORDS[digit]
    plural = f"{word}es" if word == "six" else f"{word}s"
    return [c.format(word=word, numeral=digit, plural=plural) for c in CAPTIONS]


def train_tokenizer(vocab_size: int) -> bytes:
    """A SentencePiece model of the captions, with at most `vocab_size` pieces."""
    corpus = [caption for digit in range(10) for caption in captions(digit)]
    # A piece must occur in two words: without the plurals "seven" would be spelled out, without
    # "handwriting" so would "handwritten", and the longest caption take 24 or 17 tokens, not 12.
    return text.train([*corpus, "handwriting"], vocab_size)


def fit(
    training: Digits, seed: int, settings: QuickstartSettings, folder: Path, progress: bool = True
) -> api.Model:
    """Returns a model trained from scratch on these digits and their captions.

    `folder` gets metrics.jsonl and checkpoints/, as that of every training run.
    """
    from medsiglip_jax.train import loop, step  # here, after _check_installed

    tokenizer = train_tokenizer(settings.text.vocab_size)
    pieces = text.Tokenizer(tokenizer).vocab_size
    config = ModelConfig(settings.vision, replace(settings.text, vocab_size=pieces))
    params = api.init(config, seed).params
    params["b"] = jnp.full((1,), settings.bias, jnp.float32)

    optimizer, update = _optimizer_and_step(settings, config)
    stream = functools.partial(
        batches, training, api.Model(params, config, tokenizer=tokenizer), seed, settings
    )
    options = loop.LoopOptions(settings.total_steps, log_every=20)
    style: dict[str, Any] = {"unit": "step", "mininterval": 1, "disable": not progress}
    with tqdm(total=options.total_steps, desc="compiling", **style) as bar:

        def on_step(done: int, values: dict[str, float] | None) -> None:
            if done == 1:
                bar.reset()  # else the time left would count the compilation for every step
                bar.set_description("training")
            if values:
                bar.set_postfix(loss=f"{values['loss']:.2f}", refresh=False)
            bar.update(done - bar.n)

        state = step.init_state(params, optimizer)
        state = loop.fit(folder, state, update, stream, options, on_step=on_step)
    return api.Model(state["params"], config, tokenizer=tokenizer)


@functools.lru_cache(maxsize=1)
def _optimizer_and_step(settings: QuickstartSettings, config: ModelConfig):
    """Cached, so that a second run in the same process, with another seed, compiles nothing."""
    from medsiglip_jax.train import optim, step
    from medsiglip_jax.train.objectives.contrastive import Contrastive
    from medsiglip_jax.train.objectives.objective import Labels

    schedule = optim.schedule("cosine", settings.total_steps, settings.warmup_steps)
    decay = optim.OptimizerConfig(weight_decay=settings.weight_decay)
    optimizer = optim.make_optimizer(settings.learning_rate, schedule, decay)
    loss = Contrastive().loss(config, towers.Compute(), Labels())
    return optimizer, step.make_train_step(loss, optimizer)


def batches(
    training: Digits, model: api.Model, seed: int, settings: QuickstartSettings, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batch of every step from `start` on, a pure function of (seed, step).

    Captions of one digit fit all images of it, so the digit is the id that makes a pair positive.
    """
    images = model.processor.images(list(training.scans))
    tokens = np.stack([model.processor.texts(captions(digit)) for digit in range(10)])
    size = settings.batch_size
    for step in range(start, settings.total_steps):
        epoch, batch = divmod(step, len(images) // size)  # the rest of an epoch is left out
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(images))
        rows = order[batch * size : (batch + 1) * size]
        labels, rng = training.labels[rows], np.random.default_rng((seed, 1, step))
        offsets = rng.integers(-settings.shift, settings.shift, (size, 2), endpoint=True)
        yield {
            "image": shift(images[rows], offsets),
            "text": tokens[labels, rng.integers(len(CAPTIONS), size=size)],
            "mask": np.ones(size, bool),
            "positives": labels.astype(np.int32),
        }


def shift(
    images: UInt8[np.ndarray, "n h w 3"], offsets: Int[np.ndarray, "n 2"]
) -> UInt8[np.ndarray, "n h w 3"]:
    """Moves every image down and right by its offsets, in pixels, and fills with paper (0)."""
    n, height, width, _ = images.shape
    border = int(np.abs(offsets).max())
    padded = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
    rows = np.arange(height) + border - offsets[:, :1]
    columns = np.arange(width) + border - offsets[:, 1:]
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


# ------------------------------------------------------------------------------------ looking


def write_table(folder: Path, held_out: Digits) -> None:
    """Writes images and `digits.csv` with the columns id, image, label and split.

    The quickstart's model has not seen these images, so they are split once more, the same way for
    every digit: 60 % train, 15 % validation, 25 % test.
    """
    (folder / "images").mkdir()
    lines = ["id,image,label,split"]
    count = [0] * 10
    for number, (scan, digit) in enumerate(zip(held_out.scans, held_out.labels, strict=True)):
        name = f"images/{number:03}.png"
        Image.fromarray(scan).save(folder / name)
        place, count[digit] = count[digit] % 20, count[digit] + 1
        split = "train" if place < 12 else "validation" if place < 15 else "test"
        lines.append(f"{number:03},{name},{WORDS[digit]},{split}")
    (folder / "digits.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def classify(model: api.Model, scans: UInt8[np.ndarray, "n 8 8"]) -> Float32[np.ndarray, "n 10"]:
    """Zero-shot logits, one prompt per digit, as with any model of this kind."""
    images = model.processor.images(list(scans))
    prompts = model.processor.texts([PROMPT.format(word=word) for word in WORDS])
    return np.asarray(model.similarity(model.encode_image(images), model.encode_text(prompts)))


CELL, PITCH, MARGIN = 96, 108, 28  # pixels: an image, from column to column, around the page
INK, GREY, LIGHT, RED = "#1f2933", "#52606d", "#cbd2d9", "#c81e1e"


def draw(held_out: Digits, scores: Float32[np.ndarray, "n 10"], rows: int = 4) -> Image.Image:
    """A page of held-out images; below each the predicted word and the sigmoid of that pair.

    A column per digit with its first `rows` images; at the end up to ten mistakes, the most
    confident ones first.
    """
    truth, predicted, best = held_out.labels, scores.argmax(axis=1), scores.max(axis=1)
    wrong = np.flatnonzero(predicted != truth)
    mistakes = wrong[np.argsort(-best[wrong])][:10]
    top, row_height = MARGIN + 86, CELL + 36
    below = top + rows * row_height + 14

    height = below + (row_height + 44 if len(wrong) else 0)
    page = Image.new("RGB", (2 * MARGIN + 9 * PITCH + CELL, height), "white")
    pen = ImageDraw.Draw(page)
    _write_title(pen, truth, scores, len(wrong))

    def put(i, x: int, y: int) -> None:
        """Image i, black on white, in a frame over its label."""
        scan = Image.fromarray(255 - held_out.scans[i])
        page.paste(scan.resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
        frame, width, colour = (LIGHT, 1, INK) if predicted[i] == truth[i] else (RED, 3, RED)
        pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline=frame, width=width)
        label = f"{WORDS[predicted[i]]}  {1 / (1 + np.exp(-best[i])):.2f}"
        pen.text((x + CELL / 2, y + CELL + 5), label, colour, ImageFont.load_default(14), "ma")

    for digit in range(10):
        for row, i in enumerate(np.flatnonzero(truth == digit)[:rows]):
            put(i, MARGIN + digit * PITCH, top + row * row_height)
    if len(wrong):
        count = len(mistakes)
        which = "All" if count == len(wrong) else f"The most confident {count} of the"
        pen.text((MARGIN, below - 8), f"{which} mistakes", RED, ImageFont.load_default(16))
    for column, i in enumerate(mistakes):
        x, y = MARGIN + column * PITCH, below + 24
        put(i, x, y)
        label = f"true: {WORDS[truth[i]]}"
        pen.text((x + CELL / 2, y + CELL + 23), label, GREY, ImageFont.load_default(14), "ma")
    return page


def _write_title(pen: ImageDraw.ImageDraw, truth, scores, n_wrong: int) -> None:
    facts = (
        f"{len(truth) - n_wrong} of {len(truth)} right: accuracy "
        f"{metrics.accuracy(scores, truth):.1%}, macro AUC {metrics.macro_auc(scores, truth):.4f}"
    )
    legend = (
        f'The word is the best of ten prompts ("{PROMPT.format(word="zero")}" to "nine"); the '
        "number its sigmoid, the model's own probability that image and prompt belong together."
    )
    title = "Handwritten digits the model has never seen, named by text"
    pen.text((MARGIN, MARGIN - 6), title, INK, ImageFont.load_default(24))
    pen.text((MARGIN, MARGIN + 28), facts, INK, ImageFont.load_default(16))
    pen.text((MARGIN, MARGIN + 54), legend, GREY, ImageFont.load_default(14))
