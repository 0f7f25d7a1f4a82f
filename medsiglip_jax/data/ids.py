"""The ids of rows: unique among all inputs, and without the credentials of addresses.

`prefix + id` is the full id of a row, which is used where two inputs give the same id.
"""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medsiglip_jax.data.columns import joined
from medsiglip_jax.data.rows import REASON, Rows, seen_before, without_credentials
from medsiglip_jax.preprocess.facts import describe


def with_public_ids(table: pa.Table) -> pa.Table:
    """Rows whose ids show no credentials of addresses (see `public_ids`).

    Args:
        table: with `id` and `prefix`.
    """
    prefix = table["prefix"].cast(pa.large_string())
    ids, shown = public_ids(joined(prefix, table["id"])), without_credentials(prefix)
    if ids is None:
        return table
    pairs = zip(ids.to_pylist(), shown.to_pylist(), strict=True)
    cut = pa.array((id.removeprefix(prefix) for id, prefix in pairs), pa.large_string())
    place, field = table.schema.get_field_index("prefix"), table.field("prefix")
    table = table.set_column(place, field, shown.cast(pa.string()).dictionary_encode())
    return table.set_column(0, "id", cut)


def public_ids(ids: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Ids without the credentials of addresses; None if they have none.

    Where several would then be equal, as those of a server that names its images in queries, 12
    digits of a hash of the query tell them apart.
    """
    shown = without_credentials(ids)
    if shown.equals(ids):
        return None
    count = Counter(shown.to_pylist())
    pairs = zip(ids.to_pylist(), shown.to_pylist(), strict=True)
    made = (_hashed(id, name) if id != name and count[name] > 1 else name for id, name in pairs)
    return pa.chunked_array([pa.array(made, pa.large_string())])


def _hashed(id: str, name: str) -> str:
    query = id.partition("?")[2]
    return f"{name}~{hashlib.sha256(query.encode()).hexdigest()[:12]}" if query else name


def with_unique_ids(table: pa.Table) -> pa.Table:
    """Rows whose ids are those of the table, or where two are equal, all with their prefixes.

    Raises:
        ValueError: two are equal even then.
    """
    if not len(_repeated(table)):
        return table
    prefix = table["prefix"].cast(pa.large_string())
    table = table.set_column(0, "id", joined(prefix, table["id"]))
    if len(repeated := _repeated(table)):
        row = Rows(table)[int(repeated[0])]
        raise ValueError(
            f"{row.id} is given twice, the second time as {describe(row.source)} "
            f"({len(repeated)} such rows);"
            " name each input once, and use each id in one table"
        )
    return table


def _repeated(table: pa.Table) -> np.ndarray:
    """Numbers of the rows whose id an earlier row of their kind has; unreadable ones need none."""
    good = np.ones(len(table), bool)
    if REASON.name in table.column_names:
        good = pc.is_null(table[REASON.name]).to_numpy()
    rows = np.flatnonzero(good)
    return rows[seen_before(kept(table["kind"], good), kept(table["id"], good))]


def kept(column: Any, mask: np.ndarray) -> Any:
    """The cells of a column where the mask is true."""
    return column if mask.all() else column.filter(pa.array(mask))
