"""What to train or evaluate on, as columns, from tables, class folders, tar and TFRecord shards."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from medsiglip_jax.data import label_columns
from medsiglip_jax.data.labels import Policy
from medsiglip_jax.data.table import Table
from medsiglip_jax.data.tables import read_table, write_parquet
from medsiglip_jax.preprocess.facts import too_long


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows to learn from or to be scored on; every column that is present has one entry per row.

    Attributes:
        images: local path or URI; "path#offset:length" is a range of bytes of a file, such as an
            image inside a TFRecord shard. Empty if only `ids` are wanted.
        texts: captions.
        labels: int32 [n] class index, -1 unknown; or float32 [n, C] of 0, 1 and NaN (unknown).
        classes: names of the classes, in the order of `labels`.
        groups: patient, case or study; a group never lies on both sides of a split.
        splits: name of the split of every row.
        positives: int32 [n]; rows with equal ids >= 0 are positive pairs of each other.
        ids: by which rows are joined with embeddings.
    """

    images: Sequence[str] = ()
    texts: Sequence[str] | None = None
    labels: Int32[np.ndarray, " n"] | Float32[np.ndarray, "n c"] | None = None
    classes: tuple[str, ...] = ()
    groups: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    positives: Int32[np.ndarray, " n"] | None = None
    ids: Sequence[str] | None = None

    def __post_init__(self):
        unit = "images" if self.ids is None else "ids"
        for name in _COLUMNS:
            column = getattr(self, name)
            if column is None or (name == "images" and not len(column)):
                continue
            if len(column) != len(self):
                raise ValueError(
                    f"{name} has {len(column)} entries for {len(self)} {unit}, expected as many"
                )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names(self) -> Sequence[str]:
        """What the rows are called: their ids or, if they have none, their images."""
        return self.images if self.ids is None else self.ids

    def select(self, indices: Iterable[int] | np.ndarray) -> "Examples":
        """The rows at `indices`, in that order."""
        indices = np.fromiter(indices, np.int64)
        columns = {name: _take(getattr(self, name), indices) for name in _COLUMNS}
        return replace(self, **columns)

    def of_split(self, name: str) -> "Examples":
        """The rows of one split.

        Raises:
            ValueError: there are no splits, or none of that name.
        """
        rows = [i for i, split in enumerate(self.splits or ()) if split == name]
        if not rows:
            known = ", ".join(map(repr, sorted(set(self.splits or ())))) or "no splits at all"
            raise ValueError(f"no examples of split {name!r}; there are {known}")
        return self.select(rows)


_COLUMNS = ("images", "texts", "labels", "groups", "splits", "positives", "ids")


def _take(column: Any, indices: np.ndarray) -> Any:
    if column is None or not len(column):
        return column
    return column[indices] if isinstance(column, np.ndarray) else [column[i] for i in indices]


def read(
    path: str | os.PathLike | Table,
    *,
    root: str | os.PathLike | None = None,
    image: str | None = "image",
    text: str | None = "text",
    label: str | Sequence[str] | None = None,
    split: str | None = "split",
    group: str | None = "group",
    captions: str | Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    positives: str | None = None,
    id: str | None = None,
    uncertain: str | Mapping[str, str] = "ignore",
    label_separator: str | None = None,
    all_files: bool = False,
) -> Examples:
    """Reads a table, a folder of class folders, or TFRecord shards with their index.

    Args:
        path: .csv, .tsv, .parquet or .jsonl, local or a URI; a folder of class folders, or of
            split folders (`tables.SPLITS`) that hold them; a folder or glob of .tfrecord shards, or
            of WebDataset's .tar, as a single one, too, with captions in .txt or .json (the column
            "text") and classes in .cls (the column "label"); or what `read_table` made of one.
        root: what relative image paths are relative to; default the folder of the table.
        image: column of image paths, or in Parquet of pictures; None if only ids are wanted. Under
            its default name it is also known by other names (`roles`).
        text: column of captions, also known by other names where there are no labels. This column,
            `split` and `group` may be absent under their default names; None ignores them.
        label: column of class names (an empty cell is -1), or several columns, or one in a tuple,
            of findings: 0, 1 and so on (`data.labels`). One column of nothing else, with -1 among
            it, is a finding, too, unless `classes` are given. Class folders need no `label`.
        split: column of split names.
        group: column of patients, cases or studies.
        captions: where there is no text column, how to make texts of the label: a template such as
            "a photo of {label}", or class -> caption.
        classes: names and order of the classes; default sorted (as numbers if all are numbers).
        positives: which rows are positive pairs of each other: "text" (equal captions), "label", or
            a column whose equal entries are.
        id: column of ids.
        uncertain: what -1 is in a finding: "ignore" (like an empty cell, with a warning),
            "positive" or "negative", for all or by finding; see `labels.Policy`.
        label_separator: what stands between the classes in a cell of one column of labels, such as
            "|"; "none" if each cell is one class. Lists need none; see `label_lists.read`.
        all_files: know images in class folders by their content, whatever their suffix.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: all that is wrong with it, in one message: file, column, line, how many.
    """
    table = path if isinstance(path, Table) else read_table(os.fspath(path), all_files)
    optional = ("text", "split", "group")
    label, classes = label or table.label, tuple(classes or table.classes or ())
    base = os.fspath(root or table.root)
    images, ids = _images(table, image, base), table.column(id)
    if text == "text" and label is None and captions is None:  # then texts are what is learned from
        text = table.find("text", text)
    texts = table.column(text, optional)
    if long := [row for row, cell in enumerate(texts or ()) if too_long(cell)]:
        table.report(text, [""] * len(table.lines), long, str(too_long((texts or [])[long[0]])))
    groups, splits = table.column(group, optional), table.column(split, optional)
    labels = None
    if label is not None:
        policy = Policy(uncertain)
        are_classes = captions is not None  # which are made of the names of the classes
        labels, classes = label_columns.read(
            table, label, classes, policy, label_separator, are_classes
        )
    if captions is not None and texts is None:
        texts = _captions(table, label if isinstance(label, str) else None, captions, classes)
    pairs = _positive_ids(table, positives, texts, labels)
    table.raise_problems()
    return Examples(images, texts, labels, classes, groups, splits, pairs, ids)


def _images(table: Table, name: str | None, root: str) -> list[str]:
    """The sources of the images; a row without one is a problem."""
    if name is None:
        return []
    before, column = len(table.problems), table.find("image", name)
    if column is None:
        if len(table.problems) == before:
            table.has(name)
        return []
    images = table.images(column)
    if len(table.problems) > before:
        return []
    missing = np.flatnonzero(~images.given).tolist()
    table.report(column, [""] * len(table.lines), missing, "no value")
    return images.sources(f"{root.rstrip('/')}/").to_pylist()


def _captions(
    table: Table, label: str | None, captions: str | Mapping[str, str], classes: tuple[str, ...]
) -> list[str] | None:
    if label is None:
        table.problems.append("captions need label= with one column of classes")
        return None
    if isinstance(captions, str) and "{label}" not in captions:
        table.problems.append(f"captions is {captions!r}, expected a template with {{label}}")
    captions = class_captions(captions, classes)
    if missing := [name for name in classes if name not in captions]:
        table.problems.append(f"captions has none for the classes {', '.join(missing)}")
    names = table.column(label) or ()
    return [captions.get(name, "") for name in names]


def class_captions(captions: str | Mapping[str, str], classes: Sequence[str]) -> Mapping[str, str]:
    """class -> caption, from a template with {label} or such a mapping itself."""
    if isinstance(captions, str):
        return {name: captions.replace("{label}", name) for name in classes}
    return captions


def with_own_ids(examples: Examples) -> Examples:
    """Gives rows without an id in `positives` one of their own.

    A row that is in a batch twice, as at the border of two epochs, is then no negative of itself.
    """
    n = len(examples)
    ids = np.full(n, -1, np.int32) if examples.positives is None else examples.positives
    own = np.arange(n, dtype=np.int32) + ids.max(initial=-1) + 1
    return replace(examples, positives=np.where(ids < 0, own, ids))


def _positive_ids(
    table: Table, positives: str | None, texts: Sequence[str] | None, labels: np.ndarray | None
) -> np.ndarray | None:
    if positives == "label":
        if labels is None or labels.ndim != 1:
            table.problems.append("positives='label' needs label= with one column of classes")
        return labels
    if positives == "text" and texts is None:
        table.problems.append("positives='text' needs a text column, or captions")
    values = texts if positives == "text" else table.column(positives, blank=True)
    if values is None:
        return None
    index = {value: i for i, value in enumerate(sorted(set(values) - {""}))} | {"": -1}
    return np.array([index[value] for value in values], np.int32)


def write(examples: Examples, path: str | os.PathLike) -> None:
    """Writes a Parquet table from which `read` makes the same examples again.

    Images below the folder of the table become relative to it, so that both can be moved together.
    `read` knows label and classes without being told; `positives` is a column of that name.

    Raises:
        ValueError: a class has the name of another column.
    """
    folder, ids = os.path.dirname(os.path.abspath(path)), examples.positives
    columns: dict[str, Any] = {
        "image": [_relative(image, folder) for image in examples.images],
        "text": examples.texts,
        "group": examples.groups,
        "split": examples.splits,
        "positives": None if ids is None else [i if i >= 0 else None for i in ids.tolist()],
    }
    columns = {name: column for name, column in columns.items() if column is not None}
    label, labels = _label_columns(examples)
    if taken := columns.keys() & labels:
        raise ValueError(f"classes may not be named like other columns: {', '.join(sorted(taken))}")
    write_parquet(path, columns | labels, label, examples.classes or None)


def _label_columns(examples: Examples) -> tuple[str | list[str] | None, dict[str, Any]]:
    """Name, or names, of what holds the labels, and those columns."""
    labels, classes = examples.labels, examples.classes
    if labels is None:
        return None, {}
    if labels.ndim == 1:
        names = classes or range(int(labels.max()) + 1)
        return "label", {"label": [str(names[i]) if i >= 0 else None for i in labels.tolist()]}
    names = list(classes or (f"class {i}" for i in range(labels.shape[1])))
    return names, dict(zip(names, labels.T, strict=True))


def _relative(path: str, folder: str) -> str:
    return path if "://" in path else os.path.abspath(path).removeprefix(f"{folder}/")


def split_by_group(examples: Examples, fraction: float, seed: int = 0) -> tuple[Examples, Examples]:
    """Splits whole groups (without groups: whole images) into training and held-out rows.

    The side of a group depends on its name and the seed and hardly on the other rows: when more
    patients are added later, nearly all stay where they were. Rows keep their order.

    Args:
        examples: what to split.
        fraction: share of the rows to hold out, in (0, 1); met as closely as whole groups allow.
        seed: of the draw.

    Returns:
        (train, held_out), neither empty.

    Raises:
        ValueError: `fraction` is out of range, or there are fewer than two groups.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected more than 0 and less than 1")
    names = examples.names if examples.groups is None else examples.groups
    sizes = Counter(names)
    if len(sizes) < 2:
        raise ValueError(f"all {len(examples)} rows are of one group; a split needs two groups")
    ranked = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    reached = np.cumsum([sizes[name] for name in ranked[:-1]])
    count = int(np.argmin(np.abs(reached - fraction * len(examples)))) + 1
    held_out = set(ranked[:count])
    inside = np.array([name in held_out for name in names])
    return examples.select(np.flatnonzero(~inside)), examples.select(np.flatnonzero(inside))


def warn_of_unused_splits(names: Sequence[str], used: Iterable[str], where: str) -> None:
    """Warns of rows whose split is none of those that are used.

    Args:
        names: the split of every row.
        used: names of splits.
        where: what the rows are of, for the message.
    """
    if unused := Counter(names) - Counter({name: len(names) for name in used}):
        counts = ", ".join(f"{name!r} {count:,}" for name, count in sorted(unused.items()))
        warnings.warn(f"{where}: rows of these splits are not used: {counts}", stacklevel=3)


def check_disjoint(train: Examples, held_out: Examples) -> None:
    """Refuses a split in which a group, an image or an id lies on both sides.

    Raises:
        ValueError: how many do, and the first few.
    """
    unit = "images" if train.ids is None else "ids"
    pairs = [(unit, train.names, held_out.names)]
    if train.groups is not None and held_out.groups is not None:
        pairs.insert(0, ("groups", train.groups, held_out.groups))
    for unit, left, right in pairs:
        if both := sorted(set(left) & set(right)):
            raise ValueError(
                f"{len(both)} {unit} are in both the training and the held-out examples: "
                f"{', '.join(both[:5])}{', …' if len(both) > 5 else ''}; split by group"
            )
