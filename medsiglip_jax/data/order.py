"""Which row is read at which position of a run: a pure function, so that resuming is an offset.

Every host computes the same answer from (seed, position) alone: no iterator state to save, no
dependence on the number of hosts, devices or threads.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

# The source, the epoch of that source and the row in it of each position.
Places = tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]


@dataclass(frozen=True)
class Order:
    """The endless sequence of (source, epoch, row) that training reads.

    Sources are interleaved evenly: in any stretch of positions each source gets its share of the
    draws to within one or two, so that every batch is a fair mix. The draws of one source are whole
    epochs, each a new permutation of its rows.

    Attributes:
        sizes: number of rows of every source, each >= 1.
        weights: how often each source is drawn, relative to the others; None draws in proportion
            to `sizes`, so that all sources finish their epochs together.
        seed: of the permutations, >= 0.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes is {self.sizes}, expected at least one source of >= 1 rows")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected a whole number >= 0")
        weights = self.sizes if self.weights is None else self.weights
        if len(weights) != len(self.sizes):
            count = len(self.sizes)
            raise ValueError(f"{len(weights)} weights for {count} sources; expected one each")
        if not all(np.isfinite(w) and w > 0 for w in weights):
            raise ValueError(f"weights is {weights}, expected numbers > 0; or leave a source out")

    def at(self, positions: Int64[np.ndarray, " n"]) -> Places:
        """Looks up positions, in O(1) each, however far into the run they lie.

        Args:
            positions: int64 [n], each >= 0: step * batch_size + place in the batch.

        Returns:
            The source, the epoch of that source and the row in it; int64 [n] each.
        """
        source, draw = self._mix(positions)
        size = np.asarray(self.sizes, np.int64)[source]
        epoch, row = draw // size, draw % size
        for s, e in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            here = (source == s) & (epoch == e)
            row[here] = self._permutations[s](e)[row[here]]
        return source, epoch, row

    @functools.cached_property
    def _permutations(self) -> list[Callable[[int], np.ndarray]]:
        """epoch -> permutation, by source; two are kept, as a batch may span two epochs."""
        return [
            functools.lru_cache(maxsize=2)(functools.partial(_permutation, self.seed, s, n))
            for s, n in enumerate(self.sizes)
        ]

    def _mix(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of every position, and how many draws of that source come before it.

        The first source takes its share by rounding, the second its share of the rest, and so on:
        the count of a source never falls and grows by at most 1 per position.
        """
        weights = np.asarray(self.weights or self.sizes, np.float64)
        source, draw = np.full(positions.shape, len(weights) - 1), positions.copy()
        left = np.ones(positions.shape, bool)
        for s in range(len(weights) - 1):
            share = weights[s] / weights[s:].sum()
            before = np.floor(draw * share + 0.5).astype(np.int64)
            taken = left & (np.floor((draw + 1) * share + 0.5) > before)
            left &= ~taken
            source[taken] = s
            draw = np.where(taken, before, np.where(left, draw - before, draw))
        return source, draw


@dataclass(frozen=True)
class Once:
    """The rows of every source once, in their own order, one source after the other.

    Attributes:
        sizes: number of rows of every source.
    """

    sizes: tuple[int, ...]

    def at(self, positions: Int64[np.ndarray, " n"]) -> Places:
        """As `Order.at`; the epoch is 0, and the row is -1 at positions beyond all rows."""
        ends = np.cumsum(self.sizes)
        source = np.minimum(np.searchsorted(ends, positions, side="right"), len(ends) - 1)
        row = positions - (ends - self.sizes)[source]
        return source, np.zeros_like(row), np.where(positions < ends[-1], row, -1)


def _permutation(seed: int, source: int, size: int, epoch: int) -> np.ndarray:
    # A sort of uniform draws: numpy may change `Generator.permutation` between versions
    # (NEP 19), and a run must find its order again after an upgrade. 10 M rows: about 2 s.
    draws = np.random.default_rng((0, seed, source, epoch)).random(size)
    return np.argsort(draws, kind="stable").astype(np.int32 if size < 2**31 else np.int64)
