"""How far windows differ from the rest of a sample: statistics of numbers, categories and labels.

`windows` is True for the rows of a window and False for those that it is compared with. There are
many windows at a time, because thresholds come from windows of the reference.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from medsiglip_jax.metrics.ranking import auc_of_weights

Windows = Bool[np.ndarray, "b n"]
Statistics = Float64[np.ndarray, " b"]


def kolmogorov_smirnov(values: Float[np.ndarray, "n c"], windows: Windows) -> Statistics:
    """The largest distance between two distribution functions, over all columns.

    One statistic for all columns, so that ten texts are one test and not ten.
    """
    largest = np.zeros(len(windows))
    for column in values.T:
        order, last = _sorted(column)
        inside = windows[:, order]
        shares = [_cumulated(rows)[:, last] for rows in (inside, ~inside)]
        largest = np.maximum(largest, np.abs(shares[0] - shares[1]).max(axis=1))
    return largest


def anderson_darling(values: Float[np.ndarray, " n"], windows: Windows) -> Statistics:
    """The two-sample statistic of Anderson and Darling, which weighs the tails of distributions.

    For distances, because noise moves them a little and everywhere: with it 72 % of windows of 100
    noisy digits alarmed against 498, with Kolmogorov and Smirnov's 66 %.

    Source: Scholz and Stephens, J. Am. Stat. Assoc. 82 (1987), 918, equation 6, for ties.
    """
    order, last = _sorted(values)
    below = np.arange(1, len(values) + 1)[last]  # rows up to each value
    ties, below = np.diff(below, prepend=0)[:-1], below[:-1]
    inside = windows[:, order]
    n = inside.sum(axis=1, keepdims=True)
    counts = np.cumsum(inside, axis=1)[:, last[:-1]]
    gaps = (counts * float(len(values)) - n * below) ** 2 / (below * (len(values) - below))
    return (gaps * ties).sum(axis=1) / (n * (len(values) - n))[:, 0]


def chi_squared(categories: Int64[np.ndarray, " n"], windows: Windows) -> Statistics:
    """Pearson's statistic of the table of category by window or not."""
    values, numbers = np.unique(categories, return_inverse=True)
    table = np.eye(len(values))[numbers]
    counts, total = windows @ table, table.sum(axis=0)
    share = windows.mean(axis=1, keepdims=True)
    # Both rows of the table have the same differences from what is expected, but for the sign.
    return ((counts - share * total) ** 2 / (share * (1 - share) * total)).sum(axis=1)


def auc_drop(scores: np.ndarray, labels: np.ndarray, windows: Windows) -> Statistics:
    """By how much the AUC of a window lies below that of the rest, at most over classes.

    Args:
        scores, labels: float [n, c]; NaN for an unknown label.
        windows: see the module.

    Returns:
        -1 for windows where no class has both labels.
    """
    largest = np.full(len(windows), -1.0)
    for rows, score, label in _known(scores, labels):
        area = auc_of_weights(score, label)
        inside = windows[:, rows]
        gap = area((~inside).astype(np.float64)) - area(inside.astype(np.float64))
        largest = np.fmax(largest, gap)
    return largest


def calibration_shift(
    probabilities: np.ndarray, labels: np.ndarray, windows: Windows
) -> Statistics:
    """By how much the mean of label minus probability differs, at most over classes.

    Calibration in the large: more or fewer positives than predicted. The expected calibration error
    of a small window says more of its size than of calibration.

    Args:
        probabilities, labels: float [n, c]; NaN for an unknown label.
        windows: see the module.
    """
    largest = np.zeros(len(windows))
    for rows, predicted, label in _known(probabilities, labels):
        residuals, inside = label - predicted, windows[:, rows].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            ours = inside @ residuals / inside.sum(axis=1)
            theirs = (1 - inside) @ residuals / (1 - inside).sum(axis=1)
        largest = np.fmax(largest, np.abs(ours - theirs))
    return largest


def population_stability(
    expected: Float[np.ndarray, " n"], new: Float[np.ndarray, " m"], bins: int = 10
) -> float:
    """The population stability index, in bins that hold equally much of what is expected.

    A description and no test: of windows of 30 images in control, 80 % exceed the usual limit of
    0.2.
    """
    edges = np.quantile(expected, np.linspace(0, 1, bins + 1)[1:-1])
    p, q = (
        (np.bincount(np.searchsorted(edges, x), minlength=bins) + 0.5) / (len(x) + bins / 2)
        for x in (expected, new)
    )  # half a row more in each bin, since the logarithm of an empty one is infinite
    return float(((q - p) * np.log(q / p)).sum())


def _sorted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of values, and where in it the last of equal ones are."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))


def _cumulated(rows: Bool[np.ndarray, "b n"]) -> Float64[np.ndarray, "b n"]:
    return np.cumsum(rows, axis=1) / rows.sum(axis=1, keepdims=True)


def _known(scores: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """The rows, scores and labels of each class that has both labels."""
    for score, label in zip(scores.T, labels.T, strict=True):
        rows = np.flatnonzero(np.isfinite(label) & np.isfinite(score))
        if len(np.unique(label[rows])) == 2:
            yield rows, score[rows], label[rows]
