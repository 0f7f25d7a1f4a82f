"""Vectors in cells of a CSV or TSV table, each a list in JSON."""

import numpy as np

from medsiglip_jax.data.tables import read_table
from medsiglip_jax.embeddings.elsewhere import found
from medsiglip_jax.files import places
from medsiglip_jax.files.documents import loads


def read(path: places.Place) -> found.Found:
    """The vectors and their names; see `formats`."""
    table = read_table(str(path))
    firsts = {name: table.columns[name][0].as_py() or "" for name in table.columns}
    lists = [name for name, cell in firsts.items() if cell.startswith("[")]
    name = found.pick_vectors(lists)
    others = [n for n in firsts if n not in lists]
    roles = (found.IDS, found.SOURCES, found.KINDS)
    picked = (found.pick(role, others, False) for role in roles)
    columns = {n: table.column(n) or [] for n in filter(None, picked)}
    table.raise_problems()
    cells = table.strings(name).to_pylist()
    rows = [vector(cell, table.where(n)) for n, cell in enumerate(cells)]
    return found.named(path, stacked(rows), columns)


def vector(cell: str, where: str) -> np.ndarray:
    """The numbers in a cell such as [0.1, 0.2]."""
    try:
        numbers = loads(cell)
    except ValueError:
        shortened = ", and numpy has shortened it" if "..." in cell else ""
        raise ValueError(
            f"{where}: {cell[:40]!r} is no list in JSON{shortened}; write json.dumps(list(vector))"
        ) from None
    return of_list(numbers, where)


def of_list(numbers: object, where: str) -> np.ndarray:
    """float32 of a list of numbers."""
    if not isinstance(numbers, list) or not numbers or {*map(type, numbers)} - {int, float}:
        raise ValueError(f"{where}: expected a list of numbers as the vector")
    try:
        return np.array(numbers, np.float64).astype(np.float32)
    except OverflowError:
        raise ValueError(f"{where}: a number is too large") from None


def stacked(rows: list[np.ndarray]) -> np.ndarray:
    """Vectors of one length as an array."""
    if len(lengths := {len(row) for row in rows}) > 1:
        raise ValueError(
            f"its vectors have {min(lengths)} to {max(lengths)} numbers, expected as many"
        )
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)
