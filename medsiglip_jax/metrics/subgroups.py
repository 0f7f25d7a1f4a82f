"""How well a score does in each subgroup of patients, and how far that is from the others."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from medsiglip_jax.metrics.bootstrap import interval_of
from medsiglip_jax.metrics.checks import known
from medsiglip_jax.metrics.delong import delong
from medsiglip_jax.metrics.intervals import Interval
from medsiglip_jax.metrics.ranking import auc_of_weights

# Below so many positives, an AUC says little about a subgroup.
FEW = 10


@dataclass(frozen=True)
class Subgroup:
    """One subgroup.

    Attributes:
      name: of the subgroup.
      auc: of its rows, with DeLong's interval.
      gap: its AUC minus that of all other rows, with a bootstrap interval.
      positives: rows of it with label 1.
      negatives: rows of it with label 0.
      missing: rows of it left out for want of a label.
      flagged: whether it has fewer than 10 positives or 10 negatives: read nothing into it.
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
    """Returns the AUC in each subgroup, by name, and its gap to the rest.

    Args:
      scores: [n] real numbers, higher meaning more positive.
      labels: [n] of 0 and 1; rows of NaN or -1 are left out, and counted.
      subgroups: [n] names: sex, age band, view, skin type.
      groups: [n] patient of each row; whole patients are resampled.
      samples: resamples for the gaps.
      seed: of the resampling.
      level: confidence level.

    Raises:
      ValueError: as for `known`, or `subgroups` or `groups` are not [n].
    """
    rows, names = known(scores, labels), np.asarray(subgroups).astype(str)
    if names.shape != rows.rows.shape:
        raise ValueError(f"subgroups has shape {names.shape}; expected {rows.rows.shape}")
    units = np.arange(len(names)) if groups is None else np.asarray(groups)
    found = []
    for name in np.unique(names):
        inside = names[rows.rows] == name
        missing = int((names[~rows.rows] == name).sum())
        parts = rows.scores, rows.positive, inside, units[rows.rows]
        found.append(_subgroup(str(name), *parts, missing, samples, seed, level))
    return tuple(found)


def _subgroup(name, scores, positive, inside, units, missing, samples, seed, level) -> Subgroup:
    value = delong(scores[inside], positive[inside], groups=units[inside], level=level)
    positives = int(positive[inside].sum())
    negatives = int(inside.sum()) - positives
    one, other = (auc_of_weights(scores[part], positive[part]) for part in (inside, ~inside))
    gap = Interval(np.nan, np.nan, np.nan)
    if len(scores):
        of_gap = lambda w: one(w[..., inside]) - other(w[..., ~inside])  # noqa: E731
        how = {"groups": units, "samples": samples, "seed": seed, "level": level}
        gap = interval_of(of_gap, len(scores), **how)
    flagged = min(positives, negatives) < FEW
    return Subgroup(name, value, gap, positives, negatives, missing, flagged)
