"""Image-text retrieval: ranks of best matches, in retrieval.parquet, and recalls from them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import aucs, scores
from medsiglip_jax.evaluate.data import datasets
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.evaluate.report.tables import Section, interval, number
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.evaluate.vectors import Vectors
from medsiglip_jax.files import storage
from medsiglip_jax.files.places import Place
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.text import canonicalize

FILE = "retrieval.parquet"
DIRECTIONS = {"image_to_text": "text for image", "text_to_image": "image for text"}
KS = (1, 5, 10)
_META, _RUN = b"medsiglip_jax", b"run"
_SCHEMA = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("direction", pa.string(), nullable=False),
        pa.field("rank", pa.int64(), nullable=False),
        ("group", pa.string()),
    ]
)


def compute(model: Model, task: Task, found: Dataset, embedded: Vectors) -> pa.Table:
    """Ranks the texts of a data set for each image, and its images for each text.

    An image matches its text, and a text all images that have it. Texts are the same if only case,
    spaces and punctuation differ, which the model does not see. Images without a text take no part.

    Args:
        model: with a text tower and a tokenizer.
        task: with `retrieval`.
        found: what was embedded.
        embedded: its images.

    Returns:
        `query`, `direction`, `rank` of the best match, from 1, and `group`: patient of the image,
        or of all images of the text. A text is named by the id of the first image that has it:
        reports of patients are not written. The metadata counts texts that were "truncated", being
        longer than the model reads, and images "without_text".

    Raises:
        ValueError: the task has no texts, or no image has one.
    """
    found = found.select(embedded.images)
    texts, numbers = _distinct(datasets.texts(task, found))
    kept = np.flatnonzero(numbers >= 0)
    if not len(kept):
        raise ValueError(f"task {task.name}: none of the {len(found):,} images has a text")
    counts = {"without_text": len(found) - len(kept)}
    found, numbers = found.select(kept), numbers[kept]
    tokens, cut = model.processor.tokenizer.ids_and_cut(texts)
    # Pieces of one shape, the last padded: one program, and 391 calls for 100,000 texts.
    ztxt = np.asarray(model.encode_text(tokens))
    ranks = metrics.ranks(embedded.array[kept], ztxt, numbers, np.arange(len(texts)))
    columns = {
        "query": [*found.ids, *(found.ids[i] for i in np.unique(numbers, return_index=True)[1])],
        "direction": np.repeat(list(DIRECTIONS), [len(found), len(texts)]),
        "rank": np.concatenate([ranks.image_to_text, ranks.text_to_image]),
        "group": _groups(found.groups, numbers, len(texts)),
    }
    meta = {**counts, "truncated": int(cut.sum())}
    return pa.table(columns, _SCHEMA.with_metadata({_META: json.dumps(meta)}))


def _distinct(texts: Sequence[str]) -> tuple[list[str], Int64[np.ndarray, " n"]]:
    """Texts as first written, and the number of that of each image, -1 for none."""
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
    of_text: list[set[str]] = [set() for _ in range(texts)]
    for i, group in zip(numbers.tolist(), groups, strict=True):
        of_text[i].add(group)
    shared = (next(iter(of)) if len(of) == 1 else f"text {i}" for i, of in enumerate(of_text))
    return [*groups, *shared]


def write(path: Place, table: pa.Table, run: str = "") -> None:
    """Writes what `compute` returned, and of which run it is."""
    table = table.replace_schema_metadata({**table.schema.metadata, _RUN: run.encode()})
    with storage.new_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")


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
    """The run that ranks are of."""
    return (table.schema.metadata or {}).get(_RUN, b"").decode()


def _counts(table: pa.Table) -> dict[str, int]:
    return json.loads((table.schema.metadata or {})[_META])


def summary(table: pa.Table) -> dict[str, Any]:
    """Ranks -> what results.json holds of them.

    Recalls have Wilson's interval, by patient where patients are known: images of one patient, and
    the texts of them, are not found independently (`metrics.proportion`). The lists that are
    searched are taken as they are.

    Returns:
        "images", "texts", "truncated", "without_text", and for each direction "recall@1" and so on
        ({value, low, high}) and "median_rank".
    """
    found: dict[str, Any] = {}
    direction = np.array(table["direction"].to_pylist())
    ranks = table["rank"].to_numpy()
    groups = np.array(table["group"].to_pylist(), object)
    for name in DIRECTIONS:
        rows = direction == name
        units = None if groups[rows][0] is None else groups[rows].astype(str)
        shares = {k: metrics.proportion(ranks[rows] <= k, units) for k in KS}
        recalls = {f"recall@{k}": aucs.limits(share, "value") for k, share in shares.items()}
        found[name] = {**recalls, "median_rank": metrics.median_rank(ranks[rows])}
    images, texts = (int((direction == name).sum()) for name in DIRECTIONS)
    return {**found, "images": images, "texts": texts, **_counts(table)}


def section(found: Mapping[str, Any]) -> Section:
    """A table of what `summary` returned."""
    names = [f"recall@{k}" for k in KS]
    header = ("", *(part for name in names for part in (name, "95 % interval")), "median rank")
    rows = [
        (
            shown,
            *(
                part
                for n in names
                for part in (number(found[key][n]["value"]), interval(found[key][n]))
            ),
            f"{found[key]['median_rank']:,.1f}",
        )
        for key, shown in DIRECTIONS.items()
    ]
    chance = number(min(1.0, KS[-1] / found["texts"]))
    text = [
        f"{found['images']:,} images and {found['texts']:,} different texts. Recall@k: how often "
        "the text of an image, or an image of a text, is among the first k. Chance finds the text "
        f"of an image among {KS[-1]} in {chance}."
    ]
    if found["truncated"]:
        text.append(f"{found['truncated']:,} texts were longer than the model reads, and were cut.")
    if found["without_text"]:
        text.append(f"{found['without_text']:,} images without a text were left out.")
    return Section("Retrieval", " ".join(text), header, rows)
