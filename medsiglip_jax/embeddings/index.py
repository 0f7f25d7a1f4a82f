"""An approximate index beside the embeddings (usearch's HNSW graph), with its measured recall."""

import importlib
from typing import Any

import numpy as np
from jaxtyping import Float

from medsiglip_jax.embeddings import cosines, nearest, store
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places, storage

INDEX, FACTS = "index.usearch", "index.json"
# usearch's defaults, except that a search is twice as broad (64): recall matters more here.
PARAMETERS = {"connectivity": 16, "expansion_add": 128, "expansion_search": 128, "dtype": "f16"}
# The recall is measured on the nearest NEIGHBOURS of SAMPLE rows.
SAMPLE, NEIGHBOURS = 100, 10


def build(embeddings: store.Embeddings) -> dict[str, Any]:
    """Writes `index.usearch` and, last, `index.json` into a local folder of embeddings.

    The whole index is held in memory: 2 bytes per number, and about 150 per row. The run is read
    twice, the second time to measure the recall.

    Returns:
        The content of `index.json`: `recall_at_10` of sampled rows, without the rows themselves;
        parameters, and the run and kind of rows that the index belongs to.
    """
    places.refuse_remote(embeddings.folder)
    index = _new(embeddings.dim)
    for block in embeddings.blocks():
        unit = cosines.unit(block.vectors)
        valid = unit.any(axis=1)
        index.add(block.rows[valid].astype(np.uint64), unit[valid])
    if not len(index):
        raise ValueError(f"{embeddings.folder}: no rows of kind {embeddings.kind} to index")
    facts = {
        "recall_at_10": _recall(index, embeddings),
        "sampled": min(SAMPLE, len(index)),
        "rows": len(index),
        "kind": embeddings.kind,
        "parameters": PARAMETERS,
        "manifest_sha256": embeddings.digest,
    }
    (embeddings.folder / FACTS).unlink(missing_ok=True)
    with storage.new_file(embeddings.folder / INDEX) as partial:
        index.save(str(partial))
    json_files.write(embeddings.folder / FACTS, facts)
    return facts


def top_k(queries: Float[np.ndarray, "q d"], embeddings: store.Embeddings, k: int) -> nearest.Hits:
    """`nearest.top_k` through the index; its cosines are of vectors rounded to float16.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the index belongs to another run or kind of rows.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    _check(embeddings)
    index = _new(embeddings.dim)
    index.view(str(embeddings.folder / INDEX))
    index.expansion_search = PARAMETERS["expansion_search"]  # the file does not hold it
    return _search(index, queries, k)


def _new(dim: int) -> Any:
    try:
        usearch = importlib.import_module("usearch.index")
    except ModuleNotFoundError:
        what = "the index needs usearch: pip install 'medsiglip-jax[index]'"
        raise ModuleNotFoundError(what) from None
    return usearch.Index(ndim=dim, metric="cos", **PARAMETERS)


def _check(embeddings: store.Embeddings) -> None:
    places.refuse_remote(embeddings.folder)
    path = embeddings.folder / FACTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --build-index makes the index")
    facts = json_files.read(path)
    for key, now in (("manifest_sha256", embeddings.digest), ("kind", embeddings.kind)):
        if facts[key] != now:
            raise ValueError(
                f"{path}: the index is stale or of other rows ({key} is {facts[key]}, expected "
                f"{now}); build it again (--build-index --kind {embeddings.kind})"
            )


def _search(index: Any, queries: np.ndarray, k: int) -> nearest.Hits:
    """Rows that the index finds, then ordered by cosine."""
    k = min(k, len(index))
    scores, rows = np.full((len(queries), k), -np.inf), np.zeros((len(queries), k), np.int64)
    for n, query in enumerate(queries.astype(np.float32)):
        keys = np.sort(np.asarray(index.search(query, k).keys))
        found = store.ArrayVectors(np.stack(index.get(keys, dtype="f16")))
        ordered, order = nearest.top_k(query[None], found, k)
        scores[n, : len(keys)], rows[n, : len(keys)] = ordered[0], keys[order[0]]
    return scores, rows


def _recall(index: Any, embeddings: store.Embeddings) -> float:
    """Share of the nearest neighbours of sampled rows that the index finds."""
    sample = np.random.default_rng(0).choice(len(index), min(SAMPLE, len(index)), replace=False)
    keys = np.sort(np.asarray(index.keys))[sample]
    queries = np.stack(index.get(keys, dtype="f16"))
    _, near = nearest.top_k(queries, embeddings, NEIGHBOURS + 1)
    _, seen = _search(index, queries, NEIGHBOURS + 1)
    exact, approximate = (
        [set(row) - {key} for row, key in zip(rows.tolist(), keys.tolist(), strict=True)]
        for rows in (near, seen)
    )
    hits = sum(len(a & b) for a, b in zip(exact, approximate, strict=True))
    return hits / max(1, sum(map(len, exact)))
