"""Embeddings joined with labels by id, and split for a probe."""

import itertools
import warnings
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from medsiglip_jax.data import examples, tables
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.ids import public_ids
from medsiglip_jax.data.labels import is_finding
from medsiglip_jax.embeddings import joining, provenance, store
from medsiglip_jax.embeddings.joining import Joined
from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.files import places
from medsiglip_jax.inference import pseudonyms
from medsiglip_jax.inference.manifest import UNKNOWN
from medsiglip_jax.preprocess.names import Frame, Tile, parse

# Names of the split on which choices are made; the first that exists is used.
VALIDATION = ("val", "valid", "validation", "dev")


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors with their labels.

    Attributes:
        vectors: one for each row of `examples`.
        examples: ids, labels, classes, groups and splits, without images.
        provenance: how the vectors were made.
        joined: how labels and embeddings were joined, and what was not.
    """

    vectors: Float[np.ndarray, "n d"]
    examples: Examples
    provenance: Provenance
    joined: Joined | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def missing(self) -> int:
        """Number of rows left out because they have no embedding."""
        return len(self.joined.missing) if self.joined else 0

    @property
    def labels(self) -> np.ndarray:
        """The labels, of which there must be some."""
        if self.examples.labels is None:
            raise ValueError("these rows have no labels; name their columns (--label COLUMN)")
        return self.examples.labels

    def select(self, rows: Examples) -> "Features":
        """The features of some of its rows, which are found by their ids."""
        index = {id: i for i, id in enumerate(self.examples.names)}
        return replace(self, vectors=self.vectors[[index[id] for id in rows.names]], examples=rows)


class Splits(NamedTuple):
    """What to learn from, what to choose by and, if there is a test split, what to judge by."""

    train: Features
    validation: Features
    test: Features | None


def read(
    data: places.Given,
    embeddings: store.Embeddings,
    *,
    label: str | Sequence[str] = (),
    group: str | None = None,
    split: str | None = None,
    id: str | None = None,
    uncertain: str | Mapping[str, str] = "ignore",
    label_separator: str | None = None,
    all_files: bool = False,
) -> Features:
    """Joins labels with the embeddings of the same ids, sources or names; see `joining.join`.

    Args:
        data: a table (.csv, .tsv, .parquet, .jsonl), or the folder of class folders that was
            embedded.
        embeddings: what `embed` wrote; rows without a label are ignored.
        label: one column of class names; or columns of 0, 1 and so on (`data.labels`), a finding
            each (also a single one, if it holds nothing else). Default: what the format has, or
            "label".
        group: column of patients, cases or studies; default "group", if it exists. If the table has
            no such column, `patient`, `study` and `series` are taken from the embeddings, if those
            were made with such columns; rows without one are grouped by file, with a warning.
        split: column of split names; default "split", if it exists.
        id: column of ids or paths; default "id" or, where that does not exist or has no id of an
            embedding, the column of images: `embed` names an image of a table without ids by its
            path as it stands there, and a picture in a table by the path that is recorded with it,
            or else by file and row.
        uncertain, label_separator, all_files: see `examples.read`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: what is wrong with the table; or more labels have no embedding than there are
            images that embed could not read; or a label fits two images; or no embedding has the
            group.
    """
    table = tables.read_table(str(data), all_files)
    label = (label,) if isinstance(label, str) else label
    images = None if id or "id" not in table.columns else table.find("image", "image")
    key, table = (id, table) if id else with_ids(table)
    in_run = group in pseudonyms.COLUMNS and embeddings.manifest.identifiers is not None
    of_run = group if in_run and group not in table.columns else None
    for name in (None if of_run else group, split):
        if name is not None:  # "" is a mistake: an unset variable of a shell
            table.has(name)
    rows = examples.read(
        table, image=None, id=key, text=None, label=_label(table, label),
        group=None if of_run else group or "group", split=split or "split", uncertain=uncertain,
        label_separator=label_separator,
    )  # fmt: skip
    joined = joining.join(rows.names, embeddings, table.root)
    if not joined.by and images is not None and not table.holds_pictures(images):
        rows = replace(rows, ids=table.column(images))
        table.raise_problems()
        joined = joining.join(rows.names, embeddings, table.root)
    return join(rows, embeddings, joined, of_run)


def read_labels(
    data: places.Given,
    label: str | Sequence[str] = (),
    id: str | None = None,
    classes: Sequence[str] | None = None,
    label_separator: str | None = None,
) -> Examples:
    """The ids and labels of a table, without embeddings.

    Args:
        data, label, id, label_separator: as for `read`.
        classes: names and order of the classes, if the label is one column of class names; default
            those that occur.
    """
    table = tables.read_table(str(data))
    key, table = (id, table) if id else with_ids(table)
    column = _label(table, (label,) if isinstance(label, str) else label)
    return examples.read(
        table, image=None, id=key, text=None, label=column, group=None, split=None,
        classes=classes if isinstance(column, str) else None, label_separator=label_separator,
    )  # fmt: skip


def with_ids(table: tables.Table) -> tuple[str, tables.Table]:
    """The column of ids that `embed` would take, and the table with it."""
    if "id" in table.columns or (image := table.find("image", "image")) is None:
        return ("id" if "id" in table.columns else "image"), table
    if table.holds_pictures(image):
        ids, _ = table.default_ids(table.images(image))
    elif (ids := public_ids(table.strings(image))) is None:
        return image, table
    columns: Any = table.columns  # read as they are asked for
    return "id", replace(table, columns=ChainMap({"id": ids}, columns))


def _label(table: tables.Table, names: Sequence[str]) -> str | Sequence[str] | None:
    if not names:
        return table.label or "label"
    if len(names) == 1 and not is_finding(table.lists(names[0]) or [""]):
        return names[0]
    return tuple(names)


def join(
    rows: Examples, embeddings: store.Embeddings, joined: Joined, group: str | None = None
) -> Features:
    """The vectors of rows with ids; see `read` for rows without an embedding.

    Args:
        rows: with labels.
        embeddings: with vectors.
        joined: which vector belongs to which row.
        group: column of the embeddings to take the groups from.
    """
    unreadable = embeddings.manifest.errors
    known = embeddings.manifest.preprocess != UNKNOWN  # of others nobody knows what was unreadable
    if not joined.by or (known and len(joined.missing) > unreadable):
        raise ValueError(
            f"{len(joined.missing)} of {len(rows)} labels have no embedding in "
            f"{embeddings.folder}, the first {joined.missing[0]!r}; {unreadable} of its inputs "
            f"could not be read, and {_others(embeddings, joined)}. Labels are joined by id, by "
            "source or by the end of a path (--id-column COL)"
        )
    present = [i for i, row in enumerate(joined.rows) if row >= 0]
    kept, wanted = rows.select(present), np.array([joined.rows[i] for i in present])
    if group is not None:
        kept = replace(kept, groups=_groups(embeddings, wanted.tolist(), group))
    vectors, made = embeddings.gather(wanted), provenance.of_run(embeddings.manifest)
    return Features(vectors, kept, made, joined)


def _others(embeddings: store.Embeddings, joined: Joined) -> str:
    """What the embeddings without a label are like."""
    count, first = joined.others
    if not count:
        return "all embeddings have a label"
    row = next(r for r in embeddings.names(range(len(embeddings))) if r["id"] == first)
    source = f" of {row['source']!r}" if row["source"] != first else ""
    return f"{count} embeddings have no label, the first {first!r}{source}"


def _groups(embeddings: store.Embeddings, rows: Sequence[int], column: str) -> list[str]:
    """The group of each row; rows without one are grouped by file, as tiles of one slide are."""
    cells = embeddings.ids(rows, ["source", column])
    lacking = sum(not cell[column] for cell in cells)
    if lacking == len(cells):
        raise ValueError(
            f"{embeddings.folder}: none of {lacking} rows has a {column}, as slides and NIfTI "
            "volumes have none; put a column of groups into the table of labels"
        )
    if lacking:
        warnings.warn(
            f"{lacking} of {len(cells)} rows have no {column} and are grouped by file", stacklevel=2
        )
    return [cell[column] or f"file {_file(cell['source'])}" for cell in cells]


def _file(source: str) -> str:
    file, part = parse(source)
    return file if isinstance(part, (Frame, Tile)) else source


def split(features: Features, validation: float = 0.2, seed: int = 0) -> Splits:
    """Splits by the split column or, where it does not say, draws whole groups at random.

    Args:
        features: rows of the splits "train", "test" and one of `VALIDATION`. Without a validation
            split, a share of the training rows is held out; without any splits, of all rows.
        validation: that share.
        seed: of that draw.

    Raises:
        ValueError: a group or an id lies in two splits, or a split would be empty.
    """
    rows = features.examples
    names = set(rows.splits or ())
    train = rows.of_split("train") if names else rows
    if held_out := [name for name in VALIDATION if name in names]:
        chosen = rows.of_split(held_out[0])
    else:
        train, chosen = examples.split_by_group(train, validation, seed)
    test = rows.of_split("test") if "test" in names else None
    if rows.splits is not None:
        used = ("train", "test", *held_out[:1])
        examples.warn_of_unused_splits(rows.splits, used, "labels with embeddings")
    for left, right in itertools.combinations(filter(None, (train, chosen, test)), 2):
        examples.check_disjoint(left, right)
    return Splits(
        features.select(train), features.select(chosen), features.select(test) if test else None
    )
