"""The work on the shards of an embedding run: rows in, one Parquet file per shard out.

A shard is the unit of commit, and comes out the same whoever embeds it. Which process does which is
decided above, in `embed`.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any

from medsiglip_jax.data.rows import Rows
from medsiglip_jax.files import locks, places, settings
from medsiglip_jax.files.places import Place
from medsiglip_jax.inference import decoders, pseudonyms, shards, unfinished
from medsiglip_jax.inference import manifest as records
from medsiglip_jax.inference.abstain import Abstention
from medsiglip_jax.inference.engine import Embedded, Engine
from medsiglip_jax.model import api
from medsiglip_jax.model.config import Preparation
from medsiglip_jax.preprocess import image
from medsiglip_jax.preprocess.dicom.rules import Rules

# (source, reason) of unreadable inputs.
Errors = Sequence[Sequence[str]]
_MISSING_IN_ROW = 1000  # this many missing files one after the other mean that a disk is gone


@dataclass(frozen=True)
class EmbedOptions:
    """What identifies a run, beside the model and the inputs; and how to run it.

    Attributes:
        preprocess: pixel preset; by default that of the model's training where its export
            remembers one, else "big_vision".
        normalize: unit vectors (what retrieval wants), or the raw pooled output.
        stored: element type of the vectors in the files, "float32" or "float16".
        shard_size: input rows per Parquet file; so many are in memory at once.
        batch_size: rows per call of the encoder, over all local devices. It may change when a run
            is resumed; then the last bits of the vectors change, too.
        max_errors: unreadable inputs that are accepted; None is any number. It may change, too.
        dicom: how DICOM files and NIfTI volumes become pixels; default likewise.
        identifiers: None, or add columns with the patient, study and series of DICOM files:
            "hashed" (see `pseudonyms`), or "kept" as they are.
        abstention: None, or add the columns `distance` from what a reference knows, and `no_assist`
            with a reason where an image is too far; both are null for texts. See `trust.known`.
        workers: threads that read and decode images; default `files.threads.workers`.
        save_seconds: so often the rows of an unfinished shard are saved, beside when the run stops.
    """

    preprocess: str | None = None
    normalize: bool = True
    stored: Annotated[str, settings.one_of(shards.STORED)] = "float32"
    shard_size: Annotated[int, settings.at_least(1)] = 8192
    batch_size: Annotated[int, settings.at_least(1)] = 8
    max_errors: Annotated[int | None, settings.at_least(0)] = None
    dicom: Rules | None = None
    identifiers: Annotated[str | None, settings.one_of((*pseudonyms.KINDS, None))] = None
    abstention: Abstention | None = None
    workers: Annotated[int | None, settings.at_least(1)] = None
    save_seconds: Annotated[float, settings.at_least(0)] = 600.0

    def __post_init__(self):
        if self.preprocess is not None:
            image.preset(self.preprocess)
        settings.verify(self)

    def prepared(self, model: api.Model) -> Preparation:
        """How images are prepared for a model, see `ModelConfig.prepared`."""
        return model.config.prepared(self.preprocess, self.dicom)


@dataclass(frozen=True)
class EmbedProgress:
    """What is reported after every batch.

    Attributes:
        rows: rows just finished.
        busy: share of the time since this run began in which the device was working; None for rows
            of an earlier run.
        errors: unreadable inputs among `rows`.
        actors: how many are at work, with Ray. Where one is lost, `rows` and `errors` are negative:
            what it had of its shard is to be done again.
    """

    rows: int
    busy: float | None = None
    errors: int = 0
    actors: int | None = None


@dataclass(frozen=True)
class Job:
    """What all processes of a run have in common.

    Attributes:
        rows: what is embedded.
        folder: the output.
        options: see `EmbedOptions`.
        run: what makes it the same run.
        naming: of the patients, studies and series, if they are wanted.
    """

    rows: Rows
    folder: Place
    options: EmbedOptions
    run: records.RunRecord
    naming: pseudonyms.Naming | None

    def __reduce__(self):
        """Pickles the folder by its name: the connection of a bucket is of this process."""
        return _unpickled, (self.rows, str(self.folder), self.options, self.run, self.naming)

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-len(self.rows) // self.options.shard_size)

    def shard(self, number: int) -> Rows:
        """The rows of a shard."""
        size = self.options.shard_size
        return self.rows[number * size : (number + 1) * size]

    def path(self, number: int) -> Place:
        """The file of a shard."""
        return shards.path_of(self.folder, number)

    def done(self) -> set[int]:
        """The shards that are there."""
        names = {p.name for p in self.folder.iterdir()}
        return {n for n in range(self.count) if self.path(n).name in names}

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return sorted(set(range(self.count)) - self.done())

    def notes(self, numbers: Iterable[int]) -> list[shards.Note]:
        """What came of shards that are there, in order, if their rows were made with the decoders
        of this machine."""
        paths = [self.path(number) for number in sorted(numbers)]
        with ThreadPoolExecutor(16) as pool:
            notes = list(pool.map(shards.read_note, paths))
        for path, note in zip(paths, notes, strict=True):
            decoders.check(note.versions, path)
        return notes


def _unpickled(rows: Rows, folder: str, *others: Any) -> Job:
    return Job(rows, places.at(folder), *others)


class ShardWork:
    """One process at work on shards of a run, of which it counts the unreadable inputs."""

    def __init__(self, job: Job, model: api.Model, check: locks.Check, errors: Errors = ()):
        """`check` is called before anything is written; `errors` are known already."""
        self.job, self.model, self.check, self.errors = job, model, check, list(errors)
        self.missing = 0  # missing files one after the other, up to now
        self.begun: dict[int, unfinished.UnfinishedShard] = {}
        self.schema = shards.schema_of(job.run, job.rows.extra, job.naming, job.options.abstention)

    def embed(self, numbers: Sequence[int]) -> Generator[EmbedProgress]:
        """Embeds these shards, and writes each as soon as it is complete.

        Yields:
            The progress, after every batch.

        Raises:
            ValueError: there are more unreadable inputs than `max_errors`.
            OSError: a disk or a network fails.
        """
        job, options = self.job, self.job.options
        how = options.prepared(self.model)
        engine = Engine(
            self.model, how.preprocess, options.normalize, options.batch_size, how.dicom,
            options.stored, options.max_errors is not None, options.workers,
        )  # fmt: skip
        with closing(engine.run(self._batches(numbers))) as results:
            for number in numbers:
                shard = self._begun(number)
                if shard.rows:
                    yield EmbedProgress(shard.rows)
                with shard.saved_on_failure():
                    self._count_errors(shard.errors)
                    while shard.rows < shard.size:
                        batch = next(results)
                        self._add(batch, shard)
                        yield EmbedProgress(len(batch.rows), engine.busy(), len(batch.errors))
                    self.check()
                    shards.write_parquet(job.path(number), shard.table())
                shard.remove()

    def _batches(self, numbers: Iterable[int]) -> Iterator[Rows]:
        """What is left of these shards; whole batches are kept of those that were begun."""
        for number in numbers:
            rest = self.job.shard(number)[self._begun(number).rows :]
            yield from rest.batches(self.job.options.batch_size)

    def _begun(self, number: int) -> unfinished.UnfinishedShard:
        """What is done of a shard; the engine asks for it ahead of the others."""
        if number not in self.begun:
            job = self.job
            self.begun[number] = unfinished.UnfinishedShard(
                job.folder, number, len(job.shard(number)), job.run, self.schema,
                job.options.save_seconds, self.check,
            )  # fmt: skip
        return self.begun[number]

    def _add(self, batch: Embedded, shard: unfinished.UnfinishedShard) -> None:
        """Adds a batch to its shard, unless there are now too many errors."""
        self._add_errors(batch)
        job = self.job
        table = shards.batch_table(batch, self.schema, job.naming, job.options.abstention)
        shard.add(len(batch.rows), table, shards.note_of(batch), batch.reasons[-1] is None)

    def _count_errors(self, errors: Iterable[Sequence[str]]) -> None:
        self.errors += errors
        check_errors(self.job, self.errors)

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
        if self.job.options.max_errors is None and self.missing >= _MISSING_IN_ROW:
            raise OSError(
                f"{self.missing} inputs in a row are missing, the last {errors[-1][0]}; is a disk "
                "gone? What is embedded is kept, and the same command resumes; if the files "
                "really do not exist, set max_errors to their number"
            )


def check_errors(job: Job, errors: Errors) -> None:
    """If there are more errors than the limit, writes them and raises ValueError."""
    limit = job.options.max_errors
    if limit is not None and len(errors) > limit:
        shards.write_errors(job.folder, errors)
        source, reason = errors[-1]
        raise ValueError(
            f"{len(errors)} inputs could not be read, more than max_errors={limit}; "
            f"the last is {source}: {reason}. All are listed in {records.ERRORS}. What "
            "is embedded is kept, and the same command with a higher limit resumes"
        )
