"""Vectors in a column of lists of a Parquet table."""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from medsiglip_jax.data.columns import MAX_ROWS, check_text, is_textual, strings
from medsiglip_jax.embeddings.elsewhere import found
from medsiglip_jax.files import places


def read(path: places.Place) -> found.Found:
    """The vectors and their names; see `formats`."""
    with path.open("rb") as stream:
        file = parquet.ParquetFile(stream)
        if file.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"more than {MAX_ROWS:,} rows; split the table")
        schema = file.schema_arrow
        name = found.pick_vectors([f.name for f in schema if _are_vectors(f.type)])
        textual = [f.name for f in schema if is_textual(f.type)]
        id, source, kind = (
            found.pick(role, textual, False) for role in (found.IDS, found.SOURCES, found.KINDS)
        )
        names = list(filter(None, (id, source))) or _only_strings(schema)
        wanted = [*names, kind] if kind and kind not in names else names
        found.check_bytes(_unpacked(file, [name, *wanted]))
        table = file.read([name, *wanted])
    columns = {n: _strings(table[n]) for n in wanted}
    return found.named(path, matrix(table[name]), columns)


def _only_strings(schema: pyarrow.Schema) -> list[str]:
    """The columns of strings."""
    kinds = (pyarrow.types.is_string, pyarrow.types.is_large_string)
    return [field.name for field in schema if any(is_kind(field.type) for is_kind in kinds)]


def _are_vectors(type: pyarrow.DataType) -> bool:
    types = pyarrow.types
    kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(is_kind(type) for is_kind in kinds) and types.is_floating(type.value_type)


def _unpacked(file: parquet.ParquetFile, names: list[str]) -> int:
    """How many bytes columns take, as their headers say; a dictionary may hold a value once."""
    metadata = file.metadata
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return sum(
        max(group.column(i).total_uncompressed_size, 4 * group.column(i).num_values)
        for group in groups
        for i in range(group.num_columns)
        if group.column(i).path_in_schema.partition(".")[0] in names
    )


def _strings(column: pyarrow.ChunkedArray) -> list[str]:
    check_text(column)
    return [text for chunk in column.chunks for text in strings(chunk).to_pylist()]


def matrix(column: Any) -> np.ndarray:
    """A column of lists of one length as float32 [n, d].

    Raises:
        ValueError: one is missing, or of another length.
    """
    if column.null_count:
        raise ValueError(f"{column.null_count} of {len(column)} rows have no vector")
    chunks = [_matrix_of(chunk) for chunk in column.chunks if len(chunk)]
    if len({chunk.shape[1] for chunk in chunks}) > 1:
        raise ValueError("its vectors are of different lengths")
    return np.concatenate(chunks) if chunks else np.zeros((0, 0), np.float32)


def _matrix_of(chunk: Any) -> np.ndarray:
    flat = chunk.flatten().to_numpy(zero_copy_only=False)
    if not pyarrow.types.is_fixed_size_list(chunk.type):
        lengths = np.diff(np.asarray(chunk.offsets))
        if (lengths != lengths[0]).any():
            shortest, longest = lengths.min(), lengths.max()
            raise ValueError(f"its vectors have {shortest} to {longest} numbers, expected as many")
    return flat.reshape(len(chunk), -1).astype(np.float32, copy=False)
