"""What an adapter makes of a folder: images, labels, patients, and a count of what is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files.places import Place


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with labels; every column has one entry per image.

    Attributes:
        ids: unique; of a file its path below the folder.
        sources: what the embedding engine reads.
        labels: 0, 1 and NaN (unknown), one column per class.
        values: what the data calls the classes, in the order of the columns.
        groups: patient, lesion or slide; None where the data does not tell.
        attributes: such as sex, age and view; "" is unknown.
        files: where the labels were read.
        counts: of what was left out, and why.
        missing: what was expected and is not there.
        texts: caption or report of each image, "" where it has none; None where the data has none.
        part: of the data set that the images are of, "" that of the test.
        pool: id -> source of all images of that part, whatever label is known and whatever is
            drawn: they are embedded together, so that other labels or draws find them embedded.
    """

    ids: Sequence[str]
    sources: Sequence[str]
    labels: Float32[np.ndarray, "n c"]
    values: tuple[str, ...]
    groups: Sequence[str] | None = None
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    files: Sequence[Place] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    missing: Sequence[str] = ()
    texts: Sequence[str] | None = None
    part: str = ""
    pool: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int] | np.ndarray) -> "Dataset":
        """The images of those numbers."""
        rows = np.asarray(rows, np.int64)
        numbers: list[int] = rows.tolist()

        def taken(column: Sequence[str]) -> list[str]:
            return [column[i] for i in numbers]

        return replace(
            self,
            ids=taken(self.ids),
            sources=taken(self.sources),
            labels=self.labels[rows],
            groups=None if self.groups is None else taken(self.groups),
            attributes={name: taken(column) for name, column in self.attributes.items()},
            texts=None if self.texts is None else taken(self.texts),
        )

    def labelled(self) -> "Dataset":
        """Images of which at least one label is known; the others are counted."""
        unknown = np.isnan(self.labels)
        known = ~unknown.all(axis=1) | (unknown.shape[1] == 0)  # pairs have no labels to know
        counts = {**self.counts, "unlabelled": int((~known).sum())}
        return replace(self.select(np.flatnonzero(known)), counts=counts)

    def captioned(self) -> "Dataset":
        """Images with a text; the others are counted."""
        texts = self.texts or [""] * len(self)
        counts = {**self.counts, "without a text": texts.count("")}
        return replace(self.select([i for i, text in enumerate(texts) if text]), counts=counts)

    def once(self) -> "Dataset":
        """Every image once, with its first text. Where its rows have different labels none of them
        is right: all are left out. Both are counted."""
        first: dict[str, int] = {}
        conflicting = set()
        for i, name in enumerate(self.ids):
            at = first.setdefault(name, i)
            if not np.array_equal(self.labels[at], self.labels[i], equal_nan=True):
                conflicting.add(name)
        kept = [i for name, i in first.items() if name not in conflicting]
        counts = {"repeated": len(self) - len(first), "conflicting": len(conflicting)}
        return replace(self.select(kept), counts={**self.counts, **counts})


_LISTS = frozenset("file path each root on stem known_missing ignore except".split())


def check_settings(
    task: Task, table: Mapping[str, Any], allowed: str, where: str = "data", needed: str = ""
) -> None:
    """Raises ValueError for settings that the adapter does not know, or cannot do without."""
    problems = []
    if unknown := sorted(table.keys() - set(allowed.split())):
        problems.append(f"has unknown {', '.join(unknown)}; expected {allowed}")
    if lacking := [name for name in needed.split() if name not in table]:
        problems.append(f"lacks {', '.join(lacking)}")
    if odd := [name for name in _LISTS & table.keys() if not isinstance(table[name], list)]:
        problems.append(f"expected lists for {', '.join(sorted(odd))}")
    if problems:
        raise ValueError(f"task {task.name}: {where} {'; '.join(problems)}")


def where_to_get(task: Task) -> str:
    """The end of a message about data that is not there."""
    known = [part for part in (task.source, task.access) if part]
    return f"; {task.title} is had from: {' - '.join(known)}" if known else ""
