"""Embeds files into Parquet shards; a killed run is resumed by the same command.

An output folder holds `run.json` (what was asked, written first), `part-NNNNN.parquet` (one per
shard of the inputs, each written whole; unreadable inputs are noted in its metadata),
`errors.parquet`, and `manifest.json`, which is written last: its presence means that the run is
complete. Until then there may be an `unfinished-NNNNN.parquet` (see `unfinished`). None of them
says when or how often the run was started, so an interrupted run ends with the same bytes as an
uninterrupted one.
"""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import pyarrow.compute as pc

from medsiglip_jax.data.rows import Rows
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import locks, places, settings
from medsiglip_jax.files.places import Place
from medsiglip_jax.inference import decoders, encode, pseudonyms, run_folder, shards, unfinished
from medsiglip_jax.inference import manifest as records
from medsiglip_jax.inference.abstain import Abstention
from medsiglip_jax.inference.engine import Embedded, Engine
from medsiglip_jax.model import api, processes
from medsiglip_jax.model.config import PixelConfig
from medsiglip_jax.preprocess import formats, image, sources
from medsiglip_jax.preprocess.dicom.rules import Rules

_MISSING_IN_ROW = 1000  # this many missing files one after the other mean that a disk is gone


@dataclass(frozen=True)
class EmbedOptions:
    """What identifies a run, beside the model and the inputs; and how to run it.

    Attributes:
        preprocess: pixel preset.
        normalize: unit vectors (what retrieval wants), or the raw pooled output.
        stored: element type of the vectors in the files, "float32" or "float16".
        shard_size: input rows per Parquet file; so many are in memory at once.
        batch_size: rows per call of the encoder, over all local devices. It may change when a run
            is resumed; then the last bits of the vectors change, too.
        max_errors: unreadable inputs that are accepted; None is any number. It may change, too.
        dicom: how DICOM files become pixels.
        identifiers: None, or add columns with the patient, study and series of DICOM files:
            "hashed" (see `pseudonyms`), or "kept" as they are.
        abstention: None, or add the columns `distance` from what a reference knows, and `no_assist`
            with a reason where an image is too far; both are null for texts. See `trust.known`.
        workers: threads that read and decode images; default `files.threads.workers`.
        save_seconds: so often the rows of an unfinished shard are saved, beside when the run stops.
    """

    preprocess: str = "big_vision"
    normalize: bool = True
    stored: Annotated[str, settings.one_of(shards.STORED)] = "float32"
    shard_size: Annotated[int, settings.at_least(1)] = 8192
    batch_size: Annotated[int, settings.at_least(1)] = 8
    max_errors: Annotated[int | None, settings.at_least(0)] = None
    dicom: Rules = Rules()
    identifiers: Annotated[str | None, settings.one_of((*pseudonyms.KINDS, None))] = None
    abstention: Abstention | None = None
    workers: Annotated[int | None, settings.at_least(1)] = None
    save_seconds: Annotated[float, settings.at_least(0)] = 600.0

    def __post_init__(self):
        image.preset(self.preprocess)
        settings.verify(self)


@dataclass(frozen=True)
class EmbedProgress:
    """What is reported after every batch.

    Attributes:
        rows: rows just finished.
        busy: share of the time since this run began in which the device was working; None for rows
            of an earlier run.
        errors: unreadable inputs among `rows`.
    """

    rows: int
    busy: float | None = None
    errors: int = 0


def embed(
    model: api.Model,
    rows: Rows,
    output: places.Given,
    options: EmbedOptions = EmbedOptions(),
    on_progress: Callable[[EmbedProgress], Any] = lambda progress: None,
) -> records.Manifest:
    """Embeds rows into a folder; the same call again resumes the run, or returns its manifest.

    With `jax.distributed`, every process calls this with the same arguments. Each embeds its own
    shards on its own devices; all return when the manifest is there.

    Args:
        model: with the towers that the rows need; its mesh, if any, is of local devices.
        rows: from `inputs.rows`.
        output: a new folder, or that of the same run interrupted; local or remote (gs://).
        options: see `EmbedOptions`.
        on_progress: called after every batch.

    Raises:
        FileExistsError: `output` holds something else, or another run is writing there.
        ValueError: there are more unreadable inputs than `options.max_errors`. They are listed in
            errors.parquet, and what is embedded is kept.
        OSError: a disk or a network fails; that is never taken for an unreadable input.
        KeyboardInterrupt: or whatever else ends it: what is embedded is kept.
    """
    alone = jax.process_count() == 1
    naming = processes.run_on(lambda: pseudonyms.naming(options.identifiers, alone))
    folder, run = places.at(output), _record(model, rows, options, naming)
    encode.check_towers(model, rows)
    _check_volumes(rows, options.dicom)
    with ExitStack() as stack:
        hold = lambda: stack.enter_context(run_folder.hold(folder, run))  # noqa: E731
        first = processes.run_on(hold, 0)  # process 0 says what the folder holds
        check = processes.run_on(lambda: first or hold())
        assert check is not None
        if (folder / records.MANIFEST).is_file():
            on_progress(EmbedProgress(len(rows)))
            manifest = run_folder.finished_manifest(folder)
            decoders.check(manifest.versions, folder)
            return manifest
        with run_folder.report_failure(folder):
            job = _Shards(rows, folder, options, run, naming, check)
            job.embed(model, on_progress)
            if jax.process_index() == 0:
                return job.commit()
            return run_folder.finished_manifest(folder)


def _check_volumes(rows: Rows, rules: Rules) -> None:
    """Refuses volumes without `rules.volume` before the first row is embedded, not halfway."""
    column = rows.table.column("source")
    for pattern in (format.pattern for format in formats.FORMATS if format.check):
        for number in pc.indices_nonzero(pc.match_substring_regex(column, pattern))[:1].to_pylist():
            sources.check_rules(column[number].as_py(), rules)


def _record(
    model: api.Model, rows: Rows, options: EmbedOptions, naming: pseudonyms.Naming | None
) -> records.RunRecord:
    pixels = model.config.vision.pixels if model.config.vision else PixelConfig()
    known = options.abstention
    return records.RunRecord(
        model=records.Weights(model.source, model.sha256),
        tokenizer_sha256=model.processor.tokenizer_sha256,
        preprocess=options.preprocess,
        pixels=None if pixels == PixelConfig() else pixels.to_dict(),
        dicom=options.dicom.to_dict(),
        expansion=rows.parts.to_dict(),
        identifiers=naming.name if naming else None,
        normalized=options.normalize,
        dtype=model.compute.dtype,
        matmul_precision=model.compute.precision,
        stored=options.stored,
        reference=known and {"sha256": known.reference, "at": known.at},
        dim=model.config.embed_dim,
        shard_size=options.shard_size,
        rows=len(rows),
        rows_sha256=rows.sha256(),
        versions=decoders.of_every_run(),
    )


class _Shards:
    """The shards of one run: which are done, the work on the others, and the commit."""

    def __init__(self, rows: Rows, folder: Place, options: EmbedOptions, run: records.RunRecord,
                 naming: pseudonyms.Naming | None, check: locks.Check):  # fmt: skip
        self.rows, self.folder, self.options, self.run = rows, folder, options, run
        self.naming, self.check = naming, check
        self.count = -(-len(rows) // options.shard_size)
        self.errors: list[Sequence[str]] = []
        self.missing = 0  # missing files one after the other, up to now
        self.begun: dict[int, unfinished.UnfinishedShard] = {}
        self.schema = shards.schema_of(run, rows.extra, naming, options.abstention)

    def embed(self, model: api.Model, on_progress: Callable[[EmbedProgress], Any]) -> None:
        """Embeds and writes the shards of this process that are not there yet."""
        options = self.options
        done = self._done()
        mine = range(jax.process_index(), self.count, jax.process_count())
        for number in done.intersection(mine):
            on_progress(EmbedProgress(len(self._shard(number))))
        for note in self._notes(done):
            self.errors += note.errors
        todo = [number for number in mine if number not in done]
        engine = Engine(
            model, options.preprocess, options.normalize, options.batch_size, options.dicom,
            options.stored, options.max_errors is not None, options.workers,
        )  # fmt: skip
        with closing(engine.run(self._batches(todo))) as results:
            for number in todo:
                shard = self._begun(number)
                if shard.rows:
                    on_progress(EmbedProgress(shard.rows))
                with shard.saved_on_failure():
                    self._count_errors(shard.errors)
                    while shard.rows < shard.size:
                        batch = next(results)
                        self._add(batch, shard)
                        on_progress(
                            EmbedProgress(len(batch.rows), engine.busy(), len(batch.errors))
                        )
                    self.check()
                    shards.write_parquet(shards.path_of(self.folder, number), shard.table())
                shard.remove()

    def _batches(self, todo: Sequence[int]) -> Iterator[Rows]:
        """What is left of these shards; whole batches are kept of those that were begun."""
        for number in todo:
            rest = self._shard(number)[self._begun(number).rows :]
            yield from rest.batches(self.options.batch_size)

    def _begun(self, number: int) -> unfinished.UnfinishedShard:
        """What is done of a shard; the engine asks for it ahead of the others."""
        if number not in self.begun:
            self.begun[number] = unfinished.UnfinishedShard(
                self.folder, number, len(self._shard(number)), self.run, self.schema,
                self.options.save_seconds, self.check,
            )  # fmt: skip
        return self.begun[number]

    def _add(self, batch: Embedded, shard: unfinished.UnfinishedShard) -> None:
        """Adds a batch to its shard, unless there are now too many errors."""
        self._add_errors(batch)
        table = shards.batch_table(batch, self.schema, self.naming, self.options.abstention)
        shard.add(len(batch.rows), table, shards.note_of(batch), batch.reasons[-1] is None)

    def commit(self) -> records.Manifest:
        """Waits for the other processes, collects the notes of the shards, writes the manifest."""
        paths = [shards.path_of(self.folder, number) for number in range(self.count)]
        if jax.process_count() > 1:
            run_folder.wait_for(self.folder, {path.name for path in paths})
        notes = self._notes(range(self.count))
        self.errors = [error for note in notes for error in note.errors]
        shards.write_errors(self.folder, self.errors)
        self._count_errors(())
        sums: dict[str, Any] = {
            name: sum(getattr(note, name) for note in notes) for name in records.COUNTS
        }
        parts = tuple(
            records.PartFile(path.name, note.rows, path.stat().st_size)
            for path, note in zip(paths, notes, strict=True)
        )
        embedded = sum(part.rows for part in parts)
        versions = decoders.together(self.run.versions, *(note.versions for note in notes))
        manifest = records.Manifest(
            **{**vars(self.run), "versions": versions}, **sums, embedded=embedded,
            errors=len(self.errors), skipped=self.rows.skipped, parts=parts,
        )  # fmt: skip
        self.check()
        unfinished.remove_all(self.folder)
        json_files.write(self.folder / records.MANIFEST, manifest.to_dict())
        return manifest

    def _done(self) -> set[int]:
        names = {p.name for p in self.folder.iterdir()}
        return {n for n in range(self.count) if shards.path_of(self.folder, n).name in names}

    def _shard(self, number: int) -> Rows:
        size = self.options.shard_size
        return self.rows[number * size : (number + 1) * size]

    def _notes(self, numbers: Iterable[int]) -> list[shards.Note]:
        """Those of shards that are done, whose rows were made with the decoders of this machine."""
        paths = [shards.path_of(self.folder, number) for number in sorted(numbers)]
        with ThreadPoolExecutor(16) as pool:
            notes = list(pool.map(shards.read_note, paths))
        for path, note in zip(paths, notes, strict=True):
            decoders.check(note.versions, path)
        return notes

    def _add_errors(self, batch: Embedded) -> None:
        """Counts the unreadable inputs of a batch, and ends the run when there are too many.

        Raises:
            ValueError: there are more than the limit.
            OSError: no limit is given, and so many files in a row are missing that a disk must be
                gone.
        """
        errors = batch.errors
        self._count_errors(errors)
        all_missing = set(batch.reasons) == {"no such file"}
        self.missing = self.missing + len(errors) if all_missing else 0
        if self.options.max_errors is None and self.missing >= _MISSING_IN_ROW:
            raise OSError(
                f"{self.missing} inputs in a row are missing, the last {errors[-1][0]}; is a disk "
                "gone? What is embedded is kept, and the same command resumes; if the files "
                "really do not exist, set max_errors to their number"
            )

    def _count_errors(self, errors: Iterable[Sequence[str]]) -> None:
        """Adds errors; if there are more than the limit, writes them and raises ValueError."""
        self.errors += errors
        limit = self.options.max_errors
        if limit is not None and len(self.errors) > limit:
            shards.write_errors(self.folder, self.errors)
            source, reason = self.errors[-1]
            raise ValueError(
                f"{len(self.errors)} inputs could not be read, more than max_errors={limit}; "
                f"the last is {source}: {reason}. All are listed in {records.ERRORS}. What "
                "is embedded is kept, and the same command with a higher limit resumes"
            )
