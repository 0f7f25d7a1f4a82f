"""The columns of a Parquet file, each read when it is asked for."""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from pyarrow import ArrowException, parquet

from medsiglip_jax.data.columns import MAX_BYTES, check_rows, column_names, is_textual, strings
from medsiglip_jax.files.json_text import dumps
from medsiglip_jax.files.places import in_words, open_binary


class ParquetColumns(Mapping[str, pyarrow.ChunkedArray]):
    """The columns of a Parquet file, of any type, each read when it is asked for.

    Attributes:
        schema: the schema of the file.
        rows: the number of rows.
    """

    def __init__(self, path: str):
        self._path = path
        self.schema, self.rows = self._read(lambda f: (f.schema_arrow, f.metadata.num_rows))
        check_rows(path, self.rows)
        self._names = column_names(path, self.schema.names)

    def __getitem__(self, name: str) -> pyarrow.ChunkedArray:
        if name not in self:
            raise KeyError(name)
        field = self.schema.field(self._names.index(name))
        if not is_textual(field.type):  # perhaps pictures, which would not be used
            return pyarrow.chunked_array([], field.type)
        return self._read(lambda file: file.read([field.name]), field.name).column(0)

    def schema_of(self, name: str) -> pyarrow.DataType:
        """The type of a column."""
        return self.schema.field(self._names.index(name)).type

    def lists(self, name: str) -> list[str]:
        """The cells of a column of lists of names, in JSON; "" where there is none.

        Raises:
            ValueError: they hold more names than text may have bytes.
        """
        field = self.schema.field(self._names.index(name))
        column = self._read(lambda file: file.read([field.name])).column(0)
        if sum(chunk.nbytes for chunk in column.chunks) > MAX_BYTES:
            raise ValueError(f"{self._path}: column {name!r}: more than {MAX_BYTES} bytes")
        cells = (cell for chunk in column.chunks for cell in chunk.to_pylist())
        return ["" if cell is None else dumps([x for x in cell if x is not None]) for cell in cells]

    def pictures(self, name: str) -> tuple[pyarrow.ChunkedArray, np.ndarray]:
        """The names that the pictures of a column had outside of the file, "" for none, and which
        rows hold the bytes of one, bool [n]. The bytes are read only if some are missing."""
        field = self.schema.field(self._names.index(name))
        leaf = f"{field.name}.bytes" if pyarrow.types.is_struct(field.type) else field.name
        nested = dict((f.name, f.type) for f in field.type) if leaf != field.name else {}
        names = pyarrow.nulls(self.rows, pyarrow.large_string()).fill_null("")
        if "path" in nested and is_textual(nested["path"]):
            # Also of a column "image.path" beside "image", to which Arrow gives the same name.
            table = self._read(lambda file: file.read([f"{field.name}.path"]))
            names = pyarrow.concat_arrays(
                [names[:0], *(strings(c.field("path")) for c in table[field.name].chunks)]
            )
        inside = self._read(lambda file: _present(file, field.name, leaf))
        return pyarrow.chunked_array([names]), inside

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, read: Callable[[parquet.ParquetFile], Any], column: str = "") -> Any:
        """The result of `read` for the file; equal texts of a column are kept once."""
        with in_words(self._path), open_binary(self._path) as stream:
            try:
                return read(parquet.ParquetFile(stream, read_dictionary=[column] * bool(column)))
            except MemoryError:
                raise
            except (ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{self._path}: not a Parquet file ({reason})") from None


def _present(file: parquet.ParquetFile, name: str, leaf: str) -> np.ndarray:
    """Which rows have a value that is not empty in a column, or in the leaf of its bytes."""
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
    place, present = leaves.index(leaf), [np.zeros(0, bool)]
    for number, group in enumerate(groups):
        statistics = group.column(place).statistics
        if statistics is not None and statistics.has_null_count and not statistics.null_count:
            present.append(np.ones(group.num_rows, bool))
            continue
        column = file.read_row_group(number, [leaf])[name]
        for chunk in column.chunks:
            values = chunk.field("bytes") if pyarrow.types.is_struct(chunk.type) else chunk
            lengths = pc.fill_null(pc.binary_length(values.cast(pyarrow.large_binary())), 0)
            present.append(
                (lengths.to_numpy(zero_copy_only=False) > 0)
                & chunk.is_valid().to_numpy(zero_copy_only=False)
            )
    return np.concatenate(present)
