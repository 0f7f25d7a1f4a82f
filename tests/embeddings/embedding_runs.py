"""Vectors that are hard to rank, runs as `embed` leaves them, and labels for their rows."""

import csv
import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medsiglip_jax.embeddings.probe.logistic import Labelled
from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.embeddings.store import Embeddings

DIM = 12
MADE = Provenance(DIM, "5a1", "big_vision", True, "google/medsiglip-448")


def cosines(x, y):
    """Float64, each pair by itself; -inf for what is no vector."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        dots = np.stack([_dots(x, np.tile(row, (len(x), 1))) for row in y], axis=1)
        found = dots / np.sqrt(_dots(x, x)[:, None] * _dots(y, y)[None])
    return np.where(np.isfinite(found), np.clip(found, -1, 1), -np.inf)


def _dots(x, y):
    return np.einsum("nd,nd->n", x, y)


def ranking(queries, vectors, k):
    """The reference: all cosines, a stable sort."""
    exact = cosines(queries, vectors)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(exact, order, axis=1), order


def crowd(n, dim, seed=0, dtype=np.float32, unit=False):
    """Clusters so narrow that float32 cannot order them, exact copies, zeros and NaN."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((8, dim))
    x = centres[rng.integers(8, size=n)] + 1e-4 * rng.standard_normal((n, dim))
    if unit:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = x.astype(dtype)
    x[n // 2 :: 7] = x[3]
    x[[1, n - 2]], x[[2, n // 3]] = 0, np.nan
    return x, rng.standard_normal((5, dim)).astype(np.float32) + centres[:5].astype(np.float32)


def all_pairs(x, y, threshold):
    """The reference: every pair."""
    exact = cosines(x, x if y is None else y)
    i, j = np.nonzero(exact >= threshold)
    keep = i < j if y is None else i >= 0
    i, j = i[keep], j[keep]
    order = np.lexsort((j, i, -exact[i, j]))
    return np.stack([i, j], axis=1)[order], exact[i, j][order]


def write_run(folder, parts, kinds=None, facts=None, row_group_size=100, ids=None):
    """A folder as `embed` leaves it, from arrays."""
    storage, root = fsspec.core.url_to_fs(str(folder))
    storage.makedirs(root, exist_ok=True)
    dim, start, listed = parts[0].shape[1], 0, []
    for number, x in enumerate(parts):
        rows = range(start, start := start + len(x))
        flat = pa.array(x.reshape(-1))
        columns = {
            "id": pa.array([ids[i] if ids else f"row{i}" for i in rows], pa.string()),
            "source": pa.array([f"/gone/{i}.png" for i in rows], pa.string()),
            "kind": pa.array([kinds[i] if kinds else "image" for i in rows], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
        }
        name = f"part-{number:05d}.parquet"
        with storage.open(f"{root}/{name}", "wb") as file:
            pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
        listed.append({"file": name, "rows": len(x)})
    content = {"model": {"source": "m", "sha256": "x"}, "preprocess": "big_vision", "dim": dim}
    content |= {"normalized": False, "parts": listed} | (facts or {})
    storage.pipe_file(f"{root}/manifest.json", json.dumps(content).encode())
    return folder


def draw(n, classes=3, seed=0, dim=DIM):
    """Vectors around the centres of their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n).astype(np.int32)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    vectors = 5 + 0.7 * centres[labels] + rng.normal(size=(n, dim)) * np.linspace(0.5, 2, dim)
    return Labelled(vectors.astype(np.float32), labels)


def findings(n, seed=0):
    """Three findings, each with holes."""
    vectors, _ = draw(n, seed=seed)
    rng = np.random.default_rng(seed)
    labels = (vectors[:, :3] + rng.normal(size=(n, 3)) > 5.5).astype(np.float32)
    labels[rng.random((n, 3)) < 0.2] = np.nan
    return Labelled(vectors, labels)


def write_labelled_run(folder, ids, vectors, errors=0, **facts):
    """Images with these ids in parts of 50 rows, in random order, among texts of the same ids."""
    ids, vectors = [*ids, *ids[:2]], np.concatenate([vectors, 0 * vectors[:2]])
    order = np.random.default_rng(0).permutation(len(ids))
    kinds = np.array(["image"] * (len(ids) - 2) + ["text"] * 2)[order].tolist()
    facts = {
        "model": {"source": "m", "sha256": "5a1"},
        "normalized": True,
        "errors": errors,
    } | facts
    parts = np.split(vectors[order], range(50, len(ids), 50))
    return Embeddings(write_run(folder, parts, kinds, facts, ids=[ids[i] for i in order]))


def write_table(path, **columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def with_splits(table, path, split):
    data = read_csv(table[0])
    columns = {name: [row[name] for row in data] for name in data[0]}
    return write_table(path, **columns, split=[split(int(row["patient"])) for row in data])
