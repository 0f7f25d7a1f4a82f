"""Tables for people to read on: .csv or .parquet, by the name of the file."""

import csv
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pyarrow import ArrowException
from pyarrow import parquet as pq

from medsiglip_jax.data import spreadsheets
from medsiglip_jax.data.tables import write_parquet
from medsiglip_jax.files import places, storage

SUFFIXES = (".csv", ".parquet")


def write(path: places.Given, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Writes columns of equal length under their names, whole or not at all.

    In .csv texts are no formulas to a spreadsheet: see `data.spreadsheets`.
    """
    if places.check_suffix(path, *SUFFIXES) == ".parquet":
        return write_parquet(str(path), columns, None, None)
    lists = [x.tolist() if isinstance(x, np.ndarray) else x for x in columns.values()]
    with storage.new_file(places.at(path)) as partial:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(spreadsheets.protect(columns))
            writer.writerows(map(spreadsheets.protect, zip(*lists, strict=True)))


def column_names(path: places.Given) -> list[str]:
    """The columns of a table, .csv or .parquet; none of a file that is no table."""
    try:
        if str(path).lower().endswith(".parquet"):
            return pq.read_schema(str(path)).names
        with open(str(path), newline="", encoding="utf-8") as file:
            return spreadsheets.unprotect(next(csv.reader(file), []))
    except (ArrowException, OSError, UnicodeDecodeError, csv.Error):
        return []
