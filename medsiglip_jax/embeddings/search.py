"""Search in embeddings: the images that fit a text or an image, and pairs that are near the same.

`Embeddings` opens what `embed` wrote; `top_k` and `near_duplicates` work on vectors alone.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medsiglip_jax.data import tables
from medsiglip_jax.embeddings import index
from medsiglip_jax.embeddings.nearest import groups, near_duplicates, top_k
from medsiglip_jax.embeddings.probe import features
from medsiglip_jax.embeddings.store import Embeddings, Vectors
from medsiglip_jax.files import places, storage
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom import rules

__all__ = [
    "Embeddings",
    "Vectors",
    "duplicates",
    "near_duplicates",
    "search",
    "top_k",
    "write_hits",
    "write_pairs",
]
COLUMNS: tuple[str, ...] = ("id", "source", "other_id", "other_source", "score")
HIT_COLUMNS: tuple[str, ...] = ("query", "rank", "id", "source", "score")


def search(
    model: Model,
    embeddings: Embeddings,
    texts: Sequence[str] = (),
    images: Sequence[str] = (),
    k: int = 10,
    *,
    approximate: bool = False,
    batch_size: int = 8,
    dicom: rules.Rules | None = None,
) -> list[dict[str, Any]]:
    """Finds the rows of a run that fit each text and each image best.

    Args:
        model: the one that the embeddings were made with.
        embeddings: what to search, and which kind of its rows.
        texts, images: queries; images are sources, prepared as those of the run were.
        k: hits per query.
        approximate: use the index that `index.build` wrote, instead of every vector.
        batch_size: images per call of the encoder.
        dicom: how DICOM files become pixels; default as the run records it.

    Returns:
        Per query, texts first, `{"query", "hits": [{"id", "source", "score"}, …]}`; the score is
        the cosine, the highest first.

    Raises:
        ValueError: no query, another model, an unreadable image, or no row of that kind.
    """
    made = features.provenance(embeddings.manifest)
    features.wanted(model).check(made, embeddings.folder)
    if not len(embeddings):
        raise ValueError(f"{embeddings.folder}: no rows of kind {embeddings.kind}, nor of any")
    dicom = dicom or rules.from_dict(embeddings.manifest.get("dicom"))
    queries = _encode(model, embeddings, texts, images, batch_size, dicom)
    find = index.top_k if approximate else top_k
    scores, rows = find(queries, embeddings, min(k, len(embeddings)))
    if not rows.size:
        raise ValueError(
            f"{embeddings.folder}: no rows of kind {embeddings.kind}; choose another (--kind)"
        )
    k, found = rows.shape[1], embeddings.ids(rows.reshape(-1).tolist())
    return [
        {"query": query, "hits": _hits(found[i * k : (i + 1) * k], scores[i].tolist())}
        for i, query in enumerate([*texts, *map(str, images)])
    ]


def _hits(rows: Sequence[Mapping[str, str]], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Without rows that are no vectors, whose score is -inf."""
    return [
        {"id": row["id"], "source": row["source"], "score": score}
        for row, score in zip(rows, scores, strict=True)
        if score >= -1
    ]


def _encode(
    model: Model, embeddings: Embeddings, texts, images, batch_size: int, dicom: rules.Rules
) -> np.ndarray:
    if not texts and not images or not all(text.strip() for text in texts):
        raise ValueError("expected at least one text or image to search for, no text empty")
    found = []
    if texts:
        tokens = model.processor.texts(list(texts))
        found.append(np.asarray(model.encode_text(tokens)))
    if images:
        pixels = model.processor.images(list(images), embeddings.manifest["preprocess"], dicom)
        found.append(np.asarray(model.encode_image(pixels, batch_size=batch_size)))
    return np.concatenate(found)


def duplicates(
    embeddings: Embeddings,
    threshold: float,
    against: Embeddings | None = None,
    limit: int = 100_000,
    on_pairs: Callable[[int], Any] = int,
) -> dict[str, Any]:
    """Lists pairs of rows that are near the same, in one run or between two.

    Args:
        embeddings: the first of each pair, and the second.
        threshold: lowest cosine.
        against: the second of each pair is a row of this run instead, of the same model.
        limit: at most so many pairs, the nearest.
        on_pairs: called with the number of pairs just compared, for progress.

    Returns:
        `{"pairs": [{"id", "source", "other_id", "other_source", "score"}, …], "groups", "cut"}`:
        the nearest pair first, the number of groups that the pairs connect, and whether `limit`
        cut the list.
    """
    if against is not None:
        what = f"{against.folder}, compared with {embeddings.folder}"
        _made(embeddings).check(_made(against), what)
    found = near_duplicates(embeddings, threshold, against, limit, on_pairs)
    first = embeddings.ids(found.rows[:, 0].tolist())
    second = (against or embeddings).ids(found.rows[:, 1].tolist())
    pairs = [
        dict(zip(COLUMNS, (a["id"], a["source"], b["id"], b["source"], score), strict=True))
        for a, b, score in zip(first, second, found.cosines.tolist(), strict=True)
    ]
    apart = np.array([0, 0 if against is None else len(embeddings)])
    return {"pairs": pairs, "groups": len(groups(found.rows + apart)), "cut": found.cut}


def _made(embeddings: Embeddings) -> features.Provenance:
    """All that makes a difference to cosines: not the length of vectors."""
    return replace(features.provenance(embeddings.manifest), normalized=None)


def check_output_name(path: places.Given) -> None:
    """Raises ValueError unless the name of a file of hits or pairs says what it is to be."""
    if Path(str(path)).suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"{path}: expected a name ending in .csv or .parquet")


def write_pairs(path: places.Given, pairs: Sequence[Mapping[str, Any]]) -> None:
    """Writes the pairs of `duplicates` as .csv or .parquet."""
    _write(path, COLUMNS, pairs)


def write_hits(path: places.Given, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes the hits of `search` as .csv or .parquet, a row each; the first has rank 1."""
    hits = [
        {"query": result["query"], "rank": rank, **hit}
        for result in results
        for rank, hit in enumerate(result["hits"], start=1)
    ]
    _write(path, HIT_COLUMNS, hits)


def _write(path: places.Given, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    check_output_name(path)
    if Path(str(path)).suffix.lower() == ".parquet":
        tables.write_parquet(str(path), {c: [row[c] for row in rows] for c in columns}, None, None)
        return
    with storage.new_file(places.at(path)) as partial:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
