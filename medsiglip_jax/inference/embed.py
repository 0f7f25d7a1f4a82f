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

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import pyarrow.compute as pc

from medsiglip_jax.data.rows import Rows
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import locks, places
from medsiglip_jax.inference import decoders, encode, pseudonyms, run_folder, shards, unfinished
from medsiglip_jax.inference import manifest as records
from medsiglip_jax.inference.shard_work import (
    EmbedOptions,
    EmbedProgress,
    Errors,
    Job,
    ShardWork,
    check_errors,
)
from medsiglip_jax.inference.share import Share
from medsiglip_jax.model import api, processes
from medsiglip_jax.model.config import PixelConfig
from medsiglip_jax.preprocess import formats, sources
from medsiglip_jax.preprocess.dicom.rules import Rules

T = TypeVar("T")

# Embeds those shards of a job that are to be done, given the errors of the others, and yields the
# progress.
Runner = Callable[[Job, Sequence[int], locks.Check, Errors], Generator[EmbedProgress]]


@dataclass(frozen=True)
class Incomplete:
    """What is there after a part of a run, where other parts have not finished.

    Attributes:
        part: the one that is done.
        shards: the number of shards of the run.
        missing: the numbers of those that are not there yet.
    """

    part: Share
    shards: int
    missing: Sequence[int]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; `missing_parts` are the indices of the parts with such shards."""
        return {
            "part": str(self.part),
            "shards": self.shards,
            "missing_shards": len(self.missing),
            "missing_parts": self.part.owners(self.missing),
        }


def embed(
    model: api.Model,
    rows: Rows,
    output: places.Given,
    options: EmbedOptions = EmbedOptions(),
    on_progress: Callable[[EmbedProgress], Any] = lambda progress: None,
    runner: Runner | None = None,
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
        runner: None embeds with `model` in this process; or `ray_runner.RayRunner`, for which
            `model` needs no weights.

    Raises:
        FileExistsError: `output` holds something else, or another run is writing there.
        ValueError: there are more unreadable inputs than `options.max_errors`. They are listed in
            errors.parquet, and what is embedded is kept.
        OSError: a disk or a network fails; that is never taken for an unreadable input.
        KeyboardInterrupt: or whatever else ends it: what is embedded is kept.
    """
    share = Share(jax.process_index(), jax.process_count())

    def finish(job: Job, check: locks.Check) -> records.Manifest:
        if share.index:
            return run_folder.finished_manifest(job.folder)
        if share.count > 1:
            run_folder.wait_for(job.folder, {job.path(n).name for n in range(job.count)})
        return _commit(job, check)

    return _embed(model, rows, output, options, on_progress, share, runner, finish)


def embed_part(
    model: api.Model,
    rows: Rows,
    output: places.Given,
    part: Share,
    options: EmbedOptions = EmbedOptions(),
    on_progress: Callable[[EmbedProgress], Any] = lambda progress: None,
) -> records.Manifest | Incomplete:
    """Embeds one part of a run, whose processes know nothing of each other: a Slurm array, or an
    indexed job of Kubernetes. They may run at the same time or one after the other.

    Each part embeds its shards, and the one that finishes last writes the manifest. A part that
    failed is repeated; so is any part to see what is missing.

    Args:
        model, rows, output, options, on_progress: as for `embed`, and the same for each part.
        part: which one this is.

    Returns:
        The manifest, if this part is the last to finish or all were finished before.

    Raises:
        FileExistsError: this part is running already; else as `embed`.
        ValueError, OSError: as `embed`; `max_errors` counts those of this part, and in the last one
            those of all.
    """

    def finish(job: Job, check: locks.Check) -> records.Manifest | Incomplete:
        if missing := job.missing():
            return Incomplete(part, job.count, missing)
        return run_folder.once(job.folder, lambda check: _commit(job, check))

    return _embed(model, rows, output, options, on_progress, part, None, finish)


def _embed(
    model: api.Model,
    rows: Rows,
    output: places.Given,
    options: EmbedOptions,
    on_progress: Callable[[EmbedProgress], Any],
    share: Share,
    runner: Runner | None,
    finish: Callable[[Job, locks.Check], T],
) -> records.Manifest | T:
    """Embeds the shards of a share that are not there yet; what follows is `finish`."""
    alone = share.count == 1
    naming = processes.run_on(lambda: pseudonyms.naming(options.identifiers, alone))
    folder, run = places.at(output), record(model, rows, options, naming)
    encode.check_towers(model, rows)
    _check_volumes(rows, options.prepared(model).dicom)
    with ExitStack() as stack:
        hold = lambda: stack.enter_context(run_folder.hold(folder, run, share.index))  # noqa: E731
        first = processes.run_on(hold, 0)  # process 0 says what the folder holds
        check = processes.run_on(lambda: first or hold())
        assert check is not None
        if (folder / records.MANIFEST).is_file():
            on_progress(EmbedProgress(share.rows(len(rows), options.shard_size)))
            manifest = run_folder.finished_manifest(folder)
            decoders.check(manifest.versions, folder, "to make it again; it is complete")
            return manifest
        with run_folder.report_failure(folder):
            job = Job(rows, folder, options, run, naming)
            _embed_rest(job, model, share, runner, check, on_progress)
            return finish(job, check)


def _embed_rest(
    job: Job,
    model: api.Model,
    share: Share,
    runner: Runner | None,
    check: locks.Check,
    on_progress: Callable[[EmbedProgress], Any],
) -> None:
    """Counts the shards that are there already, and has the others embedded."""
    mine = share.of(job.count)
    there = sorted(job.done())
    done = set(there).intersection(mine)
    for number in done:
        on_progress(EmbedProgress(len(job.shard(number))))
    # Also those of others: parts by other decoders would be refused when all the work is done.
    notes = zip(there, job.notes(there), strict=True)
    errors = [error for number, note in notes if number in done for error in note.errors]
    todo = [number for number in mine if number not in done]
    if runner:
        steps = runner(job, todo, check, errors)
    else:
        steps = ShardWork(job, model, check, errors).embed(todo)
    with closing(steps):
        for progress in steps:
            on_progress(progress)


def _check_volumes(rows: Rows, rules: Rules) -> None:
    """Refuses volumes without `rules.volume` before the first row is embedded, not halfway."""
    column = rows.table.column("source")
    for pattern in (format.pattern for format in formats.FORMATS if format.check):
        for number in pc.indices_nonzero(pc.match_substring_regex(column, pattern))[:1].to_pylist():
            sources.check_rules(column[number].as_py(), rules)


def record(
    model: api.Model, rows: Rows, options: EmbedOptions, naming: pseudonyms.Naming | None
) -> records.RunRecord:
    """What identifies a run on this machine."""
    pixels = model.config.vision.pixels if model.config.vision else PixelConfig()
    known, preparation = options.abstention, options.prepared(model)
    return records.RunRecord(
        model=records.Weights(model.source, model.sha256),
        tokenizer_sha256=model.processor.tokenizer_sha256,
        preprocess=preparation.preprocess,
        pixels=None if pixels == PixelConfig() else pixels.to_dict(),
        dicom=preparation.dicom.to_dict(),
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


def _commit(job: Job, check: locks.Check) -> records.Manifest:
    """Collects the notes of the shards, which are all there, and writes the manifest last."""
    numbers = range(job.count)
    notes = job.notes(numbers)
    errors = [error for note in notes for error in note.errors]
    shards.write_errors(job.folder, errors)
    check_errors(job, errors)
    sums: dict[str, Any] = {
        name: sum(getattr(note, name) for note in notes) for name in records.COUNTS
    }
    parts = tuple(
        records.PartFile(path.name, note.rows, path.stat().st_size)
        for path, note in zip(map(job.path, numbers), notes, strict=True)
    )
    embedded = sum(part.rows for part in parts)
    versions = decoders.together(job.run.versions, *(note.versions for note in notes))
    manifest = records.Manifest(
        **{**vars(job.run), "versions": versions}, **sums, embedded=embedded,
        errors=len(errors), skipped=job.rows.skipped, parts=parts,
    )  # fmt: skip
    check()
    unfinished.remove_all(job.folder)
    json_files.write(job.folder / records.MANIFEST, manifest.to_dict())
    return manifest
