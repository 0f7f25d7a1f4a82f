"""The Parquet files of an embedding run: one per shard of the inputs, and the list of errors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq

from medsiglip_jax.data.rows import EXTRA, without_credentials
from medsiglip_jax.files import places, settings, storage
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.inference import pseudonyms
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


def shard_table(
    batches: Sequence[Embedded],
    run: RunRecord,
    naming: Naming | None,
    abstention: Abstention | None = None,
) -> pa.Table:
    """A shard as it is written; its metadata is the run and a note of what came of its rows."""
    tables = [_batch_table(batch, run, naming) for batch in batches]
    if abstention is not None:
        judged = zip(tables, batches, strict=True)
        tables = [_with_judgement(table, batch, abstention) for table, batch in judged]
    table = pa.concat_tables(tables)
    note = {
        "errors": [error for batch in batches for error in batch.errors],
        **{name: sum(getattr(batch, name) for batch in batches) for name in COUNTS},
        "rows": table.num_rows,
    }
    metadata = dumps({**run.to_dict(), **note}).encode()
    return table.replace_schema_metadata({_METADATA: metadata})


def _batch_table(batch: Embedded, run: RunRecord, naming: Naming | None) -> pa.Table:
    kept = batch.rows.table.filter(pa.array(batch.readable))
    values = pa.array(batch.vectors.reshape(-1)).cast(STORED[run.stored or "float32"])
    vector = pa.list_(pa.field("element", values.type, nullable=False), run.dim)
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("id", "source", "kind")]
    fields += [EXTRA.field(name) for name in batch.rows.extra]
    kept = kept.set_column(1, "source", without_credentials(kept.column("source")))
    columns = [kept.column(field.name).cast(field.type) for field in fields]
    if naming is not None:
        names = [naming(subject) for subject in batch.subjects]
        for n, column in enumerate(pseudonyms.COLUMNS):
            fields.append(pa.field(column, pa.string()))
            columns.append(pa.array([row[n] for row in names], pa.string()))
    return pa.table(
        [*columns, pa.FixedSizeListArray.from_arrays(values, type=vector)],
        schema=pa.schema([*fields, pa.field("embedding", vector, nullable=False)]),
    )


def _with_judgement(table: pa.Table, batch: Embedded, abstention: Abstention) -> pa.Table:
    """A batch with the columns `distance` and `no_assist` before the embeddings; null for texts."""
    distances, reasons = [None] * table.num_rows, [None] * table.num_rows
    if table.num_rows and batch.rows[0].kind == "image":  # a batch has one kind
        far, reasons = abstention.judge(batch.vectors)
        distances = far.tolist()
    at = table.num_columns - 1
    table = table.add_column(
        at, pa.field("no_assist", pa.string()), [pa.array(reasons, pa.string())]
    )
    return table.add_column(
        at, pa.field("distance", pa.float64()), [pa.array(distances, pa.float64())]
    )


@dataclass(frozen=True)
class Note:
    """What came of the rows of a shard.

    Attributes:
        rows: with an embedding.
        errors: (source, reason) of the unreadable inputs.
        turned, burned_in, multi_frame, unusual, dark, cut: as in `engine.Embedded`.
    """

    rows: Annotated[int, settings.between(0, MOST_ROWS)]
    errors: tuple[tuple[str, str], ...] = ()
    turned: int = 0
    burned_in: int = 0
    multi_frame: int = 0
    unusual: int = 0
    dark: int = 0
    cut: int = 0


def read_note(path: places.Place) -> Note:
    """The note that `shard_table` put into the metadata of a shard.

    Raises:
        ValueError: the file is damaged.
    """
    with explained(path, "damaged", "remove it and repeat the command"):
        with path.open("rb") as file:
            note = parse((pq.read_metadata(file).metadata or {})[_METADATA])
        known = {f.name: note[f.name] for f in fields(Note) if f.name in note}
        return settings.build(Note, known, "note")


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
