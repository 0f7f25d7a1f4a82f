"""How far AUCs, their means and their gaps would lie elsewhere in other patients.

An AUC is a mean over positives and over negatives, and so is the sum of what every patient pulls
it by. Pulls add up over classes, so that one mechanism serves a class, a mean and a subgroup, and
a patient whose images count in several of them is counted as one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy import special

from medsiglip_jax.metrics.intervals import correction_of_sizes

# As many times the variance of normal scores is expected at the most.
MOST = 2.0


class Part(NamedTuple):
    """The positives, or the negatives, of one AUC.

    Attributes:
      there: [u] which patients are among them.
      published: what they add to the variance of the AUC by Obuchowski; NaN for a single patient.
      variance: the same without its bias where patients have unequally many rows.
      rows: number of rows.
      independent: the variance if every row were of another patient.
      deviations: [u] squared pull of each patient minus the mean of the squares; 0 for others.
      rest: what the variance of `variance` has beyond the squares of the deviations.
    """

    there: Bool[np.ndarray, " u"]
    published: float
    variance: float
    rows: int
    independent: float
    deviations: Float64[np.ndarray, " u"]
    rest: float

    @property
    def units(self) -> int:
        """Number of patients."""
        return int(self.there.sum())


class Spread(NamedTuple):
    """An AUC, or the difference of two on the same rows, and how patients pull it.

    Attributes:
      value: the AUC or the difference.
      pulls: [u] what each patient adds to the distance of `value` from the truth.
      covariance: of the mean over positives with that over negatives, in patients with both.
      parts: of positives and of negatives.
    """

    value: float
    pulls: Float64[np.ndarray, " u"]
    covariance: float
    parts: tuple[Part, Part]

    @property
    def there(self) -> Bool[np.ndarray, " u"]:
        """Which patients have rows."""
        return self.parts[0].there | self.parts[1].there

    @property
    def variance(self) -> float:
        """Source: Obuchowski, Biometrics 53 (1997), 567; for groups of one row DeLong's."""
        return sum(part.published for part in self.parts) + 2 * self.covariance

    @property
    def degrees(self) -> float:
        """Of freedom of the variance, by Satterthwaite: as of Brunner and Munzel."""
        noise = sum(p.published**2 / (p.units - 1) if p.units > 1 else np.nan for p in self.parts)
        return sum(part.published for part in self.parts) ** 2 / noise if noise else np.nan

    @property
    def pairs(self) -> int:
        """Number of disjoint pairs of a positive and a negative of different patients."""
        return min(*(part.units for part in self.parts), int(self.there.sum()) // 2)


class Total(NamedTuple):
    """A mean of AUCs, or of differences, over classes; or one of them.

    Attributes:
      value: the mean.
      variance: its variance; NaN where it cannot be estimated.
      degrees: of freedom of the variance, from the fourth moments of the pulls; 0 without variance.
      there, pulls: [u] as of `Spread`.
      expected: variance by Newcombe's formula at the AUCs of the classes, times how much their
        covariance adds to the estimated one.
      shape: how it depends on the numbers of positives and negatives; see `_expected` and
        `binormal`.
      flat: whether only the positives, or only the negatives, vary: those that do not are tied, and
        the variance lacks their part.
    """

    value: float
    variance: float
    degrees: float
    there: Bool[np.ndarray, " u"]
    pulls: Float64[np.ndarray, " u"]
    expected: float
    shape: tuple[float, float]
    flat: bool


def of_scores(scores, positive, units, size: int) -> Spread:
    """The spread of an AUC; arguments as of `spread`."""
    return spread(placements(scores, positive), positive, units, size)


def of_difference(first, second, positive, units, size: int) -> Spread:
    """The spread of the difference of two AUCs on the same rows."""
    values = placements(first, positive) - placements(second, positive)
    return spread(values, positive, units, size)


def placements(
    scores: Float64[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """For each row, the fraction of the rows of the other label that it is ordered right with."""
    values = np.full(len(scores), np.nan)
    if positive.all() or not positive.any():
        return values
    ours, theirs = scores[positive], scores[~positive]
    values[positive] = _share_below(theirs, ours)
    values[~positive] = 1 - _share_below(ours, theirs)
    return values


def _share_below(some: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The share of some scores below each of others; ties count half."""
    some = np.sort(some)
    below, reached = (np.searchsorted(some, scores, side) for side in ("left", "right"))
    return (below + reached) / (2 * len(some))


def spread(
    values: Float64[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    units: Int64[np.ndarray, " n"],
    size: int,
) -> Spread:
    """The spread of a mean of placements; all NaN where one of the labels is missing.

    Args:
      values: placements, or the difference of those of two scores.
      positive: labels.
      units: number of the patient of each row.
      size: number of patients, those without rows included.
    """
    if positive.all() or not positive.any():
        none = Part(np.zeros(size, bool), np.nan, np.nan, 0, np.nan, np.zeros(size), np.nan)
        return Spread(np.nan, np.full(size, np.nan), np.nan, (none, none))
    sums, parts = [], []
    for mine in (positive, ~positive):
        centred = (values[mine] - values[mine].mean()) / mine.sum()
        sums.append(np.bincount(units[mine], centred, size))
        independent = _correction(len(centred)) * float((centred**2).sum())
        parts.append(_part(sums[-1], np.bincount(units[mine], minlength=size), independent))
    patients = int((parts[0].there | parts[1].there).sum())
    both = float((sums[0] * sums[1]).sum()) * _correction(patients)
    value = float(values[positive].mean())
    return Spread(value, sums[0] + sums[1], both, (parts[0], parts[1]))


def _part(sums: np.ndarray, rows: np.ndarray, independent: float) -> Part:
    """Of the summed pulls of each patient, and how many rows it has."""
    there, squares = rows > 0, sums**2
    count, total = int(there.sum()), float(squares.sum())
    variance = correction_of_sizes(rows[there]) * total if count > 1 else np.nan
    deviations = np.where(there, squares - squares.sum() / count, 0.0)
    # Of normal placements, whose fourth moment is the least that is believed.
    least = 2 * variance**2 / (count - 1) if count > 1 else np.nan
    rest = max(0.0, least - float((deviations**2).sum()))
    published = _correction(count) * total
    return Part(there, published, variance, int(rows.sum()), independent, deviations, rest)


def _correction(n: int) -> float:
    """Bessel's correction of the variance of n values."""
    return n / (n - 1) if n > 1 else np.nan


# ------------------------------------------------------------------------------------------ means


def mean(spreads: Sequence[Spread]) -> Total:
    """The mean over classes of AUCs, or of differences.

    The variance is that of the summed pulls, so that classes may share patients. The only positive
    of a class shows no variance: it is given the mean variance of one positive of the other
    classes, as surveys do with strata of one unit (Lumley, Complex Surveys (2010), option
    "average"). NaN where no class has two disjoint pairs of a positive and a negative.
    """
    if not spreads:
        nothing = np.zeros(0, bool), np.zeros(0)
        return Total(np.nan, np.nan, 0.0, *nothing, np.nan, (np.nan, np.nan), False)
    weight, there = 1 / len(spreads), np.any([s.there for s in spreads], axis=0)
    pulls = weight * np.sum([s.pulls for s in spreads], axis=0)
    apart = pulls**2 - weight**2 * np.sum([s.pulls**2 for s in spreads], axis=0)
    sums, counts, wobble, rest = [], [], np.zeros(len(there)), 0.0
    for side in range(2):
        parts = [s.parts[side] for s in spreads]
        several = [part for part in parts if part.units > 1]
        of_one = np.mean([part.variance * part.units for part in several]) if several else np.nan
        sums.append([part.variance if part.units > 1 else of_one for part in parts])
        counts.append(_effective(parts, several))
        wobble += weight**2 * np.sum([part.deviations for part in several], axis=0)
        rest += weight**4 * sum(part.rest for part in several)
        # What a lone patient is given is taken for an estimate of two degrees of freedom: means of
        # 13 findings of 100 patients are held by 94.4 % (92.3 if for certain), differences by 95.6.
        rest += weight**4 * (len(parts) - len(several)) * of_one**2
    within, noise = weight**2 * float(np.sum(sums)), float((wobble**2).sum()) + rest
    if max(s.pairs for s in spreads) < 2:
        within = np.nan  # of one pair of patients, however many rows they have
    of_classes = within + 2 * weight**2 * sum(s.covariance for s in spreads)
    variance = of_classes + float(apart.sum()) * _correction(int(there.sum()))
    shapes = [_shape(m, n) for m, n in zip(*counts, strict=True)]
    shape = weight**2 * np.sum(shapes, axis=0)
    if variance == 0:  # all in perfect order: the classes may be of the same patients
        shape = np.maximum(shape, _shape(*(_union(spreads, side) for side in range(2))))
    shared = max(1.0, variance / of_classes) if of_classes > 0 else 1.0
    formula = [_expected(s.value, each) for s, each in zip(spreads, shapes, strict=True)]
    return Total(
        value=sum(s.value for s in spreads) / len(spreads),
        variance=float(np.maximum(variance, 0.0)),  # NaN stays NaN
        degrees=float(2 * within**2 / noise) if noise > 0 else 0.0,
        there=there,
        pulls=pulls,
        expected=shared * weight**2 * sum(formula),
        shape=(float(shape[0]), float(shape[1])),
        flat=any(sum(side) == 0 for side in sums) and within > 0,
    )


def _union(spreads: Sequence[Spread], side: int) -> float:
    """Number of patients who are positive, or negative, of any class."""
    return float(np.any([s.parts[side].there for s in spreads], axis=0).sum())


def _effective(parts: Sequence[Part], several: Sequence[Part]) -> list[float]:
    """For each class the number of independent rows that would tell as much as its rows.

    Between that of patients and that of rows: how alike rows of a patient are is estimated from
    all classes of several patients together.
    """
    variance = sum(part.variance for part in several)
    ratio = sum(part.independent for part in several) / variance if variance > 0 else 0.0
    return [float(np.clip(part.rows * ratio, part.units, part.rows)) for part in parts]


def _shape(m: float, n: float) -> tuple[float, float]:
    """For the two formulas: of m independent positives and n independent negatives."""
    m, n = max(1.0, m), max(1.0, n)
    return 1 / (m * n), ((m + n) / 2 - 1) / (m * n)


def _expected(auc: float, shape: tuple[float, float]) -> float:
    """The variance of an AUC by a formula that few distributions exceed.

    Source: Newcombe, Stat. Med. 25 (2006), 559, method 5, of Hanley and McNeil's exponential model.
    Near 1, in small samples from about 0.99 on, it exceeds `binormal` without bound, and is cut at
    twice that: limits change as the latter does, so that one misordered pair would otherwise be
    given a lower limit than none.
    """
    auc = float(np.clip(auc, 0, 1))  # the mean of differences may be below 0
    curve = (1 - auc) / (2 - auc) + auc / (1 + auc)
    newcombe = auc * (1 - auc) * (shape[0] + shape[1] * curve)
    return min(newcombe, MOST * binormal(auc, shape))


def binormal(auc: float, shape: tuple[float, float]) -> float:
    """The variance of an AUC of normal scores of equal variance.

    Two positives are both above one negative with the probability auc - 2 T(h, 1 / sqrt(3)), where
    h is the normal quantile of auc and T is Owen's (Owen, Ann. Math. Stat. 27 (1956), 1075). Near 1
    this falls faster than Newcombe's formula: of 10 positives and 40 negatives it is 0.97, 0.78 and
    0.52 of that at 0.8, 0.95 and 0.99; the variances of 4,000 draws were 0.97, 0.73 and 0.52 of it.
    """
    if not 0 < auc < 1:
        return 0.0
    shared = auc - 2 * special.owens_t(special.ndtri(auc), 1 / np.sqrt(3)) - auc**2
    return auc * (1 - auc) * shape[0] + 2 * max(0.0, float(shared)) * shape[1]
