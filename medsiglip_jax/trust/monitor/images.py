"""The images of an embedding run, with what tables say of them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from medsiglip_jax.data import tables
from medsiglip_jax.data.labels import label_columns
from medsiglip_jax.embeddings import joining
from medsiglip_jax.embeddings.elsewhere.formats import open_embeddings
from medsiglip_jax.embeddings.probe import features
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.files import places
from medsiglip_jax.inference.manifest import MANIFEST

UNKNOWN = "(unknown)"  # the category of images about which the table says nothing


@dataclass(frozen=True)
class Columns:
    """Which columns of the table of metadata mean what.

    Attributes:
        by: strata: each of their values is looked at by itself, and how often it occurs.
        compare: how often each of their values occurs.
        group: patients; default "patient" of the embeddings, if they have it.
        time: when the image was made.
        id: the ids of the embeddings; default "id", or the column of images.
    """

    by: tuple[str, ...] = ()
    compare: tuple[str, ...] = ()
    group: str | None = None
    time: str | None = None
    id: str | None = None

    @property
    def categories(self) -> tuple[str, ...]:
        """Those whose values are counted, each once."""
        return tuple(dict.fromkeys((*self.by, *self.compare)))

    @property
    def of_table(self) -> tuple[str, ...]:
        """Those that only a table can have."""
        return tuple(filter(None, (*self.categories, self.time)))


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels 0, 1 and NaN (unknown), a column for each class."""

    classes: tuple[str, ...]
    values: Float64[np.ndarray, "n c"]

    def take(self, rows: np.ndarray) -> "Labels":
        """Those of some of the images."""
        return Labels(self.classes, self.values[rows])


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a run.

    Attributes:
        vectors: their embeddings.
        groups: number of the patient of each.
        categories: column of the table -> the value of each image.
        times: when each was made, or empty.
        ids: their ids in the run.
        rows: their numbers in the run.
        labels: if they are known.
    """

    vectors: Float32[np.ndarray, "n d"]
    groups: Int64[np.ndarray, " n"]
    categories: Mapping[str, list[str]]
    times: list[str]
    ids: list[str]
    rows: Int64[np.ndarray, " n"]
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, rows: Int64[np.ndarray, " k"]) -> "Images":
        """Some of the images."""
        categories = {n: [c[i] for i in rows.tolist()] for n, c in self.categories.items()}
        times = [self.times[i] for i in rows.tolist()] if self.times else []
        ids = [self.ids[i] for i in rows.tolist()]
        labels = self.labels.take(rows) if self.labels else None
        return Images(
            self.vectors[rows], self.groups[rows], categories, times, ids, self.rows[rows], labels
        )


@dataclass(frozen=True)
class Given:
    """Tables that belong to a run.

    Attributes:
        metadata: table with the columns, or None.
        columns: what its columns mean.
        labels: table of labels, or None.
        label: its columns; default as for `probe fit`.
        classes: names and order of the classes, if that is one column of class names.
        label_separator: see `examples.read`.
    """

    metadata: places.Given | None = None
    columns: Columns = field(default_factory=Columns)
    labels: places.Given | None = None
    label: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    label_separator: str | None = None

    def __post_init__(self):
        if self.columns.of_table and self.metadata is None:
            named = ", ".join(self.columns.of_table)
            raise ValueError(f"the columns {named} need a table that has them (--metadata TABLE)")


def from_arrays(
    vectors: Float32[np.ndarray, "n d"], groups: Int64[np.ndarray, " n"] | None = None
) -> Images:
    """Images of which only the embeddings are known, and maybe the patients."""
    rows = np.arange(len(vectors))
    own = rows if groups is None else groups
    return Images(vectors, own, {}, [], list(map(str, rows)), rows)


def open_run(folder: places.Given, on_rows: Any = int) -> Embeddings:
    """The embedding run in a folder, or that of the test images of an evaluation there."""
    place = places.at(folder)
    if not (place / MANIFEST).is_file() and (place / "embeddings").is_dir():
        inside = sorted(places.visible(place / "embeddings"))
        runs = [n for n in inside if not n.endswith(("-train", "-validation"))]
        if len(runs) != 1:
            raise ValueError(
                f"{folder}: an evaluation with {len(runs)} embedding runs of its test images; name "
                f"one of {', '.join(str(place / 'embeddings' / n) for n in inside) or 'them'}"
            )
        place = place / "embeddings" / runs[0]
    return open_embeddings(place, "image", on_rows)


def read(embeddings: Embeddings, given: Given, most: int | None = None, seed: int = 0) -> Images:
    """Reads the images of a run.

    Args:
        embeddings: the run, of kind image.
        given: tables about the images, joined by id, source or the end of a path.
        most: take at most so many images, of patients drawn at random; None takes all.
        seed: the seed of that draw.

    Raises:
        ValueError: there are none, tables do not fit, or vectors have no direction.
    """
    named = enumerate(embeddings.names(range(len(embeddings))))
    pairs = [(n, row["id"]) for n, row in named if row["kind"] == "image"]
    if not pairs:
        raise ValueError(f"{embeddings.folder}: no rows of kind image")
    rows, ids = np.array([n for n, _ in pairs]), [id for _, id in pairs]
    cells = _cells(embeddings, rows, given)
    groups = _groups(embeddings, rows, given.columns.group, cells)
    labels = _labels(embeddings, rows, given)
    kept = np.arange(len(rows)) if most is None else _drawn(groups, most, seed)
    categories = {name: cells[name] for name in given.columns.categories}
    times = cells[given.columns.time] if given.columns.time else []
    if missing := [id for id, time in zip(ids, times, strict=False) if time == UNKNOWN]:
        raise ValueError(
            f"{given.metadata}: has no {given.columns.time} of {len(missing):,} of {len(ids):,} "
            f"images, the first {missing[0]!r}; expected one of each, or --window N without --time"
        )
    everything = Images(
        np.zeros((len(rows), 0), np.float32), groups, categories, times, ids, rows, labels
    )
    images = everything.take(kept)
    vectors = embeddings.gather(images.rows).astype(np.float32, copy=False)
    return Images(
        vectors, images.groups, images.categories, images.times, images.ids, images.rows,
        images.labels,
    )  # fmt: skip


def _drawn(groups: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Rows of whole patients, at most so many, ascending.

    A patient who does not fit any more is passed over, not all that come after: one with more
    images than are wanted would leave a reference of few or none.
    """
    if len(groups) <= most:
        return np.arange(len(groups))
    patients, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    chosen, left = np.zeros(len(patients), bool), most
    for patient in np.random.default_rng(seed).permutation(len(patients)).tolist():
        if sizes[patient] <= left:
            chosen[patient], left = True, left - sizes[patient]
    return np.flatnonzero(chosen[codes])


def _cells(embeddings: Embeddings, rows: np.ndarray, given: Given) -> dict[str, list[str]]:
    """The cells of the columns that are asked for, of each of the rows."""
    if given.metadata is None:
        return {}
    table = tables.read_table(str(given.metadata))
    own = given.columns
    key, table = (own.id, table) if own.id else features.with_ids(table)
    names = [n for n in (*own.of_table, own.group) if n and (n != own.group or table.has(n, (n,)))]
    columns = {name: table.column(name, blank=True) for name in (key, *names)}
    table.raise_problems()
    _check_once(str(given.metadata), columns, key)
    where = _places(columns[key] or (), embeddings, rows, table.root).tolist()
    if not any(n >= 0 for n in where):
        first = embeddings.ids(rows[:1].tolist())[0]["id"]
        raise ValueError(
            f"{given.metadata}: none of {len(rows):,} images is in column {key!r}; the ids of the "
            f"embeddings are like {first!r} (--id-column COL)"
        )
    return {
        name: [(column[n] if n >= 0 else "") or UNKNOWN for n in where]
        for name, column in columns.items()
        if name != key and column is not None
    }


def _places(
    names: Sequence[str], embeddings: Embeddings, rows: np.ndarray, root: str = ""
) -> Int64[np.ndarray, " n"]:
    """Where in a table each of the rows of a run is, -1 if nowhere; see `joining.join`."""
    joined = joining.join(list(dict.fromkeys(filter(None, names))), embeddings, root)
    last = {name: place for place, name in enumerate(names)}
    pairs = zip(dict.fromkeys(filter(None, names)), joined.rows, strict=True)
    place_of = {row: last[name] for name, row in pairs if row >= 0}
    return np.array([place_of.get(row, -1) for row in rows.tolist()], np.int64)


def _check_once(path: str, columns: Mapping[str, list[str] | None], key: str) -> None:
    """Raises ValueError if rows of the same id differ; of equal ones any will do."""
    cells: dict[str, tuple] = {}
    named = [column for column in columns.values() if column is not None]
    for id, *row in zip(columns[key] or (), *named, strict=True):
        if id and cells.setdefault(id, tuple(row)) != tuple(row):
            others = ", ".join(name for name in columns if name != key)
            raise ValueError(
                f"{path}: rows of {key} {id!r} differ in {others}; expected one row for each image"
            )


def _groups(
    embeddings: Embeddings, rows: np.ndarray, group: str | None, cells: Mapping[str, list[str]]
) -> Int64[np.ndarray, " n"]:
    """The number of the patient of each row; rows without one are patients of their own."""
    in_run = embeddings.manifest.identifiers is not None
    if group is not None and group in cells:
        names: Sequence[str | None] = [c if c != UNKNOWN else None for c in cells[group]]
    elif in_run and group in (None, "patient", "study", "series"):
        column = group or "patient"
        names = [row[column] for row in embeddings.ids(rows.tolist(), (column,))]
    elif group is None:
        return np.arange(len(rows))
    else:
        raise ValueError(f"no column {group!r} in --metadata or in {embeddings.folder}")
    alone = (f"row {n}" for n in itertools.count())
    keys = [f"patient {name}" if name else next(alone) for name in names]
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _labels(embeddings: Embeddings, rows: np.ndarray, given: Given) -> Labels | None:
    """Labels of the rows; those of other images are ignored, as a table may be of a longer time."""
    if given.labels is None:
        return None
    table = features.read_labels(
        given.labels, given.label, given.columns.id, given.classes, given.label_separator
    )
    assert table.labels is not None
    where = _places(table.names, embeddings, rows)
    if (where < 0).all():
        first = embeddings.ids(rows[:1].tolist())[0]["id"]
        raise ValueError(
            f"{given.labels}: has labels of none of {len(rows):,} images; their ids are like "
            f"{first!r} (--id-column COL)"
        )
    values = label_columns(table.labels, len(table.classes))[where]
    values[where < 0] = np.nan
    return Labels(tuple(table.classes), values)
