"""Searches an embedding run: images that fit a text or an image, and pairs of near duplicates.

`nearest` and `near_duplicates` do the same for vectors without files.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from medsiglip_jax.embeddings import index, nearest, output, provenance, store
from medsiglip_jax.embeddings.near_duplicates import count_groups, near_duplicates
from medsiglip_jax.files import places
from medsiglip_jax.files.credentials import without
from medsiglip_jax.inference.classify import encode_texts
from medsiglip_jax.inference.encode import encode_files
from medsiglip_jax.inference.manifest import UNKNOWN
from medsiglip_jax.model.api import Model
from medsiglip_jax.model.config import Preparation
from medsiglip_jax.preprocess.dicom.rules import Rules

PAIR_COLUMNS: tuple[str, ...] = ("id", "source", "other_id", "other_source", "score")
HIT_COLUMNS: tuple[str, ...] = ("query", "rank", "id", "source", "score")


def search(
    model: Model,
    embeddings: store.Embeddings,
    texts: Sequence[str] = (),
    images: Sequence[str] = (),
    k: int = 10,
    *,
    approximate: bool = False,
    batch_size: int = 8,
    dicom: Rules | None = None,
) -> list[dict[str, Any]]:
    """Finds the rows of a run that fit each text and each image best.

    Args:
        model: the one that made the embeddings.
        embeddings: what to search, and which kind of its rows.
        texts, images: queries; images are paths, prepared as those of the run were.
        k: hits per query.
        approximate: search through the index that `index.build` wrote, not through every vector.
        batch_size: images per call of the encoder.
        dicom: how DICOM files become pixels; default as the run records it, or as in the training
            of the model beside vectors of another program.

    Returns:
        Per query, texts first, `{"query", "hits": [{"id", "source", "score"}, …], "left_out"}`; the
        score is the cosine, the highest first; `Embeddings.left_out` says what was not searched.

    Raises:
        ValueError: no query, another model, an unreadable image, or no row of that kind.
    """
    if not texts and not images:
        raise ValueError("expected at least one text or image to search for")
    check_model(embeddings, model)
    nothing = f"{embeddings.folder}: no rows of kind {embeddings.kind}"
    if not len(embeddings):
        raise ValueError(f"{nothing}, nor of any")
    preparation = _preparation(model, embeddings, dicom)
    if embeddings.manifest.preprocess == UNKNOWN and images:
        warnings.warn(
            f"query images are prepared by the preset {preparation.preprocess}", stacklevel=2
        )
    vectors = [np.asarray(encode_texts(model, texts))] if texts else []
    if images:
        encoded = encode_files(
            model, images, preparation.preprocess, batch_size=batch_size, dicom=preparation.dicom
        )
        vectors.append(encoded.complete())
    find = index.top_k if approximate else nearest.top_k
    scores, rows = find(np.concatenate(vectors), embeddings, min(k, len(embeddings)))
    if not rows.size:
        raise ValueError(f"{nothing}; choose another (--kind)")
    k, named = rows.shape[1], embeddings.ids(rows.reshape(-1).tolist())
    record = index.read_record(embeddings) if approximate else None
    left_out = asdict(record.left_out if record else embeddings.left_out())
    hits = (named_hits(named[i * k : (i + 1) * k], scores[i].tolist()) for i in range(len(scores)))
    return [
        {"query": query, "hits": of_query, "left_out": left_out}
        for query, of_query in zip([*texts, *map(str, images)], hits, strict=True)
    ]


def _preparation(model: Model, embeddings: store.Embeddings, dicom: Rules | None) -> Preparation:
    """As those of the run were; where nobody knows that, as in the training of the model."""
    made = embeddings.manifest
    if made.preprocess == UNKNOWN:
        return model.config.prepared(None, dicom)
    return Preparation(made.preprocess, dicom or made.dicom_rules)


def check_model(embeddings: store.Embeddings, model: Model) -> None:
    """Raises ValueError if another model made the run."""
    made = provenance.of_run(embeddings.manifest)
    provenance.of_model(model).check(made, embeddings.folder)


def named_hits(rows: Sequence[Mapping[str, str]], scores: Sequence[float]) -> list[dict[str, Any]]:
    """`{"id", "source", "score"}` of each, but of the last, if their vectors have no direction:
    their score is -inf."""
    return [
        {"id": row["id"], "source": row["source"], "score": score}
        for row, score in zip(rows, scores, strict=True)
        if score >= -1
    ]


def duplicates(
    embeddings: store.Embeddings,
    threshold: float,
    against: store.Embeddings | None = None,
    limit: int = 100_000,
    on_pairs: Callable[[int], Any] = int,
) -> dict[str, Any]:
    """Lists pairs of near duplicates, within one run or between two.

    Args:
        embeddings: the run that both rows of a pair come from.
        threshold: lowest cosine.
        against: take the second row of each pair from this run instead; of the same model.
        limit: at most so many pairs, the nearest.
        on_pairs: called with the number of pairs just compared, for progress.

    Returns:
        `{"pairs": [{"id", "source", "other_id", "other_source", "score"}, …], "groups", "cut",
        "left_out"}`: the nearest pair first, the number of groups that the pairs connect, whether
        `limit` shortened the list, and `Embeddings.left_out`; with `against` also
        "other_left_out".
    """
    if against is not None:
        what = f"{against.folder}, compared with {embeddings.folder}"
        _made(embeddings).check(_made(against), what)
    near = near_duplicates(embeddings, threshold, against, limit, on_pairs)
    first = embeddings.ids(near.rows[:, 0].tolist())
    second = (against or embeddings).ids(near.rows[:, 1].tolist())
    pairs = [
        dict(zip(PAIR_COLUMNS, (a["id"], a["source"], b["id"], b["source"], score), strict=True))
        for a, b, score in zip(first, second, near.cosines.tolist(), strict=True)
    ]
    offsets = np.array([0, 0 if against is None else len(embeddings)])  # rows of two runs differ
    groups, left_out = (
        count_groups(near.rows + offsets),
        {"left_out": asdict(embeddings.left_out())},
    )
    if against is not None:
        left_out["other_left_out"] = asdict(against.left_out())
    return {"pairs": pairs, "groups": groups, "cut": near.cut, **left_out}


def _made(embeddings: store.Embeddings) -> provenance.Provenance:
    """What cosines depend on: all but the length of the vectors."""
    return replace(provenance.of_run(embeddings.manifest), normalized=None)


def write_pairs(path: places.Given, pairs: Sequence[Mapping[str, Any]]) -> None:
    """Writes the pairs of `duplicates` as .csv or .parquet."""
    output.write(path, {name: [pair[name] for pair in pairs] for name in PAIR_COLUMNS})


def write_hits(path: places.Given, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes the hits of `search` as .csv or .parquet, one row per hit; the first has rank 1."""
    hits = [
        {"query": without(result["query"]), "rank": rank, **hit}
        for result in results
        for rank, hit in enumerate(result["hits"], start=1)
    ]
    output.write(path, {name: [hit[name] for hit in hits] for name in HIT_COLUMNS})
