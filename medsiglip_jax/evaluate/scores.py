"""scores.parquet: raw scores and labels; the rest is computed from them, without the model."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int64
from scipy import special

from medsiglip_jax import metrics
from medsiglip_jax.files import places, settings, storage
from medsiglip_jax.files.documents import loads, parse
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.json_text import dumps

FILE, IMAGES, GRID = "scores.parquet", "images.parquet", "grid"
PART = "part"  # column of images.parquet, where splits were drawn from the test images
_META, _LOG_ODDS = b"medsiglip_jax", "log_odds"


def schema(required: Mapping[str, pa.DataType], optional: Mapping[str, pa.DataType]) -> pa.Schema:
    """Columns that must not have nulls, then columns that may."""
    fields = [pa.field(name, kind, nullable=False) for name, kind in required.items()]
    return pa.schema([*fields, *optional.items()])


_SCHEMA = schema(
    {"id": pa.string(), "class": pa.string(), "score": pa.float64()},
    {"label": pa.int8(), "group": pa.string()},
)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of images for classes.

    Attributes:
        ids: the ids of the images.
        classes: names.
        scores: one row per image; NaN for a class that a probe could not learn.
        labels: 0, 1 and NaN (unknown).
        groups: patient of each image, or None.
        meta: how the scores were made, as JSON.
        log_odds: whether the scores are log odds of probabilities, which the file has, too.
    """

    ids: Sequence[str]
    classes: Sequence[str]
    scores: Float[np.ndarray, "n c"]
    labels: Float[np.ndarray, "n c"]
    groups: Sequence[str] | None
    meta: Mapping[str, Any]
    log_odds: bool = False

    @property
    def stated(self) -> Float[np.ndarray, "n c"]:
        """The scores; probabilities where these are log odds."""
        return special.expit(self.scores) if self.log_odds else self.scores

    @functools.cached_property
    def units(self) -> Int64[np.ndarray, " n"] | None:
        """Number of the patient of each image."""
        return None if self.groups is None else np.unique(self.groups, return_inverse=True)[1]

    @property
    def learned(self) -> Bool[np.ndarray, " c"]:
        """Which classes have scores: a probe has none of those that training lacks."""
        return np.all(~np.isnan(self.scores), axis=0)

    def select(self, rows: np.ndarray) -> "Scores":
        """The images of these numbers."""
        ids, groups = [self.ids[i] for i in rows], self.groups and [self.groups[i] for i in rows]
        values, labels = self.scores[rows], self.labels[rows]
        return replace(self, ids=ids, scores=values, labels=labels, groups=groups)


def in_order(scores: Scores, classes: Sequence[str]) -> Scores:
    """The same classes in this order."""
    order = [scores.classes.index(name) for name in classes]
    values, labels = scores.scores[:, order], scores.labels[:, order]
    return replace(scores, classes=classes, scores=values, labels=labels)


def known(scores: Scores, column: int) -> metrics.Known:
    """Scores and labels of one class; no rows if the class has no scores.

    Images without a label are left out.
    """
    values, labels = scores.scores[:, column], scores.labels[:, column]
    rows = slice(0 if np.isnan(values).any() else None)
    return metrics.known(values[rows], labels[rows])


def common(first: Scores, second: Scores, column: int) -> tuple[Any, Any, Any, Any]:
    """Scores of both, labels and units of one class; no rows if one of the two has no scores of it.

    Images without a label are left out. Units are None where patients are not known.
    """
    labels, units = first.labels[:, column], first.units
    a, b = first.scores[:, column], second.scores[:, column]
    rows = ~np.isnan(labels) & ~np.isnan([a, b]).any()
    return a[rows], b[rows], labels[rows], None if units is None else units[rows]


def write(path: places.Place, scores: Scores) -> None:
    """Writes one row per image and class: `id, class, score, label, group`.

    Log odds of the scores are a sixth column, `log_odds`, by which images are ranked.
    """
    n, count = scores.scores.shape
    labels, unknown = np.nan_to_num(scores.labels).astype(np.int8), np.isnan(scores.labels)
    groups = pa.nulls(n, pa.string()) if scores.groups is None else pa.array(scores.groups)
    each = np.repeat(np.arange(n), count)
    columns = [
        pa.array(scores.ids, pa.string()).take(pa.array(each)),
        pa.array(list(scores.classes) * n, pa.string()),
        pa.array(scores.stated.reshape(-1).astype(np.float64)),
        pa.array(labels.reshape(-1), mask=unknown.reshape(-1)),
        groups.take(pa.array(each)),
    ]
    meta = {_META: dumps({"classes": list(scores.classes), **scores.meta})}
    table = pa.table(columns, schema=_SCHEMA)
    if scores.log_odds:
        table = table.append_column(_LOG_ODDS, pa.array(scores.scores.reshape(-1)))
    save(path, table, meta)


def read(path: places.Place) -> Scores:
    """Reads what `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    with opened(path, "scores") as table:
        meta = _checked(parse((table.schema.metadata or {})[_META]))
        classes = meta.pop("classes")
        shape = (table.num_rows // len(classes), len(classes))
        labels = table["label"].cast(pa.float64()).to_numpy(zero_copy_only=False)
        log_odds = _LOG_ODDS in table.column_names
        values = table[_LOG_ODDS if log_odds else "score"].to_numpy().reshape(shape)
    firsts = table.take(pa.array(np.arange(shape[0]) * shape[1]))
    ids, groups = (firsts[name].to_pylist() for name in ("id", "group"))
    groups = None if not groups or groups[0] is None else groups
    return Scores(ids, classes, values, labels.reshape(shape), groups, meta, log_odds)


# What is noted of scores, and of which type it is.
_KINDS: dict[str, type] = {
    "classes": list, "cells": list, "run": str, "task": dict, "cell": dict, "counts": dict,
    "statistics": dict, "provenance": dict, "learned": dict, "leaks": list,
}  # fmt: skip


def _checked(meta: Any, needed: Sequence[str] = ("classes",)) -> dict[str, Any]:
    """The notes of a file, a ValueError if one is of another type than it was written with."""
    for name, kind in _KINDS.items():
        value = meta.get(name)
        if not isinstance(value, kind) and (value is not None or name in needed):
            shown = settings.shown(value)
            raise ValueError(f"{name} is {shown}; expected {kind.__name__}")
    for name in ("classes", "cells"):
        if not all(isinstance(item, str) for item in meta.get(name) or ()):
            raise ValueError(f"{name} is {settings.shown(meta[name])}; expected names")
    if "classes" in needed and not meta["classes"]:
        raise ValueError("classes is empty")
    return meta


def save(path: places.Place, table: pa.Table, metadata: Mapping[bytes, Any]) -> None:
    """Writes a table with metadata; what is there is replaced in one step."""
    with storage.new_file(path) as partial:
        pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd")


@contextlib.contextmanager
def opened(path: places.Place, what: str) -> Iterator[pa.Table]:
    """Opens a table that evaluate wrote; errors on reading its columns are those of the file, too.

    Args:
        path: of the file.
        what: it should hold, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the --output of evaluate")
    with explained(path, f"not {what} that evaluate wrote"):
        with path.open("rb") as file:
            table = pq.read_table(file)
        yield table


def write_columns(
    path: places.Place, columns: Mapping[str, Sequence[str]], meta: Mapping[str, Any] | None = None
) -> None:
    """Writes what is known of the images beside their labels, and the run they belong to."""
    table = pa.table({k: pa.array(v, pa.string()) for k, v in columns.items()})
    save(path, table, {_META: dumps(meta)})


def read_columns(path: places.Place) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Reads columns and `meta` of what `write_columns` wrote.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with opened(path, "columns of images") as table:
        meta = loads((table.schema.metadata or {}).get(_META, b"null"))
        return table.to_pydict(), _checked(meta or {}, ())


def of_pairs(folder: places.Place) -> bool:
    """Whether an evaluation is of pairs: these have no scores, and images.parquet has `meta`."""
    path = folder / IMAGES
    return path.is_file() and "task" in read_columns(path)[1]


def check_runs(folder: places.Place, run: str | None, others: Mapping[str, str | None]) -> None:
    """Refuses files that a killed run left beside those of another.

    Args:
        folder: of the files.
        run: of the scores, or of the images of pairs.
        others: name of a file -> its run.

    Raises:
        ValueError: which files are of another run.
    """
    if foreign := [name for name, other in others.items() if run is None or other != run]:
        raise ValueError(
            f"{folder}: {', '.join(foreign)} and {FILE} are of different runs; evaluate again"
        )
