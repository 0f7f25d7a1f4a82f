"""Embeddings of files, as Parquet shards that a killed run resumes.

An output folder holds `run.json` (what was asked, written first), `part-NNNNN.parquet` (one per
shard of the input list, each written whole; unreadable inputs are noted in its metadata),
`errors.parquet`, and `manifest.json`, which is written last: its presence means that the run is
complete. Nothing in them says when or how often the run was started, so that an interrupted one
ends with the same bytes.
"""

import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import jax
import pyarrow as pa
import pyarrow.parquet as pq

from medsiglip_jax import __version__, places, storage
from medsiglip_jax.api import Model
from medsiglip_jax.engine import Embedded, Engine
from medsiglip_jax.locks import lock
from medsiglip_jax.places import Given, Place
from medsiglip_jax.preprocess.image import preset
from medsiglip_jax.rows import Rows

RUN, MANIFEST, ERRORS = "run.json", "manifest.json", "errors.parquet"
STORED = {"float32": pa.float32(), "float16": pa.float16()}
_META = b"medsiglip_jax"
_ERROR_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string())])
_POLL_SECONDS = 1.0  # between two looks at what the other processes have written
_ROW_GROUP = 8192  # rows that a reader has to hold at once


@dataclass(frozen=True)
class Options:
    """What makes two runs the same run, beside the model and the inputs; and how to run it.

    Attributes:
        preprocess: pixel preset.
        normalize: unit vectors (what retrieval wants), or the raw pooled output.
        stored: element type of the vectors in the files, "float32" or "float16".
        shard_size: input rows per Parquet file, which are in memory at once.
        batch_size: rows per call of the encoder, over all local devices. It may change when a run
            is resumed; then the last bits of the vectors do, too.
        max_errors: unreadable inputs that are accepted; None is any number. May change, too.
    """

    preprocess: str = "big_vision"
    normalize: bool = True
    stored: str = "float32"
    shard_size: int = 8192
    batch_size: int = 8
    max_errors: int | None = None

    def __post_init__(self):
        preset(self.preprocess)
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.stored not in STORED:
            raise ValueError(f"stored is {self.stored!r}; expected one of {', '.join(STORED)}")


@dataclass(frozen=True)
class Progress:
    """What is said after every batch.

    Attributes:
        rows: finished just now; those of an earlier run have `busy` None.
        busy: share of the time in which the device was working, since this run began.
        errors: unreadable inputs among `rows`.
    """

    rows: int
    busy: float | None = None
    errors: int = 0


def embed(
    model: Model,
    rows: Rows,
    output: Given,
    options: Options = Options(),
    on_progress: Callable[[Progress], Any] = lambda progress: None,
) -> dict[str, Any]:
    """Embeds rows into a folder and returns its manifest; the same call again resumes or returns.

    Where `jax.distributed` is in use, every process calls this with the same arguments. Each
    embeds its own shards, with its own devices; all return when the manifest is there.

    Args:
        model: with the towers that the rows need; its mesh, if any, is of local devices.
        rows: from `manifest.rows`.
        output: a new folder, or that of the same run interrupted; local, gs:// or its like.
        options: see `Options`.
        on_progress: called after every batch.

    Raises:
        FileExistsError: `output` holds something else, or another run is writing there.
        ValueError: more unreadable inputs than `options.max_errors`; what is done stays.
    """
    folder, run = places.at(output), _identity(model, rows, options)
    _check_towers(model, rows)
    with _held(folder, run):
        if (folder / MANIFEST).is_file():
            on_progress(Progress(len(rows)))
            return _read_json(folder / MANIFEST)
        job = _Job(model, rows, folder, options, run)
        job.work(on_progress)
        if jax.process_index() == 0:
            return job.commit()
    return job.manifest()


def _check_towers(model: Model, rows: Rows) -> None:
    """Says what is missing before the first row is embedded."""
    kinds = rows.table.column("kind").unique().to_pylist()
    if "text" in kinds:
        _ = model.processor.tokenizer
    if "image" in kinds:
        model.processor.images([])


def _identity(model: Model, rows: Rows, options: Options) -> dict[str, Any]:
    tokenizer = model.processor.tokenizer_bytes
    return {
        "model": {"source": model.source, "sha256": model.sha256},
        "tokenizer_sha256": tokenizer and sha256(tokenizer).hexdigest(),
        "preprocess": options.preprocess,
        "normalized": options.normalize,
        "dtype": model.compute.dtype,
        "matmul_precision": model.compute.precision,
        "stored": options.stored,
        "dim": model.config.embed_dim,
        "shard_size": options.shard_size,
        "rows": len(rows),
        "rows_sha256": rows.sha256(),
        "versions": {
            "medsiglip_jax": __version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "pillow")},
        },
    }


# ------------------------------------------------------------------------------------ the folder


@contextmanager
def _held(folder: Place, run: dict[str, Any]) -> Iterator[None]:
    """Holds the folder for this process of this run; refuses one that is not of this run."""
    index = jax.process_index()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; --output wants a folder")
    with lock(folder / (f".lock-{index}" if index else ".lock")):
        if index:
            _wait_for(lambda: (folder / RUN).is_file())
        before = _read_json(folder / RUN) if (folder / RUN).is_file() else None
        if before is None:
            _check_empty(folder)
            _write_json(folder / RUN, run)
        elif changed := _changed(before, run):
            raise FileExistsError(
                f"{folder}: holds another run ({', '.join(changed)} differ); repeat that command "
                "to finish it, or choose a new folder"
            )
        yield


def _changed(before: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """What differs; weights that are the same may lie elsewhere."""
    sha256 = run["model"]["sha256"]
    same_weights = sha256 and before.get("model", {}).get("sha256") == sha256
    return [
        key for key in run if before.get(key) != run[key] and not (key == "model" and same_weights)
    ]


def _check_empty(folder: Place) -> None:
    if any(not p.name.startswith(".") for p in folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty, and not an embedding run; choose a new folder")


def _wait_for(there: Callable[[], bool]) -> None:
    while not there():
        time.sleep(_POLL_SECONDS)


def _read_json(path: Place) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); choose a new folder") from None


def _write_json(path: Place, content: dict[str, Any]) -> None:
    with storage.new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------- the work


class _Job:
    """The shards of one run."""

    def __init__(self, model: Model, rows: Rows, folder: Place, options: Options, run: dict):
        self.rows, self.folder, self.options, self.run = rows, folder, options, run
        self.engine = Engine(model, options.preprocess, options.normalize, options.batch_size)
        self.count = -(-len(rows) // options.shard_size)

    def work(self, on_progress: Callable[[Progress], Any]) -> None:
        """Embeds and writes the shards of this process that are not there yet."""
        done = self._done()
        mine = range(jax.process_index(), self.count, jax.process_count())
        for number in done.intersection(mine):
            on_progress(Progress(len(self._shard(number))))
        bound = _Bound(self.options.max_errors)
        if bound.limit is not None:
            for note in self._notes(done.intersection(mine)):
                bound.add(note["errors"])
        todo = [number for number in mine if number not in done]
        shards = (self._shard(number) for number in todo)
        batches = (b for shard in shards for b in _batches(shard, self.options.batch_size))
        with closing(self.engine.run(batches)) as results:
            for number in todo:
                parts = []
                while sum(len(part.rows) for part in parts) < len(self._shard(number)):
                    parts.append(part := next(results))
                    on_progress(Progress(len(part.rows), self.engine.busy(), len(part.errors)))
                    bound.add(part.errors)
                self._write(number, parts)

    def commit(self) -> dict[str, Any]:
        """Waits for the other processes, collects what the shards noted, writes the manifest."""
        if jax.process_count() > 1:
            _wait_for(lambda: len(self._done()) == self.count)
        notes = self._notes(range(self.count))
        errors = [error for note in notes for error in note["errors"]]
        _Bound(self.options.max_errors).add(errors)
        columns = [list(column) for column in zip(*errors, strict=True)] or [[], []]
        _write_parquet(self.folder / ERRORS, pa.table(columns, schema=_ERROR_SCHEMA))
        manifest = {
            **self.run,
            "embedded": sum(note["rows"] for note in notes),
            "errors": len(errors),
            "turned": sum(note["turned"] for note in notes),
            "parts": [
                {"file": self._path(number).name, "rows": note["rows"]}
                for number, note in enumerate(notes)
            ],
        }
        _write_json(self.folder / MANIFEST, manifest)
        return manifest

    def manifest(self) -> dict[str, Any]:
        """What process 0 has written, when it has."""
        _wait_for(lambda: (self.folder / MANIFEST).is_file())
        return _read_json(self.folder / MANIFEST)

    def _done(self) -> set[int]:
        names = {p.name for p in self.folder.iterdir()}
        return {number for number in range(self.count) if self._path(number).name in names}

    def _shard(self, number: int) -> Rows:
        size = self.options.shard_size
        return self.rows[number * size : (number + 1) * size]

    def _path(self, number: int) -> Place:
        return self.folder / f"part-{number:05d}.parquet"

    def _write(self, number: int, parts: Sequence[Embedded]) -> None:
        table = pa.concat_tables([_table(part, self.run) for part in parts])
        note = {
            "errors": [error for part in parts for error in part.errors],
            "turned": sum(part.turned for part in parts),
            "rows": table.num_rows,
        }
        meta = {_META: json.dumps({**self.run, **note}).encode()}
        _write_parquet(self._path(number), table.replace_schema_metadata(meta))

    def _notes(self, numbers: Any) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda number: _note(self._path(number)), sorted(numbers)))


class _Bound:
    """Counts unreadable inputs, and ends the run when there are too many."""

    def __init__(self, limit: int | None):
        self.limit, self._count = limit, 0

    def add(self, errors: Sequence[Sequence[str]]) -> None:
        self._count += len(errors)
        if self.limit is not None and self._count > self.limit:
            source, reason = errors[-1]
            raise ValueError(
                f"{self._count} inputs could not be read, more than max_errors={self.limit}; the "
                f"last: {source}: {reason}. Finished shards are kept: the same command with a "
                "higher limit goes on"
            )


def _batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Cuts rows where their kind changes, and then every `size`."""
    kinds = rows.table.column("kind").to_pylist()
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[start] or end - start == size:
            yield rows[start:end]
            start = end


def _table(part: Embedded, run: dict[str, Any]) -> pa.Table:
    kept = part.rows.table.filter(pa.array(part.readable))
    values = pa.array(part.vectors.reshape(-1)).cast(STORED[run["stored"]])
    vector = pa.list_(pa.field("element", values.type, nullable=False), run["dim"])
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("id", "source", "kind")]
    columns = [kept.column(field.name).cast(field.type) for field in fields]
    return pa.table(
        [*columns, pa.FixedSizeListArray.from_arrays(values, type=vector)],
        schema=pa.schema([*fields, pa.field("embedding", vector, nullable=False)]),
    )


def _write_parquet(path: Place, table: pa.Table) -> None:
    """Vectors are stored as they are: compressed by default they read at a third of the speed."""
    strings: Any = [name for name in table.schema.names if name != "embedding"]
    compression: Any = {name: "zstd" for name in strings}
    with storage.new_file(path) as partial:
        pq.write_table(
            table, partial, row_group_size=_ROW_GROUP, use_dictionary=strings,
            compression=compression, write_statistics=strings,
        )  # fmt: skip


def _note(path: Place) -> dict[str, Any]:
    """What `_Job._write` put into the metadata of a shard."""
    with path.open("rb") as file:
        return json.loads(pq.read_metadata(file).metadata[_META])
