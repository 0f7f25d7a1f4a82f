"""What is usual: how much windows of the reference differ from its rest, beside new ones."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from medsiglip_jax.trust.monitor import kernel, samples, scores, windows
from medsiglip_jax.trust.monitor.reference import Reference
from medsiglip_jax.trust.monitor.scores import Scored
from medsiglip_jax.trust.monitor.thresholds import Measured
from medsiglip_jax.trust.monitor.windows import FEWEST

_KEPT = 4  # nulls: windows by number have two sizes at most, those by time may have any
_CELLS = 1_000_000  # of a table of windows and rows at a time, 8 MB of float64
_Null = Mapping[str, Float64[np.ndarray, " b"]]
_Statistics = Callable[[Scored, np.ndarray], _Null]


class Control:
    """Some images of a reference, all or those of a stratum, that new ones are compared with.

    Distances and scores of a new window are compared with those of the reference by the same
    statistic as those of a window of the reference with its rest. That is what new windows of equal
    size would give, but for a rest that is smaller by the window, which makes thresholds a little
    larger. Categories, labels and errors are compared in windows of old and new images together (a
    permutation test): the reference alone cannot tell how often a value or an error comes that it
    has never seen.
    """

    def __init__(
        self, reference: Reference, scored: Scored, rows: Int64[np.ndarray, " n"], seed: int
    ):
        self.rows, self._seed = rows, seed
        self._groups, self._scored = reference.groups[rows], scored.take(rows)
        self._vectors, self._mean = reference.centred[rows], reference.gaussian.mean
        self._bandwidth, self._total = reference.bandwidth, 0.0
        self._nulls: dict[tuple[int, int], _Null] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def largest(self) -> int:
        """Rows of the largest window that can be compared: half of these."""
        return len(self) // 2

    def measure(
        self,
        vectors: Float32[np.ndarray, "k d"],
        new: Scored,
        groups: Int64[np.ndarray, " k"],
        draws: int,
    ) -> dict[str, Measured]:
        """The statistics of a window of new images, and those of `draws` windows in control.

        Args:
            vectors: embeddings of the new images, at most `largest`.
            new: what else is compared of them.
            groups: their patients.
            draws: windows in control.
        """
        size, n = len(vectors), len(self)
        null, both = self._null_of(size, draws), scores.join(self._scored, new)
        window = np.arange(n + size)[None] >= n
        statistics = {"mmd": np.array([self._mmd(vectors)]), **_compared(both, window)}
        measured = {name: Measured(float(statistics[name][0]), null[name]) for name in statistics}
        if both.categories:
            drawn = self._drawn(np.arange(n), groups, draws)
            measured |= _judged(_counted, both, window, drawn)
        return measured | self._of_labels(new, groups, draws)

    def _of_labels(
        self, new: Scored, groups: Int64[np.ndarray, " m"], draws: int
    ) -> dict[str, Measured]:
        """The tests of labels, among the rows that have one, old and new ones together.

        Often only the older part of a window has its labels yet. Beside windows in control that all
        have theirs, of 100 rows with 20 labels 34 % alarmed in calibration at a level of 5 %.
        """
        if self._scored.labels is None or new.labels is None:
            return {}
        known, rows = _labelled(self._scored), _labelled(new)
        size = len(rows)
        if not FEWEST <= size <= len(known) // 2:
            return {}
        both = scores.join(self._scored.take(known), new.take(rows))
        window = np.arange(len(known) + size)[None] >= len(known)
        drawn = self._drawn(known, groups[rows], draws)
        return _judged(_compared_labels, both, window, drawn)

    def _drawn(
        self, known: Int64[np.ndarray, " k"], groups: Int64[np.ndarray, " m"], draws: int
    ) -> Bool[np.ndarray, "b n"]:
        """Windows of some old rows and all new ones together, as large as the new ones are."""
        pooled = np.append(self._groups[known], self._groups.max() + 1 + groups)
        return windows.draw(pooled, len(groups), draws, self._random(len(groups)))

    def _null_of(self, size: int, draws: int) -> _Null:
        """The null of windows of this size, computed once for the last few sizes."""
        key = size, draws
        if key not in self._nulls:
            if len(self._nulls) >= _KEPT:
                del self._nulls[next(iter(self._nulls))]  # the oldest
            self._nulls[key] = self._null(size, draws)
        return self._nulls[key]

    def _null(self, size: int, draws: int) -> _Null:
        drawn = windows.draw(self._groups, size, draws, self._random(size))
        distances, self._total = kernel.mmd_of_windows(self._vectors, drawn, self._bandwidth)
        return {"mmd": distances, **_in_parts(_compared, self._scored, drawn)}

    def _mmd(self, vectors: Float32[np.ndarray, "k d"]) -> float:
        new = kernel.centred(vectors, self._mean)
        within, between = (kernel.kernel_sum(new, x, self._bandwidth) for x in (new, self._vectors))
        n, m = len(self), len(new)
        return kernel.mmd_of_sums(n, m, self._total, within, between)

    def _random(self, size: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, len(self), size))


def _judged(
    statistics: _Statistics, images: Scored, window: np.ndarray, drawn: np.ndarray
) -> dict[str, Measured]:
    """The statistics of one window beside those of drawn ones."""
    own, null = statistics(images, window), _in_parts(statistics, images, drawn)
    return {name: Measured(float(own[name][0]), null[name]) for name in own}


def _in_parts(statistics: _Statistics, images: Scored, drawn: np.ndarray) -> _Null:
    """Statistics of many windows, some windows at a time."""
    size = max(1, _CELLS // drawn.shape[1])
    parts = [statistics(images, drawn[i : i + size]) for i in range(0, len(drawn), size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _compared(
    images: Scored, drawn: Bool[np.ndarray, "b n"]
) -> dict[str, Float64[np.ndarray, " b"]]:
    """The statistics of windows of images whose null comes from the reference alone."""
    statistics = {n: samples.anderson_darling(x, drawn) for n, x in images.distances.items()}
    return statistics | {n: samples.kolmogorov_smirnov(x, drawn) for n, x in images.scores.items()}


def _counted(images: Scored, drawn: Bool[np.ndarray, "b n"]) -> _Null:
    """The statistics of windows of categories."""
    return {name: samples.chi_squared(x, drawn) for name, x in images.categories.items()}


def _labelled(images: Scored) -> Int64[np.ndarray, " k"]:
    """The rows of which any label is known."""
    assert images.labels is not None
    return np.flatnonzero(np.isfinite(images.labels).any(axis=1))


def _compared_labels(
    images: Scored, drawn: Bool[np.ndarray, "b n"]
) -> dict[str, Float64[np.ndarray, " b"]]:
    """The statistics of windows of labelled images."""
    assert images.labels is not None and images.predicted is not None
    compared = images.predicted, images.labels, drawn
    statistics = {"auc": samples.auc_drop(*compared)}
    if images.calibrated:
        statistics["calibration"] = samples.calibration_shift(*compared)
    return statistics


def unreadable(before: tuple[int, int], now: tuple[int, int], draws: int, seed: int) -> Measured:
    """The share of new files that cannot be read, and of windows of old and new files together.

    Args:
        before, now: number of unreadable files, and of all.
        draws: windows in control.
        seed: the seed of the draws.
    """
    bad, of = before[0] + now[0], before[1] + now[1]
    drawn = np.random.default_rng(seed).hypergeometric(bad, of - bad, now[1], draws)
    return Measured(now[0] / now[1], drawn / now[1])
