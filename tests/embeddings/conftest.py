"""A model, and a run of it."""

import numpy as np
import pytest
from embedding_runs import MADE, draw, write_labelled_run, write_table

import medsiglip_jax
from medsiglip_jax.data import inputs
from medsiglip_jax.embeddings.probe import linear
from medsiglip_jax.inference.embed import EmbedOptions, embed


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


@pytest.fixture(scope="module")
def run(model, untouched_pictures, tmp_path_factory):
    """Seven images and two texts, embedded with another preset than the default."""
    folder = tmp_path_factory.mktemp("embedded")
    (folder / "notes.txt").write_text("photo of a b\nscan of a c\n")
    rows = inputs.rows([untouched_pictures, folder / "notes.txt"])
    embed(model, rows, folder / "run", EmbedOptions("serving", normalize=False, shard_size=3))
    return folder / "run"


GRADES = ("none", "mild", "severe")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """200 images of 50 patients, embedded; labels in another order, a few without one."""
    folder = tmp_path_factory.mktemp("joined")
    vectors, labels = draw(200)
    ids = [f"p{i // 4:02d}/{i}.png" for i in range(200)]
    run = write_labelled_run(folder / "run", ids, vectors)
    order = np.random.default_rng(1).permutation(200)
    names = [GRADES[k] if i % 20 else "" for i, k in enumerate(labels)]
    data = write_table(
        folder / "labels.csv", image=[ids[i] for i in order], patient=[i // 4 for i in order],
        label=[names[i] for i in order], finding=[labels[i] % 2 for i in order],
        other=["" if i % 7 == 0 else labels[i] // 2 for i in order],
    )  # fmt: skip
    return data, run, dict(zip(ids, vectors, strict=True)), dict(zip(ids, names, strict=True))


@pytest.fixture(scope="module")
def fitted():
    return linear.fit(*draw(200), *draw(100, seed=1), ["none", "mild", "sévère"], provenance=MADE)
