"""What to train or evaluate on, as columns: manifests, class folders, TFRecord shards."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from medsiglip_jax.data.tables import Table, read_table, write_parquet


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows to learn from or to be scored on; every column that is there has one entry per row.

    Attributes:
        images: local path or URI; "path#offset:length" is that range of bytes of a file, an image
            inside a TFRecord shard.
        texts: captions.
        labels: int32 [n] class index, -1 unknown; or float32 [n, C] of 0, 1 and NaN (unknown).
        classes: names of the classes, in the order of `labels`.
        groups: patient, case or study; a group never lies on both sides of a split.
        splits: name of the split of every row.
        positives: int32 [n]; rows with equal ids >= 0 are positive pairs of each other.
    """

    images: Sequence[str]
    texts: Sequence[str] | None = None
    labels: Int32[np.ndarray, " n"] | Float32[np.ndarray, "n c"] | None = None
    classes: tuple[str, ...] = ()
    groups: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    positives: Int32[np.ndarray, " n"] | None = None

    def __post_init__(self):
        for name in _COLUMNS:
            column = getattr(self, name)
            if column is not None and len(column) != len(self.images):
                raise ValueError(
                    f"{name} has {len(column)} entries for {len(self.images)} images, "
                    "expected one per image"
                )

    def __len__(self) -> int:
        return len(self.images)

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
        found = [i for i, split in enumerate(self.splits or ()) if split == name]
        if not found:
            there = ", ".join(map(repr, sorted(set(self.splits or ())))) or "no splits at all"
            raise ValueError(f"no examples of split {name!r}; there are {there}")
        return self.select(found)


_COLUMNS = ("images", "texts", "labels", "groups", "splits", "positives")


def _take(column: Any, indices: np.ndarray) -> Any:
    if column is None or isinstance(column, np.ndarray):
        return None if column is None else column[indices]
    return [column[i] for i in indices]


def read(
    path: str | os.PathLike | Table,
    *,
    root: str | os.PathLike | None = None,
    image: str = "image",
    text: str | None = "text",
    label: str | Sequence[str] | None = None,
    split: str | None = "split",
    group: str | None = "group",
    captions: str | Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    positives: str | None = None,
) -> Examples:
    """Reads a manifest, a folder of class folders, or TFRecord shards that `data` wrote.

    Args:
        path: .csv, .tsv, .parquet or .jsonl, local or a URI; a folder of class folders, or of
            split folders (`tables.SPLITS`) that hold them; a folder or glob of .tfrecord shards;
            or what `read_table` made of one.
        root: what relative image paths are relative to; default the folder of the manifest.
        image: column of image paths.
        text: column of captions. This column, `split` and `group` may be absent under their default
            names; None ignores them.
        label: column of class names, or several columns of 0, 1 or nothing (multi-label). An empty
            class is -1. Class folders need no `label`.
        split: column of split names.
        group: column of patients, cases or studies.
        captions: where there is no text column, how to make texts of the label: a template such as
            "a photo of {label}", or class -> caption.
        classes: names and order of the classes; default sorted (as numbers if all are numbers).
        positives: which rows are positive pairs of each other: "text" (equal captions), "label", or
            a column whose equal entries are.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: all that is wrong with it, in one message: file, column, line, how many.
    """
    table = path if isinstance(path, Table) else read_table(os.fspath(path))
    optional = ("text", "split", "group")
    images = table.column(image)
    texts = table.column(text, optional)
    groups, splits = table.column(group, optional), table.column(split, optional)
    label, classes = label or table.label, tuple(classes or table.classes or ())
    if label is None:
        labels = None
    elif isinstance(label, str):
        classes = classes or _sorted_classes(table.column(label, blank=True))
        labels = _class_indices(table, label, classes)
    else:
        labels, classes = _multi_label(table, label), tuple(label)
    if captions is not None and texts is None:
        texts = _captions(table, label, captions, classes)
    ids = _positive_ids(table, positives, texts, labels)
    table.raise_problems()
    base = os.fspath(root or table.root)
    images = [_join(base, value) for value in images or ()]
    return Examples(images, texts, labels, classes, groups, splits, ids)


def _sorted_classes(names: Sequence[str] | None) -> tuple[str, ...]:
    found = sorted(set(names or ()) - {""})
    return tuple(sorted(found, key=int) if all(map(str.isdecimal, found)) else found)


def _class_indices(table: Table, column: str, classes: tuple[str, ...]) -> np.ndarray:
    index = {name: i for i, name in enumerate(classes)} | {"": -1}
    shown = ", ".join(classes[:20])
    table.report(column, lambda name: name not in index, f"not among the classes {shown}:")
    return np.array([index.get(name, -1) for name in table.strings(column).to_pylist()], np.int32)


def _multi_label(table: Table, names: Sequence[str]) -> np.ndarray:
    value = {"0": 0.0, "0.0": 0.0, "False": 0.0, "1": 1.0, "1.0": 1.0, "True": 1.0, "": np.nan}
    columns = []
    for name in names:
        cells = table.column(name, blank=True) or ()
        table.report(name, lambda cell: cell not in value, "expected 0, 1 or nothing, got")
        columns.append([value.get(cell, np.nan) for cell in cells])
    table.raise_problems()  # with a column missing there is no matrix
    return np.array(columns, np.float32).T


def _captions(
    table: Table,
    label: str | Sequence[str] | None,
    captions: str | Mapping[str, str],
    classes: tuple[str, ...],
) -> list[str] | None:
    if not isinstance(label, str):
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
    """class -> caption, of a template with {label} or of such a mapping itself."""
    if isinstance(captions, str):
        return {name: captions.replace("{label}", name) for name in classes}
    return captions


def with_own_ids(examples: Examples) -> Examples:
    """Rows without an id in `positives` get one of their own: a row that is in a batch twice, as
    at the border of two epochs, is then no negative of itself."""
    n = len(examples)
    ids = np.full(n, -1, np.int32) if examples.positives is None else examples.positives
    own = np.arange(n, dtype=np.int32) + ids.max(initial=-1) + 1
    return replace(examples, positives=np.where(ids < 0, own, ids))


def _positive_ids(
    table: Table,
    positives: str | None,
    texts: Sequence[str] | None,
    labels: np.ndarray | None,
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


def _join(root: str, path: str) -> str:
    return path if "://" in path or os.path.isabs(path) else f"{root.rstrip('/')}/{path}"


def write(examples: Examples, path: str | os.PathLike) -> None:
    """Writes a Parquet manifest, from which `read` makes the same examples again.

    Images below the folder of the manifest become relative to it, so both can be moved together.
    Label and classes are found without naming them; `positives` is a column of that name.

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

    A group's side depends on its name and the seed, hardly on the other rows: with more patients
    added later, nearly all stay where they were. Rows keep their order.

    Args:
        examples: what to split.
        fraction: share of the rows to hold out, in (0, 1); met as closely as whole groups allow.
        seed: another seed, another split.

    Returns:
        (train, held_out), neither empty.

    Raises:
        ValueError: `fraction` is out of range, or there are fewer than two groups.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected more than 0 and less than 1")
    names = _groups(examples)
    sizes = Counter(names)
    if len(sizes) < 2:
        raise ValueError(f"all {len(examples)} rows are of one group; two are needed to split")
    ranked = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    reached = np.cumsum([sizes[name] for name in ranked[:-1]])
    count = int(np.argmin(np.abs(reached - fraction * len(examples)))) + 1
    held_out = set(ranked[:count])
    inside = np.array([name in held_out for name in names])
    return examples.select(np.flatnonzero(~inside)), examples.select(np.flatnonzero(inside))


def check_disjoint(train: Examples, held_out: Examples) -> None:
    """Refuses a split in which a group, or an image, lies on both sides.

    Raises:
        ValueError: how many do, and the first few.
    """
    pairs = [("images", train.images, held_out.images)]
    if train.groups is not None and held_out.groups is not None:
        pairs.insert(0, ("groups", train.groups, held_out.groups))
    for what, left, right in pairs:
        if both := sorted(set(left) & set(right)):
            raise ValueError(
                f"{len(both)} {what} are in both the training and the held-out examples: "
                f"{', '.join(both[:5])}{', …' if len(both) > 5 else ''}; split by group"
            )


def _groups(examples: Examples) -> Sequence[str]:
    return examples.images if examples.groups is None else examples.groups
