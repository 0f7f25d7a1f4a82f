"""What an adapter makes of a folder: images, labels, patients, and a count of what is missing."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float32

from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files.places import Place


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with labels; every column has one entry per image.

    Attributes:
        ids: unique; the id of a file is its path below the folder.
        sources: what the embedding engine reads.
        labels: 0, 1 and NaN (unknown), one column per class.
        values: what the data calls the classes, in the order of the columns.
        groups: patient, lesion or slide; None where the data does not say.
        attributes: such as sex, age and view; "" is unknown.
        files: where the labels were read.
        counts: how many images or rows were left out, by reason.
        missing: what was expected and is not there.
        notes: what a reader of the result must know of how the data was read, in sentences.
        texts: caption or report of each image, "" where it has none; None where the data has none.
        part: the part of the data set that the images come from; "" is the test part.
        pool: id -> source of all images of that part, whatever their labels and whichever were
            drawn. They are embedded together, so that other labels or draws need no new embeddings.
        root: the folder that ids are paths below.
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
    notes: Sequence[str] = ()
    texts: Sequence[str] | None = None
    part: str = ""
    pool: Mapping[str, str] = field(default_factory=dict)
    root: Place | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int] | np.ndarray) -> "Dataset":
        """The images of these numbers."""
        rows = np.asarray(rows, np.int64)
        numbers: list[int] = rows.tolist()

        def taken(column: Sequence[str] | None) -> list[str] | None:
            return None if column is None else [column[i] for i in numbers]

        columns = {n: taken(getattr(self, n)) for n in ("ids", "sources", "groups", "texts")}
        attributes = {name: taken(column) for name, column in self.attributes.items()}
        return replace(self, labels=self.labels[rows], attributes=attributes, **columns)

    def labelled(self) -> "Dataset":
        """The images with at least one known label; the others are counted."""
        unknown = np.isnan(self.labels)
        known = ~unknown.all(axis=1) | (unknown.shape[1] == 0)  # pairs have no labels to know
        counts = {**self.counts, "unlabelled": int((~known).sum())}
        return replace(self.select(np.flatnonzero(known)), counts=counts)

    def captioned(self) -> "Dataset":
        """The images with a text; the others are counted."""
        texts = self.texts or [""] * len(self)
        counts = {**self.counts, "without a text": texts.count("")}
        return replace(self.select([i for i, text in enumerate(texts) if text]), counts=counts)

    def once(self) -> "Dataset":
        """Every image once, with its first text.

        An image whose rows have different labels is left out, because none of them can be
        trusted. Repeated and conflicting images are counted.
        """
        first: dict[str, int] = {}
        conflicting = set()
        for i, name in enumerate(self.ids):
            row = first.setdefault(name, i)
            if not np.array_equal(self.labels[row], self.labels[i], equal_nan=True):
                conflicting.add(name)
        kept = [i for name, i in first.items() if name not in conflicting]
        counts = {"repeated": len(self) - len(first), "conflicting": len(conflicting)}
        return replace(self.select(kept), counts={**self.counts, **counts})

    def by_majority(self, exclusive: bool) -> "Dataset":
        """Every image once, with the labels that most of the readers agree on, one row each.

        What they are equally divided on is unknown; of exclusive classes all are, unless one has
        the majority. Labels that readers differ on, and those without a majority, are counted.
        """
        _, first, image = np.unique(self.ids, return_index=True, return_inverse=True)
        votes = np.zeros((2, len(first), len(self.values)), np.int64)
        for choice in (0, 1):
            np.add.at(votes[choice], image, self.labels == choice)
        no, yes = votes
        labels = np.where(yes > no, 1, np.where(no > yes, 0, np.nan)).astype(np.float32)
        if exclusive:
            labels[~(np.nansum(labels, axis=1) == 1)] = np.nan
        counts = {
            "labels on which readers differ": int(((yes > 0) & (no > 0)).sum()),
            "labels without a majority": int(((yes == no) & (yes > 0)).sum()),
        }
        order = np.argsort(first)
        merged = replace(self.select(first[order]), labels=labels[order])
        return replace(merged, counts={**self.counts, **counts})

    def labels_sha256(self) -> str:
        """Identity of which image has which labels and text."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(np.ascontiguousarray(self.labels, "<f4").tobytes())
        digest.update("\n".join(self.texts or ()).encode())
        return digest.hexdigest()

    def files_sha256(self) -> dict[str, str]:
        """Name -> digest of the files that labels were read from."""
        digests = {}
        for path in self.files:
            with path.open("rb") as file:  # may hold images, too, and be large
                digest = hashlib.file_digest(file, "sha256")  # pyright: ignore[reportArgumentType]
            digests[path.name] = digest.hexdigest()
        return digests


def where_to_get(task: Task) -> str:
    """The end of a message about missing data."""
    known = [part for part in (task.source, task.access) if part]
    return f"; get {task.title} from: {' - '.join(known)}" if known else ""
