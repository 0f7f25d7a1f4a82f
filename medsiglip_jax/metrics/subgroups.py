"""The AUC of a score in each subgroup of patients, and its gap to the other patients."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from medsiglip_jax.metrics.auc_variance import delong
from medsiglip_jax.metrics.checks import Known, known
from medsiglip_jax.metrics.intervals import Interval
from medsiglip_jax.metrics.ranking import auc_of_weights
from medsiglip_jax.metrics.resampling import Resampling, interval_of

# With fewer positives or negatives, an AUC says little about a subgroup.
FEW = 10


@dataclass(frozen=True)
class Subgroup:
    """One subgroup.

    Attributes:
      name: the subgroup.
      auc: the AUC of its rows, with DeLong's interval.
      gap: its AUC minus that of all other rows, with a bootstrap interval.
      positives: number of its rows with label 1.
      negatives: number of its rows with label 0.
      missing: number of its rows left out because their label is unknown.
      flagged: whether it has fewer than 10 positives or 10 negatives, too few for a conclusion.
    """

    name: str
    auc: Interval
    gap: Interval
    positives: int
    negatives: int
    missing: int
    flagged: bool


def subgroup_aucs(
    scores: ArrayLike,
    labels: ArrayLike,
    subgroups: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Subgroup, ...]:
    """Returns the AUC in each subgroup, ordered by name, and its gap to the rest.

    Args:
      scores: [n] real numbers, higher meaning more positive.
      labels: [n] of 0 and 1; rows with NaN or -1 are left out and counted.
      subgroups: [n] names, such as sex, age band, view or skin type.
      groups: [n] patient of each row; whole patients are resampled.
      samples: number of resamples for the gaps.
      seed: of the resamples.
      level: confidence level.

    Raises:
      ValueError: as for `known`, or `subgroups` or `groups` are not [n].
    """
    rows, names = known(scores, labels), np.asarray(subgroups).astype(str)
    if names.shape != rows.rows.shape:
        raise ValueError(f"subgroups has shape {names.shape}; expected {rows.rows.shape}")
    units = np.arange(len(names)) if groups is None else np.asarray(groups)
    resampling = Resampling(units[rows.rows], None, samples, seed, level)
    return tuple(_subgroup(str(name), rows, names, resampling) for name in np.unique(names))


def _subgroup(name: str, rows: Known, names: np.ndarray, resampling: Resampling) -> Subgroup:
    scores, positive, inside = rows.scores, rows.positive, names[rows.rows] == name
    units = np.asarray(resampling.groups)[inside]
    value = delong(scores[inside], positive[inside], groups=units, level=resampling.level)
    missing = int((names[~rows.rows] == name).sum())
    positives = int(positive[inside].sum())
    negatives = int(inside.sum()) - positives
    ours, theirs = (auc_of_weights(scores[part], positive[part]) for part in (inside, ~inside))
    gap = Interval(np.nan, np.nan, np.nan)
    if len(scores):
        of_gap = lambda w: ours(w[..., inside]) - theirs(w[..., ~inside])  # noqa: E731
        gap = interval_of(of_gap, len(scores), resampling)
    flagged = min(positives, negatives) < FEW
    return Subgroup(name, value, gap, positives, negatives, missing, flagged)
