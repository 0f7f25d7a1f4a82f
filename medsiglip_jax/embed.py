"""Embeddings of files, as Parquet shards that a killed run resumes.

An output folder holds `run.json` (what was asked, written first), `part-NNNNN.parquet` (one per
shard of the input list, each written whole; unreadable inputs are noted in its metadata),
`errors.parquet`, and `manifest.json`, which is written last: its presence means that the run is
complete.
"""

import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medsiglip_jax import __version__, storage
from medsiglip_jax.api import Model
from medsiglip_jax.locks import lock
from medsiglip_jax.manifest import Row
from medsiglip_jax.places import check_writable
from medsiglip_jax.preprocess.image import UnreadableImage, preset

RUN, MANIFEST, ERRORS = "run.json", "manifest.json", "errors.parquet"
_META = b"medsiglip_jax"
_ERROR_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class Options:
    """What makes two runs the same run, beside the model and the inputs.

    Attributes:
        preprocess: pixel preset.
        normalize: unit vectors (what retrieval wants), or the raw pooled output.
        batch_size: rows per call of the encoder.
        shard_size: input rows per Parquet file.
    """

    preprocess: str = "big_vision"
    normalize: bool = True
    batch_size: int = 8
    shard_size: int = 8192

    def __post_init__(self):
        preset(self.preprocess)
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


def embed(
    model: Model,
    rows: Sequence[Row],
    output: str | os.PathLike,
    options: Options = Options(),
    on_rows: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Embeds rows into a folder and returns its manifest; the same call again resumes or returns.

    Args:
        model: with the towers that the rows need.
        rows: from `manifest.rows`.
        output: a new folder, or that of the same run interrupted.
        options: see `Options`.
        on_rows: called with the number of rows just finished, for progress.

    Raises:
        FileExistsError: `output` holds something else, or another run is writing there.
    """
    folder = Path(output)
    if any(row.kind == "text" for row in rows):
        _ = model.processor.tokenizer  # missing: say so before the first image is embedded
    run = _identity(model, rows, options)
    _check_output(folder, run)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
        if (folder / MANIFEST).is_file():
            on_rows(len(rows))
            return _read_json(folder / MANIFEST)
        _write_json(folder / RUN, run)
        shards = []
        for number, start in enumerate(range(0, len(rows), options.shard_size)):
            shard = rows[start : start + options.shard_size]
            path = folder / f"part-{number:05d}.parquet"
            if path.is_file():
                on_rows(len(shard))
            else:
                _write_shard(path, _shard_table(model, shard, options, run, on_rows))
            shards.append(path)
        return _commit(folder, run, shards)


def _identity(model: Model, rows: Sequence[Row], options: Options) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.source, row.kind, row.text]).encode())
    return {
        "model": {"source": model.source, "sha256": model.sha256},
        "preprocess": options.preprocess,
        "normalized": options.normalize,
        "dtype": model.compute.dtype,
        "matmul_precision": model.compute.precision,
        "dim": model.config.embed_dim,
        "shard_size": options.shard_size,
        "rows": len(rows),
        "rows_sha256": digest.hexdigest(),
        "version": __version__,
    }


def _check_output(folder: Path, run: dict[str, Any]) -> None:
    check_writable(folder / RUN)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; --output wants a folder")
    if not folder.exists() or not any(p for p in folder.iterdir() if not p.name.startswith(".")):
        return
    if not (folder / RUN).is_file():
        raise FileExistsError(f"{folder}: not empty, and not an embedding run; choose a new folder")
    before = _read_json(folder / RUN)
    changed = [key for key in run if before.get(key) != run[key]]
    if changed:
        raise FileExistsError(
            f"{folder}: holds another run ({', '.join(changed)} differ); repeat that command to "
            "finish it, or choose a new folder"
        )


def _shard_table(model: Model, rows: Sequence[Row], options: Options, run, on_rows) -> pa.Table:
    vectors: list[np.ndarray] = []
    kept: list[Row] = []
    errors: list[tuple[str, str]] = []
    for batch, loaded in _prefetch(model, rows, options):
        good = [(row, x) for row, x in zip(batch, loaded, strict=True) if not isinstance(x, str)]
        errors += [(r.source, x) for r, x in zip(batch, loaded, strict=True) if isinstance(x, str)]
        if good:
            inputs = np.stack([x for _, x in good])
            vectors.append(_encode(model, batch[0].kind, inputs, options))
            kept += [row for row, _ in good]
        on_rows(len(batch))
    return _table(kept, np.concatenate(vectors) if vectors else None, errors, run)


def _encode(model: Model, kind: str, inputs: np.ndarray, options: Options) -> np.ndarray:
    encode = model.encode_image if kind == "image" else model.encode_text
    return np.asarray(encode(inputs, options.normalize, batch_size=options.batch_size))


def _prefetch(
    model: Model, rows: Sequence[Row], options: Options
) -> Iterator[tuple[Sequence[Row], list[Any]]]:
    """Yields batches of one kind with their inputs, decoded while the encoder works."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ahead: deque[tuple[Sequence[Row], list[Callable[[], Any]]]] = deque()
        try:
            for batch in _batches(rows, options.batch_size):
                ahead.append((batch, _start_loading(model, batch, options, pool)))
                if len(ahead) > 2:
                    yield _finish(*ahead.popleft())
            while ahead:
                yield _finish(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _finish(batch: Sequence[Row], loading: list[Callable[[], Any]]) -> tuple[Sequence[Row], list]:
    return batch, [result() for result in loading]


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    start = 0
    for end in range(1, len(rows) + 1):
        last = end == len(rows) or rows[end].kind != rows[start].kind
        if last or end - start == size:
            yield rows[start:end]
            start = end


def _start_loading(model, batch: Sequence[Row], options: Options, pool) -> list[Callable[[], Any]]:
    """One callable per row that gives the encoder's input, or the reason why there is none."""
    if batch[0].kind == "text":
        tokens = model.processor.texts([row.text or "" for row in batch])
        return [functools.partial(np.asarray, ids) for ids in tokens]
    return [pool.submit(_load_image, model, row.source, options.preprocess).result for row in batch]


def _load_image(model: Model, source: str, preprocess: str) -> np.ndarray | str:
    try:
        return model.processor.images([source], preprocess)[0]
    except (UnreadableImage, FileNotFoundError) as error:
        return str(error).removeprefix(f"{source}: ")


def _table(rows, vectors, errors, run) -> pa.Table:
    dim = run["dim"]
    flat = np.zeros(0, np.float32) if vectors is None else vectors.reshape(-1)
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "source": pa.array([row.source for row in rows], pa.string()),
        "kind": pa.array([row.kind for row in rows], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), dim),
    }
    meta = {_META: json.dumps({**run, "errors": errors}).encode()}
    return pa.table(columns).replace_schema_metadata(meta)


def _write_shard(path: Path, table: pa.Table) -> None:
    with storage.new_file(path) as partial:
        pq.write_table(table, partial)


def _commit(folder: Path, run: dict[str, Any], shards: list[Path]) -> dict[str, Any]:
    """Collects what the shards noted, writes the errors, then the manifest."""
    errors: list[list[str]] = []
    parts = []
    for path in shards:
        schema = pq.read_schema(path)
        errors += json.loads(schema.metadata[_META])["errors"]
        parts.append({"file": path.name, "rows": pq.read_metadata(path).num_rows})
    columns = [list(column) for column in zip(*errors, strict=True)] or [[], []]
    _write_shard(folder / ERRORS, pa.table(columns, schema=_ERROR_SCHEMA))
    manifest = {**run, "embedded": sum(p["rows"] for p in parts), "errors": len(errors)}
    manifest["parts"] = parts
    _write_json(folder / MANIFEST, manifest)
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); choose a new folder") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with storage.new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
