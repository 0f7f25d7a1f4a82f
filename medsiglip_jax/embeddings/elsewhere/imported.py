"""Vectors in memory that another program made, in the place of a run of `embed`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from medsiglip_jax.embeddings.elsewhere.found import Found
from medsiglip_jax.embeddings.store import BLOCK_ROWS, Block, Embeddings, NamedRow, undirected
from medsiglip_jax.files import places
from medsiglip_jax.inference.manifest import UNKNOWN, Manifest, Weights


class Imported(Embeddings):
    """Vectors of another program; their manifest says that how they were made is unknown."""

    def __init__(
        self,
        file: places.Place,
        found: Found,
        digest: str,
        normalized: bool,
        kind: str = "image",
        on_rows: Callable[[int], Any] = int,
    ):
        """Takes what a reader found.

        Args:
            file: where, for messages.
            found: vectors and names.
            digest: SHA-256 of the file.
            normalized: whether all have length 1.
            kind, on_rows: as for `Embeddings`.
        """
        self.folder, self.kind, self.digest = file, kind, digest
        self._found, self._on_rows = found, on_rows
        self.dim, self.normalized = found.vectors.shape[1], normalized
        self.manifest = Manifest(
            model=Weights(), preprocess=UNKNOWN, normalized=normalized, dim=self.dim,
            errors=len(found.lacking), parts=(),
        )  # fmt: skip
        self.without_direction: set[int] = set()

    @property
    def unreadable(self) -> list[str]:
        """The sources that the file names without a vector."""
        return [name for name, _ in self._found.lacking]

    def __len__(self) -> int:
        return len(self._found.ids)

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """As `Embeddings.blocks`."""
        for first in range(start, len(self), BLOCK_ROWS):
            rows = np.arange(first, min(first + BLOCK_ROWS, len(self)))
            self._on_rows(len(rows))
            rows = rows[self._of_kind(rows)]
            if len(rows):
                block = Block(rows, self._found.vectors[rows])
                self.without_direction.update(rows[undirected(block.vectors)].tolist())
                yield block

    def _of_kind(self, rows: np.ndarray) -> np.ndarray:
        if self.kind == "any":
            return np.ones(len(rows), bool)
        return np.array([self._kind(row) == self.kind for row in rows.tolist()], bool)

    def _kind(self, row: int) -> str:
        return self._found.kinds[row] if self._found.kinds is not None else "image"

    def ids(
        self, rows: Sequence[int], columns: Sequence[str] = ("id", "source", "kind")
    ) -> list[dict[str, Any]]:
        """As `Embeddings.ids`; there are no other columns."""
        found = self._found
        named = (
            {"id": found.ids[n], "source": found.sources[n], "kind": self._kind(n)} for n in rows
        )
        return [{name: row[name] for name in columns} for row in named]

    def _named(self, rows: Sequence[int]) -> tuple[NamedRow, ...]:
        return tuple(NamedRow(self._found.ids[row], self.folder.name) for row in rows)
