"""What the methods find in a model that was trained to read a digit among scribbles.

A canvas of 25 patches has a digit and two scribbles; the text names the digit, so a map has to find
the digit and nothing else.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

from medsiglip_jax.model import api, towers
from medsiglip_jax.model.config import ModelConfig, TextConfig, VisionConfig
from medsiglip_jax.preprocess import text
from medsiglip_jax.train import quickstart
from medsiglip_jax.trust.explanation import explain

# With four digits a hundred steps give an accuracy of 0.94; ten digits take 200 for 0.91.
DIGITS = (0, 1, 4, 7)
STEPS, BATCH, LEARNING_RATE = 100, 64, 2e-3
SIDE, CELL = 40, 16
VISION = VisionConfig(image_size=SIDE, patch_size=8, width=64, depth=2, mlp_dim=128, num_heads=2)
TEXT = TextConfig(
    vocab_size=96, context_length=16, width=16, depth=1, mlp_dim=16, num_heads=1, embed_dim=64
)
TEXTS = [quickstart.PROMPT.format(word=quickstart.WORDS[digit]) for digit in DIGITS]
IMAGES = 8  # that are explained


def scribbles(rng, n):
    """Random walks as long as the strokes of a digit, [n, CELL, CELL]."""
    out, (y, x) = np.zeros((n, 8, 8), np.uint8), rng.integers(1, 7, (2, n))
    for _ in range(14):
        y, x = (np.clip(at + rng.integers(-1, 2, n), 0, 7) for at in (y, x))
        out[np.arange(n), y, x] = 255
    return np.kron(out, np.ones((1, 2, 2), np.uint8))


def canvases(rng, digits):
    """Each digit and two scribbles in three corners, uint8 [n, SIDE, SIDE, 3]; where digits are."""
    n, out = len(digits), np.zeros((len(digits), SIDE, SIDE), np.uint8)
    corners = np.argsort(rng.random((n, 4)), axis=1)
    places = np.stack([corners // 2, corners % 2], -1) * (SIDE - CELL)
    for number, things in enumerate((digits, scribbles(rng, n), scribbles(rng, n))):
        for canvas, thing, (top, left) in zip(out, things, places[:, number], strict=True):
            canvas[top : top + CELL, left : left + CELL] = thing
    return np.repeat(out[..., None], 3, -1), places[:, 0]


def scans():
    """(digit images, class) of training and test."""
    raw = datasets.load_digits()
    images = np.kron(
        np.round(raw.images * (255 / 16)).astype(np.uint8), np.ones((1, 2, 2), np.uint8)
    )
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(raw.target, DIGITS)))
    labels = np.searchsorted(DIGITS, raw.target)
    parts = np.split(chosen, [3 * len(chosen) // 4])
    return [(images[rows], labels[rows]) for rows in parts]


def train(model, images, labels):
    """Cross-entropy of the images over the texts, both towers."""
    tokens = jnp.asarray(model.processor.texts(TEXTS))
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, STEPS // 10, STEPS)
    optimizer = optax.adam(schedule)

    def loss(params, x, y):
        z, _ = towers.encode_image(params, x, model.config)
        ztxt = towers.encode_text(params, tokens, model.config)
        z, ztxt = towers.normalize(z), towers.normalize(ztxt)
        logits = towers.similarity(z, ztxt, params["t"], params["b"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    # As users compile: without optimisations a step takes four times as long.
    options = {"xla_backend_optimization_level": "2"}

    @partial(jax.jit, compiler_options=options)
    def update(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    params, state = model.params, optimizer.init(model.params)
    for step in range(STEPS):
        rng = np.random.default_rng((1, step))
        rows = rng.choice(len(images), BATCH)
        params, state = update(params, state, canvases(rng, images[rows])[0], labels[rows])
    return api.Model(params, model.config, tokenizer=model.processor.tokenizer_source)


@pytest.fixture(scope="module")
def models():
    """Trained, and with random weights."""
    tokenizer = quickstart.train_tokenizer(TEXT.vocab_size)
    pieces = text.Tokenizer(tokenizer).vocab_size
    config = ModelConfig(VISION, replace(TEXT, vocab_size=pieces))
    first, other = (
        api.Model(api.init(config, seed).params, config, tokenizer=tokenizer) for seed in (0, 3)
    )
    return train(first, *scans()[0]), other


@pytest.fixture(scope="module")
def shown():
    """Canvases with digits that the model has not seen, the class of each and where it lies."""
    images, labels = scans()[1]
    made, places = canvases(np.random.default_rng(5), images)
    return made, labels, places


def correlation(maps, others):
    """The mean over the images that both have maps of."""
    pairs = [(a.map.ravel(), b.map.ravel()) for a, b in zip(maps, others, strict=False)]
    return np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs])


def explained(model, shown, method, count=IMAGES, texts=2):
    """Maps of the first images, each for its own text and then for other ones."""
    images, labels, _ = shown
    made = [
        explain(model, image, [TEXTS[(label + n) % len(TEXTS)] for n in range(texts)],
                method=method, batch_size=16)
        for image, label in zip(images[:count], labels[:count], strict=True)
    ]  # fmt: skip
    return list(zip(*made, strict=True))


def test_the_model_reads_the_digits(models, shown):
    images, labels, _ = shown
    model = models[0]
    ztxt = model.encode_text(model.processor.texts(TEXTS))
    scores = np.asarray(model.similarity(model.encode_image(images), ztxt))
    assert (scores.argmax(1) == labels).mean() > 0.88


@pytest.mark.parametrize("method", ["ig", "occlusion"])
def test_maps_are_of_the_text_and_of_the_model(models, shown, method):
    own, other = explained(models[0], shown, method)
    better = np.mean([e.insertion_minus_deletion - e.random for e in own])
    other_text = correlation(own, other)
    random_weights = correlation(own, *explained(models[1], shown, method, 3, 1))
    figures = f"{method}: {better:.2f} above random, another text {other_text:.2f}, random "
    print(figures + f"weights {random_weights:.2f}, digit found {found(own, shown):.2f}")
    assert better >= 0.4
    assert other_text < 0.3 and abs(random_weights) < 0.3
    assert found(own, shown) > 0.5  # by chance 0.16


def test_a_rollout_is_the_same_for_every_text(models, shown):
    own, other = explained(models[0], shown, "rollout")
    assert all(np.array_equal(a.map, b.map) for a, b in zip(own, other, strict=True))
    assert not own[0].of_text and own[0].record["note"].startswith("where the model looks")


def found(maps, shown):
    """How often the patch with the highest sum belongs to the digit."""
    tops = []
    for explanation, (top, left) in zip(maps, shown[2][:IMAGES], strict=True):
        patches = explanation.map.reshape(5, 8, 5, 8).sum((1, 3))
        y, x = np.unravel_index(patches.argmax(), patches.shape)
        tops.append(top <= 8 * y < top + CELL and left <= 8 * x < left + CELL)
    return np.mean(tops)


@pytest.mark.float
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_maps_of_the_quickstart_are_complete(tmp_path, seed):
    """Of a digit of each kind for every text; a warning would be an error."""
    trained = quickstart.run(tmp_path, seed, progress=False)
    assert trained["held_out_accuracy"] >= 0.95 and trained["macro_auc"] >= 0.99
    texts = [quickstart.PROMPT.format(word=word) for word in quickstart.WORDS]
    made = explain(api.load(tmp_path / "model"), sorted((tmp_path / "held_out").iterdir()), texts)
    assert len(made) == 100
    assert all(e.steps <= 64 and e.completeness <= 0.01 for e in made)
