"""An approximate index beside the embeddings (usearch's HNSW graph), with its measured recall."""

import contextlib
import errno
import functools
import hashlib
import importlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float

from medsiglip_jax.embeddings import cosines, nearest, store
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places, settings, storage
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.locks import lock

INDEX, FACTS = "index.usearch", "index.json"
# usearch's defaults, except that a search is twice as broad (64): recall matters more here.
PARAMETERS = {"connectivity": 16, "expansion_add": 128, "expansion_search": 128, "dtype": "f16"}
# The recall is measured on the nearest NEIGHBOURS of SAMPLE rows.
SAMPLE, NEIGHBOURS = 100, 10
_PIECE = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class IndexRecord:
    """The content of `index.json`.

    Attributes:
        recall_at_10: share of the nearest neighbours of sampled rows that the index finds, without
            the rows themselves.
        sampled: how many rows that were.
        rows: in the index.
        left_out: `Embeddings.left_out`: rows that are not in it.
        kind: of the rows: "image", "text" or "any".
        parameters: of the index.
        manifest_sha256: identity of the run that it belongs to.
        bytes, sha256: of the file of the index. usearch trusts what it opens: bytes that it did not
            write can end the process.
        usearch: its version.
    """

    recall_at_10: float
    sampled: int
    rows: int
    left_out: store.LeftOut
    kind: Annotated[str, settings.one_of(store.KINDS)]
    parameters: Mapping[str, Any]
    manifest_sha256: str
    bytes: int
    sha256: str
    usearch: str


def build(embeddings: store.Embeddings) -> dict[str, Any]:
    """Writes `index.usearch` and, last, `index.json` into a local folder of embeddings.

    The whole index is held in memory: 2 bytes per number, and about 150 per row. The run is read
    twice, the second time to measure the recall.

    Returns:
        The content of `index.json`; see `IndexRecord`.

    Raises:
        FileExistsError: another process is building one here.
        ValueError: there is nothing to index.
    """
    _check_folder(embeddings)
    with lock(embeddings.folder / ".index.lock"):
        return _build(embeddings)


def _build(embeddings: store.Embeddings) -> dict[str, Any]:
    index = _new(embeddings.dim)
    for block in embeddings.blocks():
        unit = cosines.unit(block.vectors)
        valid = unit.any(axis=1)
        index.add(block.rows[valid].astype(np.uint64), unit[valid])
    if not len(index):
        raise ValueError(f"{embeddings.folder}: no rows of kind {embeddings.kind} to index")
    recall = _recall(index, embeddings)
    (embeddings.folder / FACTS).unlink(missing_ok=True)
    with storage.new_file(embeddings.folder / INDEX) as partial:
        _save(index, partial)
        size, digest = partial.stat().st_size, _sha256(partial)
    record = IndexRecord(
        recall_at_10=recall, sampled=min(SAMPLE, len(index)), rows=len(index),
        left_out=embeddings.left_out(), kind=embeddings.kind, parameters=PARAMETERS,
        manifest_sha256=embeddings.digest, bytes=size, sha256=digest, usearch=_version(),
    )  # fmt: skip
    json_files.write(embeddings.folder / FACTS, facts := json_files.plain(asdict(record)))
    return facts


def _save(index: Any, path: Path) -> None:
    """Writes an index whole. usearch does not say why it could not, and of the last bytes it does
    not even notice."""
    with contextlib.suppress(RuntimeError):
        index.save(str(path))
    missing = index.serialized_length - (path.stat().st_size if path.is_file() else 0)
    if missing:
        with path.open("ab") as file:
            for _ in range(0, missing, _PIECE):
                file.write(bytes(min(missing, _PIECE)))  # the system says why it does not fit
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def top_k(queries: Float[np.ndarray, "q d"], embeddings: store.Embeddings, k: int) -> nearest.Hits:
    """`nearest.top_k` through the index; its cosines are of vectors rounded to float16.

    The SHA-256 of the index is checked, at about 2 s per GB, unless this process has seen the file
    before.

    Raises:
        FileNotFoundError: there is no index.
        ModuleNotFoundError: usearch is not installed.
        ValueError: the index belongs to another run or kind of rows, or is not the one that was
            built.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    nearest.check_queries(queries, embeddings.dim)
    check(embeddings)
    index, path = _new(embeddings.dim), embeddings.folder / INDEX
    with explained(path, f"usearch {_version()} cannot search it", _again(embeddings)):
        index.view(str(path))
        index.expansion_search = PARAMETERS["expansion_search"]  # the file does not hold it
        scores, rows = _search(index, queries, k)
        if rows.size and rows.max() >= len(embeddings):
            raise IndexError(f"row {rows.max()} of {len(embeddings)}")
    return scores, rows


def check(embeddings: store.Embeddings) -> None:
    """Makes sure that `top_k` has the index that was built for embeddings; raises as that."""
    record, path = read_record(embeddings), embeddings.folder / INDEX
    if not _is_recorded(path, record):
        what = f"missing, damaged or not the one that {FACTS} is of"
        raise ValueError(f"{path}: {what}; {_again(embeddings)}")
    _usearch("usearch.index")


def read_record(embeddings: store.Embeddings) -> IndexRecord:
    """The record of the index beside embeddings.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the record is damaged, or of another run or kind of rows.
    """
    _check_folder(embeddings)
    path = embeddings.folder / FACTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --build-index makes the index")
    with explained(path, "not the record of an index", _again(embeddings)):
        content = json_files.parse(path.read_text(encoding="utf-8"))
        record = settings.build(IndexRecord, content, title="the record")
    if (record.manifest_sha256, record.kind) != (embeddings.digest, embeddings.kind):
        rows = f"embeddings that have changed since, or of kind {record.kind}"
        raise ValueError(f"{path}: the index is of {rows}; {_again(embeddings)}")
    return record


def _check_folder(embeddings: store.Embeddings) -> None:
    places.refuse_remote(embeddings.folder)
    if embeddings.folder.is_file():
        raise ValueError(f"{embeddings.folder}: only what embed wrote has an index; search exactly")


def _again(embeddings: store.Embeddings) -> str:
    return f"build it again (--build-index --kind {embeddings.kind})"


def _is_recorded(path: places.Place, record: IndexRecord) -> bool:
    if not path.is_file() or (status := path.stat()).st_size != record.bytes:
        return False
    return record.sha256 == _known_sha256(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=8)
def _known_sha256(path: places.Place, *_: int) -> str:
    """Of a file of this size, time and inode: searches of one process read it once."""
    return _sha256(path)


def _sha256(path: places.Place) -> str:
    with open(str(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _new(dim: int) -> Any:
    return _usearch("usearch.index").Index(ndim=dim, metric="cos", **PARAMETERS)


def _version() -> str:
    return _usearch("usearch").__version__


def _usearch(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        what = "the index needs usearch: pip install 'medsiglip-jax[index]'"
        raise ModuleNotFoundError(what) from None


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
