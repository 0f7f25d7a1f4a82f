"""Image-text retrieval: ranks of best matches, in retrieval.parquet, and recalls from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import image_embeddings, scores, tasks
from medsiglip_jax.evaluate.data import reading
from medsiglip_jax.evaluate.results import aucs
from medsiglip_jax.files import settings
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.files.places import Place
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.text import canonicalize

FILE = "retrieval.parquet"
DIRECTIONS = {"image_to_text": "text for image", "text_to_image": "image for text"}
KS = (1, 5, 10)
_META, _RUN = b"medsiglip_jax", b"run"
_SCHEMA = scores.schema(
    {"query": pa.string(), "direction": pa.string(), "rank": pa.int64()}, {"group": pa.string()}
)


def compute(model: Model, task: tasks.Task, embedded: image_embeddings.ImageEmbeddings) -> pa.Table:
    """Ranks the texts of a data set for each image, and its images for each text.

    An image matches its text, and a text all images that have it. Texts are the same if they differ
    only in case, spaces and punctuation, which the model does not see. Images without a text are
    left out.

    Args:
        model: with a text tower and a tokenizer.
        task: with `retrieval`.
        embedded: the images of a data set.

    Returns:
        `query`, `direction`, `rank` of the best match, from 1, and `group`: the patient of the
        image, or of all images of the text. A text is named by the id of the first image that has
        it, because reports of patients must not be written. The metadata counts "truncated" texts,
        which are longer than the model reads, and images "without_text".

    Raises:
        ValueError: the task has no texts, or no image has one.
    """
    dataset = embedded.dataset
    texts, numbers = _distinct(reading.texts(task, dataset))
    kept = np.flatnonzero(numbers >= 0)
    if not len(kept):
        raise ValueError(f"task {task.name}: none of the {len(dataset):,} images has a text")
    counts = {"without_text": len(dataset) - len(kept)}
    dataset, numbers = dataset.select(kept), numbers[kept]
    tokens, cut = model.processor.tokenizer.ids_and_cut(texts)
    # Pieces of one shape, the last padded: one program, and 391 calls for 100,000 texts.
    ztxt = np.asarray(model.encode_text(tokens))
    ranks = metrics.ranks(embedded.vectors[kept], ztxt, numbers, np.arange(len(texts)))
    first_images = np.unique(numbers, return_index=True)[1]
    columns = {
        "query": [*dataset.ids, *(dataset.ids[i] for i in first_images)],
        "direction": np.repeat(list(DIRECTIONS), [len(dataset), len(texts)]),
        "rank": np.concatenate([ranks.image_to_text, ranks.text_to_image]),
        "group": _groups(dataset.groups, numbers, len(texts)),
    }
    meta = {**counts, "truncated": int(cut.sum())}
    return pa.table(columns, _SCHEMA.with_metadata({_META: dumps(meta)}))


def _distinct(texts: Sequence[str]) -> tuple[list[str], Int64[np.ndarray, " n"]]:
    """The distinct texts, as first written, and which of them each image has; -1 for none."""
    first: dict[str, str] = {}
    names = [canonicalize(text) for text in texts]
    for name, text in zip(names, texts, strict=True):
        first.setdefault(name, text)
    first.pop("", None)
    number_of = {name: i for i, name in enumerate(first)}
    numbers = [number_of.get(name, -1) for name in names]
    return list(first.values()), np.array(numbers, np.int64)


def _groups(groups: Sequence[str] | None, numbers: np.ndarray, texts: int) -> list[str | None]:
    """Of images and of texts; a text that several patients share is a group of its own."""
    if groups is None:
        return [None] * (len(numbers) + texts)
    patients: list[set[str]] = [set() for _ in range(texts)]
    for i, group in zip(numbers.tolist(), groups, strict=True):
        patients[i].add(group)
    of_texts = (ps.pop() if len(ps) == 1 else f"text {i}" for i, ps in enumerate(patients))
    return [*groups, *of_texts]


def write(path: Place, table: pa.Table, run: str = "") -> None:
    """Writes what `compute` returned, and the run it belongs to."""
    scores.save(path, table, {**table.schema.metadata, _RUN: run.encode()})


def read(path: Place) -> pa.Table:
    """Reads what `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    with scores.opened(path, "ranks") as table:
        if not table.schema.equals(_SCHEMA):
            raise ValueError(f"columns are {', '.join(table.schema.names)}")
        _counts(table)
    return table


def run_of(table: pa.Table) -> str:
    """The run that ranks belong to."""
    return (table.schema.metadata or {}).get(_RUN, b"").decode()


def _counts(table: pa.Table) -> dict[str, int]:
    counts = parse((table.schema.metadata or {})[_META])
    if not all(type(value) is int for value in counts.values()):
        raise ValueError(f"its counts are {settings.shown(counts)}; expected whole numbers")
    return counts


def summary(table: pa.Table) -> dict[str, Any]:
    """Ranks -> the recalls of results.json.

    Recalls have Wilson's interval, by patient where patients are known, because images of one
    patient, and their texts, are not independent (`metrics.proportion`). The lists that are
    searched count as fixed.

    Returns:
        "images", "texts", "truncated", "without_text", and for each direction "recall@1" and so on
        ({value, low, high}) and "median_rank".
    """
    directions: dict[str, Any] = {}
    direction = np.array(table["direction"].to_pylist())
    ranks = table["rank"].to_numpy()
    groups = np.array(table["group"].to_pylist(), object)
    for name in DIRECTIONS:
        rows = direction == name
        units = None if groups[rows][0] is None else groups[rows].astype(str)
        shares = {k: metrics.proportion(ranks[rows] <= k, units) for k in KS}
        recalls = {f"recall@{k}": aucs.limits(share, "value") for k, share in shares.items()}
        directions[name] = {**recalls, "median_rank": metrics.median_rank(ranks[rows])}
    images, texts = (int((direction == name).sum()) for name in DIRECTIONS)
    return {**directions, "images": images, "texts": texts, **_counts(table)}
