"""Embeddings of files, as Parquet shards that a killed run resumes.

An output folder holds `run.json` (what was asked, written first), `part-NNNNN.parquet` (one per
shard of the input list, each written whole; unreadable inputs are noted in its metadata),
`errors.parquet`, and `manifest.json`, which is written last: its presence means that the run is
complete. Nothing in them says when or how often the run was started, so that an interrupted one
ends with the same bytes.
"""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import jax
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medsiglip_jax import __version__
from medsiglip_jax.data.rows import EXTRA, Rows
from medsiglip_jax.files import places, storage
from medsiglip_jax.files.locks import Check, lock
from medsiglip_jax.files.places import Given, Place
from medsiglip_jax.inference import pseudonyms as identifiers
from medsiglip_jax.inference.engine import Embedded, Engine
from medsiglip_jax.inference.pseudonyms import Naming
from medsiglip_jax.model import sharding
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess import formats, sources
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import preset

RUN, MANIFEST, ERRORS = "run.json", "manifest.json", "errors.parquet"
STORED = {"float32": pa.float32(), "float16": pa.float16()}
_META = b"medsiglip_jax"
_ERROR_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string())])
# What makes pixels and vectors; those of DICOM, volumes and slides may not be installed.
_MAKERS = ("jax", *formats.PACKAGES)
_POLL_SECONDS = 1.0  # between two looks at what the other processes have written
_ROW_GROUP = 8192  # rows that a reader has to hold at once
# What is counted, beside rows and errors.
_COUNTS = ("turned", "burned_in", "multi_frame", "cut")
_MISSING_IN_ROW = 1000  # files that are not there, one after the other, mean a disk that is gone


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
        dicom: how DICOM files become pixels.
        identifiers: None, or columns of the patient, study and series of DICOM files: "hashed", see
            `identifiers`, or "kept" as they are.
    """

    preprocess: str = "big_vision"
    normalize: bool = True
    stored: str = "float32"
    shard_size: int = 8192
    batch_size: int = 8
    max_errors: int | None = None
    dicom: Rules = Rules()
    identifiers: str | None = None

    def __post_init__(self):
        preset(self.preprocess)
        if self.identifiers not in (None, *identifiers.KINDS):
            raise ValueError(
                f"identifiers is {self.identifiers!r}; expected None or one of "
                f"{', '.join(identifiers.KINDS)}"
            )
        for name, least in (("batch_size", 1), ("shard_size", 1), ("max_errors", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
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
        ValueError: more unreadable inputs than `options.max_errors`; they are in errors.parquet,
            and what is done stays.
        OSError: a disk or a network fails; no input is taken for unreadable because of it.
    """
    naming = sharding.together(lambda: _naming(options))
    folder, run = places.at(output), _identity(model, rows, options, naming)
    _check_towers(model, rows)
    _check_volumes(rows, options.dicom)
    with ExitStack() as stack:
        hold = lambda: stack.enter_context(_held(folder, run))  # noqa: E731
        first = sharding.together(hold, 0)  # it says what the folder is
        check = sharding.together(lambda: first or hold())
        assert check is not None
        job = _Job(model, rows, folder, options, run, naming, check)
        if (folder / MANIFEST).is_file():
            on_progress(Progress(len(rows)))
            return job.finished()
        with _telling(folder):
            job.work(on_progress)
            return job.commit() if jax.process_index() == 0 else job.finished()


def _check_towers(model: Model, rows: Rows) -> None:
    """Says what is missing before the first row is embedded."""
    kinds = rows.table.column("kind").unique().to_pylist()
    if "text" in kinds:
        _ = model.processor.tokenizer
    if "image" in kinds:
        model.processor.images([])


def _check_volumes(rows: Rows, rules: Rules) -> None:
    """Asks what volumes hold before the first row is embedded: another answer is another run."""
    column = rows.table.column("source")
    for pattern in (format.pattern for format in formats.FORMATS if format.check):
        for number in pc.indices_nonzero(pc.match_substring_regex(column, pattern))[:1].to_pylist():
            sources.check_rules(column[number].as_py(), rules)


def _naming(options: Options) -> Naming | None:
    if options.identifiers is None:
        return None
    return identifiers.naming(options.identifiers, alone=jax.process_count() == 1)


def _identity(model: Model, rows: Rows, options: Options, naming: Naming | None) -> dict[str, Any]:
    tokenizer = model.processor.tokenizer_bytes
    return {
        "model": {"source": model.source, "sha256": model.sha256},
        "tokenizer_sha256": tokenizer and sha256(tokenizer).hexdigest(),
        "preprocess": options.preprocess,
        "dicom": options.dicom.to_dict(),
        "expansion": rows.parts.to_dict(),
        "identifiers": naming and naming.name,
        "normalized": options.normalize,
        "dtype": model.compute.dtype,
        "matmul_precision": model.compute.precision,
        "stored": options.stored,
        "dim": model.config.embed_dim,
        "shard_size": options.shard_size,
        "rows": len(rows),
        "rows_sha256": rows.sha256(),
        "versions": {"medsiglip_jax": __version__, **{name: _version(name) for name in _MAKERS}},
    }


def _version(name: str) -> str | None:
    """Without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------ the folder


@contextmanager
def _held(folder: Place, run: dict[str, Any]) -> Iterator[Check]:
    """Holds the folder for this process of this run; refuses one that is not of this run."""
    index = jax.process_index()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; --output wants a folder")
    with lock(folder / (f".lock-{index}" if index else ".lock")) as check:
        _failure(folder, index).unlink(missing_ok=True)
        before = _read_json(folder / RUN) if (folder / RUN).is_file() else None
        if before is None:
            _check_empty(folder)
            _write_json(folder / RUN, run)
        elif changed := _changed(before, run):
            raise FileExistsError(
                f"{folder}: holds another run ({', '.join(changed)} differ); repeat that command "
                "to finish it, or choose a new folder"
            )
        yield check


@contextmanager
def _telling(folder: Place) -> Iterator[None]:
    """Tells the other processes, which may be waiting, when this one fails."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            _write_json(_failure(folder, jax.process_index()), {"error": str(error)[:1000]})
        raise


def _failure(folder: Place, index: int) -> Place:
    return folder / f".failed-{index}"


def _wait_for(folder: Place, there: Callable[[set[str]], bool]) -> None:
    """Looks at the names in a folder until they are those wanted, or another process has failed."""
    while not there(names := {p.name for p in folder.iterdir()}):
        if failed := sorted(name for name in names if name.startswith(".failed-")):
            error = _read_json(folder / failed[0])["error"]
            raise ValueError(f"process {failed[0].rpartition('-')[2]} has stopped: {error}")
        time.sleep(_POLL_SECONDS)


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


def _size(path: Place) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _read_json(path: Place) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); choose a new folder") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not what embed writes; choose a new folder")
    return content


def _write_json(path: Place, content: dict[str, Any]) -> None:
    with storage.new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------- the work


class _Job:
    """The shards of one run."""

    def __init__(
        self,
        model: Model,
        rows: Rows,
        folder: Place,
        options: Options,
        run: dict[str, Any],
        naming: Naming | None,
        check: Check,
    ):
        self.rows, self.folder, self.options, self.run = rows, folder, options, run
        self.naming, self.check = naming, check
        self.engine = Engine(
            model, options.preprocess, options.normalize, options.batch_size, options.dicom
        )
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
                bound.errors += note["errors"]
        todo = [number for number in mine if number not in done]
        shards = (self._shard(number) for number in todo)
        batches = (b for shard in shards for b in shard.batches(self.options.batch_size))
        with closing(self.engine.run(batches)) as results:
            for number in todo:
                parts = []
                while sum(len(part.rows) for part in parts) < len(self._shard(number)):
                    parts.append(part := next(results))
                    on_progress(Progress(len(part.rows), self.engine.busy(), len(part.errors)))
                    self._count(bound, part)
                self._write(number, parts)

    def _count(self, bound: "_Bound", part: Embedded) -> None:
        try:
            bound.add(part)
        except ValueError:
            _write_errors(self.folder, bound.errors)
            raise

    def commit(self) -> dict[str, Any]:
        """Waits for the other processes, collects what the shards noted, writes the manifest."""
        paths = [self._path(number) for number in range(self.count)]
        if jax.process_count() > 1:
            _wait_for(self.folder, lambda names: all(path.name in names for path in paths))
        notes = self._notes(range(self.count))
        errors = [error for note in notes for error in note["errors"]]
        _write_errors(self.folder, errors)
        _Bound(self.options.max_errors, errors).check()
        manifest = {
            **self.run,
            "embedded": sum(note["rows"] for note in notes),
            "errors": len(errors),
            **{name: sum(note[name] for note in notes) for name in _COUNTS},
            "parts": [
                {"file": path.name, "rows": note["rows"], "bytes": path.stat().st_size}
                for path, note in zip(paths, notes, strict=True)
            ],
        }
        self.check()
        _write_json(self.folder / MANIFEST, manifest)
        return manifest

    def finished(self) -> dict[str, Any]:
        """The manifest that is there, or that process 0 is about to write; held against the files.

        Raises:
            ValueError: a file is not as it was.
        """
        _wait_for(self.folder, lambda names: MANIFEST in names)
        manifest = _read_json(self.folder / MANIFEST)
        for part in manifest["parts"]:
            path = self.folder / part["file"]
            if _size(path) != part["bytes"]:
                raise ValueError(
                    f"{path}: missing or damaged; remove it and {MANIFEST}, and the same command "
                    "makes it again"
                )
        return manifest

    def _done(self) -> set[int]:
        names = {p.name for p in self.folder.iterdir()}
        return {number for number in range(self.count) if self._path(number).name in names}

    def _shard(self, number: int) -> Rows:
        size = self.options.shard_size
        return self.rows[number * size : (number + 1) * size]

    def _path(self, number: int) -> Place:
        return self.folder / f"part-{number:05d}.parquet"

    def _write(self, number: int, parts: Sequence[Embedded]) -> None:
        table = pa.concat_tables([_table(part, self.run, self.naming) for part in parts])
        note = {
            "errors": [error for part in parts for error in part.errors],
            **{name: sum(getattr(part, name) for part in parts) for name in _COUNTS},
            "rows": table.num_rows,
        }
        meta = {_META: json.dumps({**self.run, **note}).encode()}
        self.check()
        _write_parquet(self._path(number), table.replace_schema_metadata(meta))

    def _notes(self, numbers: Any) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda number: _note(self._path(number)), sorted(numbers)))


class _Bound:
    """Unreadable inputs so far; ends the run when there are too many."""

    def __init__(self, limit: int | None, errors: Sequence[Sequence[str]] = ()):
        self.limit, self.errors, self._missing = limit, list(errors), 0

    def add(self, part: Embedded) -> None:
        """Counts those of a batch.

        Raises:
            ValueError: more than the limit.
            OSError: no limit is given, and so many in a row are not there that a disk must be gone.
        """
        self.errors += part.errors
        self.check()
        reasons = {reason for _, reason in part.errors}
        gone = not part.readable.any() and reasons == {"no such file"}
        self._missing = self._missing + len(part.rows) if gone else 0
        if self.limit is None and self._missing >= _MISSING_IN_ROW:
            raise OSError(
                f"{self._missing} inputs in a row are not there, the last {part.errors[-1][0]}; is "
                "a disk gone? Finished shards are kept: the same command goes on, and with "
                "max_errors it accepts so many"
            )

    def check(self) -> None:
        if self.limit is not None and len(self.errors) > self.limit:
            source, reason = self.errors[-1]
            raise ValueError(
                f"{len(self.errors)} inputs could not be read, more than max_errors={self.limit}; "
                f"the last: {source}: {reason}. All are in {ERRORS}. Finished shards are kept: the "
                "same command with a higher limit goes on"
            )


def _table(part: Embedded, run: dict[str, Any], naming: Naming | None) -> pa.Table:
    kept = part.rows.table.filter(pa.array(part.readable))
    values = pa.array(part.vectors.reshape(-1)).cast(STORED[run["stored"]])
    vector = pa.list_(pa.field("element", values.type, nullable=False), run["dim"])
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("id", "source", "kind")]
    fields += [EXTRA.field(name) for name in part.rows.extra]
    columns = [kept.column(field.name).cast(field.type) for field in fields]
    if naming is not None:
        nobody = (None,) * len(identifiers.COLUMNS)
        cells = [nobody if s is None else naming(s) for s in part.subjects]
        fields += [pa.field(name, pa.string()) for name in identifiers.COLUMNS]
        columns += [pa.array([cell[n] for cell in cells], pa.string()) for n in range(len(nobody))]
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


def _write_errors(folder: Place, errors: Sequence[Sequence[str]]) -> None:
    columns = [list(column) for column in zip(*errors, strict=True)] or [[], []]
    _write_parquet(folder / ERRORS, pa.table(columns, schema=_ERROR_SCHEMA))


def _note(path: Place) -> dict[str, Any]:
    """What `_Job._write` put into the metadata of a shard."""
    try:
        with path.open("rb") as file:
            return json.loads(pq.read_metadata(file).metadata[_META])
    except (pa.ArrowException, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: damaged ({reason}); remove it, and the same command makes it again"
        ) from None
