"""The rows of a shard that is not finished yet, kept so that a stopped run loses little work.

They are written to `unfinished-NNNNN.parquet` when the run is stopped or fails, and now and then
before. The same command reads them, embeds the rest of the shard, and removes the file once the
part is written. What is kept are whole batches: a vector's last bits may depend on the batch that
it was computed in, and the part is to have the bytes that it has without an interruption.

The file says which run and which rows it is of, and has a digest of all that. A file that is
damaged or of another run is not used, which a warning says; one that was made with other versions
of decoders is refused, as a part is.
"""

import hashlib
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medsiglip_jax.files import locks, storage
from medsiglip_jax.files.failures import explained, shortened
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.files.places import Place
from medsiglip_jax.inference import decoders, shards
from medsiglip_jax.inference.manifest import RunRecord
from medsiglip_jax.inference.shards import Note

_NAME = re.compile(r"unfinished-\d{5,}\.parquet")


def remove_all(folder: Place) -> None:
    """Removes what is kept of shards, all of which are finished: a run that is killed just after it
    has written a part leaves such a file."""
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name):
            storage.remove(path)


@dataclass(frozen=True)
class _Done:
    """The first `rows` inputs of a shard, which became the first `tables` tables."""

    rows: int = 0
    tables: int = 0
    note: Note = Note(0)


class UnfinishedShard:
    """What is done of a shard, in this run and before.

    Attributes:
        size: input rows of the shard.
    """

    def __init__(
        self, folder: Place, number: int, size: int, run: RunRecord, schema: pa.Schema,
        seconds: float, check: locks.Check,
    ):  # fmt: skip
        """Goes on from the rows that are kept of this shard, if there are any.

        Args:
            folder: of the run.
            number: of the shard.
            size: its input rows.
            run: what a file of kept rows has to say.
            schema: of the tables that are added, see `shards.schema_of`.
            seconds: between two times that the rows are saved.
            check: called before anything is written; raises if another run has taken over.

        Raises:
            FileExistsError: the rows were made with other versions of decoders than are installed.
        """
        self.size, self._run, self._schema = size, run, schema
        self._path, self._number = folder / f"unfinished-{number:05d}.parquet", number
        self._seconds, self._check = seconds, check
        self._tables: list[pa.Table] = []
        self._done = self._safe = _Done()
        self._saved, self._saved_at = 0, time.monotonic()
        if self._path.is_file():
            self._go_on()

    @property
    def rows(self) -> int:
        """Input rows that are done."""
        return self._done.rows

    @property
    def errors(self) -> Sequence[tuple[str, str]]:
        """(source, reason) of the unreadable ones among them."""
        return self._done.note.errors

    def add(self, rows: int, table: pa.Table, note: Note, readable_at_end: bool) -> None:
        """Adds a batch.

        Args:
            rows: its input rows.
            table: those with an embedding, as `shards.batch_table` has them.
            note: what came of the rows.
            readable_at_end: whether the last one has an embedding. Only up to such a row is kept:
                unreadable ones at the end may be the first that a disk or a network did not give.
        """
        self._tables.append(table)
        before = self._done
        # A signal may come anywhere: this line is where the batch counts.
        self._done = _Done(before.rows + rows, len(self._tables), before.note + note)
        if readable_at_end:
            self._safe = self._done
        if time.monotonic() > self._saved_at + self._seconds:
            self.save()

    def table(self) -> pa.Table:
        """The finished shard, as it is written."""
        return shards.shard_table(self._tables, self._done.note, self._run)

    def remove(self) -> None:
        """Removes what was kept, once the part is written; `rows` stays."""
        self._tables.clear()
        storage.remove(self._path)

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Saves the rows when the block is left by an error or a signal."""
        try:
            yield
        except BaseException:
            try:
                self.save()
            except Exception as error:  # the first error says what has happened
                said = shortened(str(error))
                warnings.warn(f"the rows of an unfinished shard are lost: {said}", stacklevel=3)
            raise

    def save(self) -> None:
        """Writes the rows that are safe to keep, if there are new ones."""
        safe, self._saved_at = self._safe, time.monotonic()
        if safe.rows == self._saved:
            return
        table = pa.concat_tables(self._tables[: safe.tables]).combine_chunks()
        record = {"run": self._run.to_dict(), "shard": self._number, "rows": safe.rows}
        record["note"] = asdict(safe.note)
        record["sha256"] = _digest(record, table)
        self._check()
        shards.write_parquet(self._path, shards.with_metadata(table, record))
        self._saved = safe.rows

    def _go_on(self) -> None:
        """Takes over what is kept, unless it is not what this run has written."""
        try:
            with explained(self._path, "not the kept rows of this run"):
                done, table = self._read()
        except ValueError as error:
            warnings.warn(f"{error}; its rows are embedded again", stacklevel=5)
            return
        decoders.check(done.note.versions, self._path)
        self._tables, self._done, self._safe, self._saved = [table], done, done, done.rows

    def _read(self) -> tuple[_Done, pa.Table]:
        """What the file holds.

        Raises:
            Exception: of nearly any type, if it is not what `save` has written.
        """
        with self._path.open("rb") as stream, pq.ParquetFile(stream) as file:
            said = shards.metadata_in(file.schema_arrow.metadata)
            if differ := self._run.differences(said["run"]):
                raise ValueError(f"{', '.join(differ)} differ")
            if file.metadata.num_rows > self.size:
                raise ValueError(f"{file.metadata.num_rows} rows")
            table = file.read().cast(self._schema)
        if said.pop("sha256") != _digest(said, table):
            raise ValueError("its content has changed")
        if said["shard"] != self._number:
            raise ValueError(f"it is of shard {said['shard']}")
        return _Done(said["rows"], 1, shards.note_in(said["note"])), table


def _digest(said: Mapping[str, Any], table: pa.Table) -> str:
    """Of all that a file of kept rows says."""
    strings = table.drop_columns(["embedding"]).to_pylist()
    vectors = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    digest = hashlib.sha256(dumps([said, strings]).encode())
    digest.update(np.ascontiguousarray(vectors).tobytes())
    return digest.hexdigest()
