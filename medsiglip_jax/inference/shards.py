"""The Parquet files of an embedding run: one per shard of the inputs, and the list of errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq

from medsiglip_jax.data.rows import EXTRA, without_credentials
from medsiglip_jax.files import places, settings, storage
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.inference import decoders, pseudonyms
from medsiglip_jax.inference.abstain import Abstention
from medsiglip_jax.inference.engine import Embedded
from medsiglip_jax.inference.manifest import COUNTS, ERRORS, MOST_ROWS, RunRecord
from medsiglip_jax.inference.pseudonyms import Naming

STORED = {"float32": pa.float32(), "float16": pa.float16()}

_METADATA = b"medsiglip_jax"
_ERROR_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string())])
_ROW_GROUP = 8192  # rows that a reader has to hold at once


def path_of(folder: places.Place, number: int) -> places.Place:
    """The file of a shard."""
    return folder / f"part-{number:05d}.parquet"


@dataclass(frozen=True)
class Note:
    """What came of rows, of a batch or of all up to now.

    Attributes:
        rows: with an embedding.
        errors: (source, reason) of the unreadable inputs.
        turned, burned_in, multi_frame, unusual, dark, cut: as in `engine.Embedded`.
        versions: of the decoders that were asked to read them.
    """

    rows: Annotated[int, settings.between(0, MOST_ROWS)]
    errors: tuple[tuple[str, str], ...] = ()
    turned: int = 0
    burned_in: int = 0
    multi_frame: int = 0
    unusual: int = 0
    dark: int = 0
    cut: int = 0
    versions: Mapping[str, str | None] = field(default_factory=dict)

    def __add__(self, other: "Note") -> "Note":
        names = ("rows", "errors", *COUNTS)
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Note(**sums, versions=decoders.together(self.versions, other.versions))


def note_of(batch: Embedded) -> Note:
    """The note of a batch."""
    counts = {name: getattr(batch, name) for name in COUNTS}
    versions = decoders.of_formats(batch.formats)
    return Note(len(batch.vectors), tuple(batch.errors), **counts, versions=versions)


def schema_of(
    run: RunRecord, extra: Sequence[str], naming: Naming | None, abstention: Abstention | None
) -> pa.Schema:
    """The columns of a run; `extra` are the names of those of `data.rows.EXTRA`."""
    value = pa.field("element", STORED[run.stored or "float32"], nullable=False)
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("id", "source", "kind")]
    fields += [EXTRA.field(name) for name in extra]
    fields += [pa.field(name, pa.string()) for name in pseudonyms.COLUMNS if naming is not None]
    if abstention is not None:
        fields += [pa.field("distance", pa.float64()), pa.field("no_assist", pa.string())]
    return pa.schema([*fields, pa.field("embedding", pa.list_(value, run.dim), nullable=False)])


def batch_table(
    batch: Embedded, schema: pa.Schema, naming: Naming | None, abstention: Abstention | None
) -> pa.Table:
    """The rows of a batch that have an embedding, with the columns of `schema_of`."""
    kept = batch.rows.table.filter(pa.array(batch.readable))
    columns = {name: kept.column(name) for name in kept.column_names}
    columns["source"] = without_credentials(kept.column("source"))
    if naming is not None:
        names = [naming(subject) for subject in batch.subjects]
        for n, column in enumerate(pseudonyms.COLUMNS):
            columns[column] = pa.array([row[n] for row in names], pa.string())
    if abstention is not None:
        columns |= _judgement(batch, abstention)
    vector = schema.field("embedding").type
    values = pa.array(batch.vectors.reshape(-1)).cast(vector.value_type)
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, type=vector)
    return pa.table([columns[f.name].cast(f.type) for f in schema], schema=schema)


def _judgement(batch: Embedded, abstention: Abstention) -> dict[str, pa.Array]:
    """The columns `distance` and `no_assist`; null for texts."""
    distances, reasons = [None] * len(batch.vectors), [None] * len(batch.vectors)
    if len(batch.vectors) and batch.rows[0].kind == "image":  # a batch has one kind
        far, reasons = abstention.judge(batch.vectors)
        distances = far.tolist()
    return {
        "distance": pa.array(distances, pa.float64()), "no_assist": pa.array(reasons, pa.string())
    }  # fmt: skip


def shard_table(tables: Sequence[pa.Table], note: Note, run: RunRecord) -> pa.Table:
    """A shard as it is written, of its batches; its metadata is the run and the note.

    It is one chunk, for where Parquet ends a page depends on the chunks that it is given: the bytes
    are the same whatever the batches, some of which may come from the file of an earlier run.
    """
    return with_metadata(pa.concat_tables(tables).combine_chunks(), metadata_of(note, run))


def metadata_of(note: Note, run: RunRecord) -> dict[str, Any]:
    """What a part says of itself."""
    counted = {"errors": note.errors, **{name: getattr(note, name) for name in COUNTS}}
    versions = decoders.together(run.versions, note.versions)
    return {**run.to_dict(), "versions": versions, **counted, "rows": note.rows}


def with_metadata(table: pa.Table, said: Mapping[str, Any]) -> pa.Table:
    """A table that says this of itself."""
    return table.replace_schema_metadata({_METADATA: dumps(said).encode()})


def metadata_in(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What a table of this metadata says of itself; fails with nearly any error if it is none."""
    return parse((metadata or {})[_METADATA])


def note_in(said: Mapping[str, Any]) -> Note:
    """The note in what a table says of itself; a ValueError if it has none."""
    return settings.build(
        Note, {f.name: said[f.name] for f in fields(Note) if f.name in said}, "note"
    )


def read_note(path: places.Place) -> Note:
    """The note that `shard_table` put into the metadata of a shard.

    Raises:
        ValueError: the file is damaged.
    """
    with explained(path, "damaged", "remove it and repeat the command"):
        with path.open("rb") as file:
            return note_in(metadata_in(pq.read_metadata(file).metadata))


def write_errors(folder: places.Place, errors: Sequence[Sequence[str]]) -> None:
    """Writes `errors.parquet`, of (source, reason)."""
    columns = [list(column) for column in zip(*errors, strict=True)] or [[], []]
    write_parquet(folder / ERRORS, pa.table(columns, schema=_ERROR_SCHEMA))


def write_parquet(path: places.Place, table: pa.Table) -> None:
    """Vectors are stored as they are: compressed by default they read at a third of the speed."""
    strings: Any = [name for name in table.schema.names if name != "embedding"]
    compression: Any = dict.fromkeys(strings, "zstd")
    with storage.new_file(path) as partial:
        pq.write_table(
            table, partial, row_group_size=_ROW_GROUP, use_dictionary=strings,
            compression=compression, write_statistics=strings,
        )  # fmt: skip
