"""Runs of embeddings in control and of others, a table about them, and a reference."""

import pytest
from embeddings.embedding_runs import MADE, write_run, write_table
from known_images import DIM, FACTS, vectors

from medsiglip_jax.embeddings.probe import linear


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes a run of images r0, r1, … -> its folder."""
    root = tmp_path_factory.mktemp("runs")

    def call(name, x, **facts):
        ids = [f"{name}{i}" for i in range(len(x))]
        facts = FACTS | {"dim": x.shape[1]} | facts
        return write_run(root / name, [x], facts=facts, ids=ids)

    return call


@pytest.fixture(scope="module")
def known(write):
    return write("known", vectors(240, 0)[0])


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    from dataclasses import replace

    path = tmp_path_factory.mktemp("probe") / "probe.npz"
    made = replace(MADE, dim=DIM, source="m")
    linear.fit(*vectors(200, 7), *vectors(100, 8), ["a", "b", "c"], provenance=made).save(path)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Scanner, patient and label of the images of all runs."""
    path = tmp_path_factory.mktemp("table") / "images.csv"
    names = {"known": (240, 0), "usual": (90, 1), "later": (90, 2)}
    ids = [f"{name}{i}" for name, (n, _) in names.items() for i in range(n)]
    numbers = [i for n, _ in names.values() for i in range(n)]
    labels = [k for n, seed in names.values() for k in vectors(n, seed)[1]]
    return write_table(
        path, id=ids, scanner=["old" if i % 3 else "new" for i in numbers],
        who=[f"{id[:3]}{i // 2}" for id, i in zip(ids, numbers, strict=True)],
        when=[f"2026-0{1 + i // 30}-1{i % 9}" for i in numbers],
        grade=["abc"[k] for k in labels],
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(known, tmp_path_factory):
    from medsiglip_jax.trust.monitor import images, reference

    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    reference.fit(images.open_run(known)).save(path)
    return path
