"""How often intervals cover the truth, by patient: `bench.py coverage` runs it.

A cell is a kind of data set, drawn again and again from a distribution whose truth is known.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator

import bench_evaluate
import measure

AUCS = (0.6, 0.7, 0.8, 0.9, 0.95)
CHEXPERT = tuple(k / 500 for k in bench_evaluate.POSITIVES.values())


@dataclasses.dataclass(frozen=True)
class Cell:
    """Patients with images, classes, and how alike the images of a patient are.

    Attributes:
        patients: number of them.
        images: of each patient.
        shares: of the classes, or prevalences of findings.
        aucs: the truth, one for each class.
        alike: share of the variance of scores that the images of a patient have in common.
        same: probability that an image has the labels of its patient.
        exclusive: whether an image has exactly one class.
    """

    patients: int
    images: int
    shares: tuple[float, ...]
    aucs: tuple[float, ...]
    alike: float = 0.0
    same: float = 0.0
    exclusive: bool = True

    def draw(self, rng):
        """Scores and labels [n, c], and the patient of each image."""
        import numpy as np
        from scipy import special

        units, count = np.repeat(np.arange(self.patients), self.images), len(self.shares)
        of_patient = rng.random(len(units)) < self.same
        labels = self._labels(rng, self.patients)[units]
        labels = np.where(of_patient[:, None], labels, self._labels(rng, len(units)))
        shared = rng.normal(size=(self.patients, count))[units]
        noise = math.sqrt(self.alike) * shared
        noise += math.sqrt(1 - self.alike) * rng.normal(size=(len(units), count))
        return noise + math.sqrt(2) * special.ndtri(self.aucs) * labels, labels * 1.0, units

    def _labels(self, rng, n: int):
        import numpy as np

        if not self.exclusive:
            return rng.random((n, len(self.shares))) < self.shares
        chosen = rng.choice(len(self.shares), n, p=self.shares)
        return chosen[:, None] == np.arange(len(self.shares))


def _long_tail(classes: int, power: float = 1.0) -> tuple[float, ...]:
    weights = [1 / k**power for k in range(1, classes + 1)]
    return tuple(w / sum(weights) for w in weights)


def _spaced(classes: int) -> tuple[float, ...]:
    """AUCs from 0.62 to 0.97, which do not follow the frequency of the classes."""
    order = [(k * 37) % classes for k in range(classes)]
    return tuple(1 / (1 + math.exp(-(0.5 + 3 * k / (classes - 1)))) for k in order)


EVEN = (0.2,) * 5
MEANS = {
    "5 classes, 200 images": Cell(200, 1, EVEN, AUCS),
    "5 classes, 60 patients x 5 images": Cell(60, 5, EVEN, AUCS, alike=0.5, same=1),
    "5 classes, 8 patients x 20 images": Cell(8, 20, EVEN, AUCS, alike=0.4, same=0.3),
    "5 classes, 20 patients x 20 images, a class each": Cell(20, 20, EVEN, AUCS, 0.8, 1),
    "5 classes, 2 patients x 20 images": Cell(2, 20, EVEN, AUCS, alike=0.4, same=0.3),
    "5 nearly perfect classes, 50 images": Cell(50, 1, EVEN, (0.995,) * 5),
    "13 findings, 500 patients": Cell(500, 1, CHEXPERT, _spaced(13), exclusive=False),
    "13 findings, 100 patients x 3 images":
        Cell(100, 3, CHEXPERT, _spaced(13), alike=0.4, same=0.8, exclusive=False),
    "79 long-tailed classes, 400 images": Cell(400, 1, _long_tail(79), _spaced(79)),
    "79 less long-tailed classes, 400 images": Cell(400, 1, _long_tail(79, 0.5), _spaced(79)),
}  # fmt: skip
# Of one finding: (cell, share of the patients or images in the subgroup, AUC of the others).
GAPS = {
    "200 and 200 patients": (Cell(400, 1, (0.3,), (0.8,), exclusive=False), 0.5, 0.8),
    "40 and 360 patients": (Cell(400, 1, (0.3,), (0.8,), exclusive=False), 0.1, 0.8),
    "40 and 360 patients, prevalence 0.15":
        (Cell(400, 1, (0.15,), (0.9,), exclusive=False), 0.1, 0.8),
    "30 and 70 patients x 4 images":
        (Cell(100, 4, (0.3,), (0.8,), 0.5, 0.9, exclusive=False), 0.3, 0.7),
    "views of 100 patients x 4 images":
        (Cell(100, 4, (0.3,), (0.85,), 0.5, 0.9, exclusive=False), 0.3, 0.75),
    "60 and 140 patients, AUC 0.99":
        (Cell(200, 1, (0.2,), (0.99,), exclusive=False), 0.3, 0.99),
}  # fmt: skip
# Of one finding, at the threshold 0.
POINTS = {
    "60 patients x 5 images": Cell(60, 5, (0.5,), (0.8,), 0.8, 1, exclusive=False),
    "200 patients x 2 images": Cell(200, 2, (0.2,), (0.9,), 0.5, 0.9, exclusive=False),
    "300 images": Cell(300, 1, (0.1,), (0.9,), exclusive=False),
    "20 patients x 10 images": Cell(20, 10, (0.5,), (0.8,), 0.6, 0.5, exclusive=False),
}


def rows(draws: int) -> Iterator[dict]:
    """A row for each cell: how many of the intervals hold the truth, and how wide they are."""
    for kind, cells, of in (
        ("mean AUC", MEANS, _of_mean),
        ("difference of mean AUCs", MEANS, _of_difference),
        ("AUC of a subgroup, and its gap", GAPS, _of_gap),
        ("sensitivity, specificity and so on", POINTS, _of_point),
    ):
        for name, cell in cells.items():
            tallies: dict[str, Tally] = {}
            for seed in range(draws):
                for what, truth, interval in of(cell, seed):
                    tallies.setdefault(what, Tally()).add(truth, interval)
            row = {"kind": kind, "cell": name, **{k: str(t) for k, t in tallies.items()}}
            measure.progress(str(row))
            yield row


@dataclasses.dataclass
class Tally:
    """Intervals of one quantity."""

    held: int = 0
    withheld: int = 0
    widths: list[float] = dataclasses.field(default_factory=list)

    def add(self, truth: float, interval) -> None:
        if math.isnan(interval.low):
            self.withheld += 1
        elif not math.isnan(truth):
            self.held += float(truth) in interval
            self.widths.append(interval.high - interval.low)

    def __str__(self) -> str:
        of = len(self.widths)
        withheld = f"withheld {self.withheld / (of + self.withheld):.1%}" * (self.withheld > 0)
        shown = f"{self.held / of:.1%} ({statistics.mean(self.widths):.3f})" if of else ""
        return " ".join(filter(None, (shown, withheld)))


def _of_mean(cell: Cell, seed: int):
    import numpy as np

    from medsiglip_jax.metrics import macro_delong

    scores, labels, units = cell.draw(np.random.default_rng([1, seed]))
    found = macro_delong(scores, labels, groups=units)
    there = labels.any(0) & ~labels.all(0)
    yield "mean", np.mean(np.array(cell.aucs)[there]) if there.any() else math.nan, found.auc


def _of_difference(cell: Cell, seed: int):
    """Of two scores of the same images that are equally good and share half of the noise."""
    import numpy as np

    from medsiglip_jax.metrics import macro_delong_test

    rng = np.random.default_rng([2, seed])
    shared, labels, units = cell.draw(rng)
    first, second = shared + rng.normal(size=(2, *shared.shape))
    yield "difference", 0.0, macro_delong_test(first, second, labels, groups=units).difference


def _of_gap(case: tuple[Cell, float, float], seed: int):
    import numpy as np
    from scipy import special

    from medsiglip_jax.metrics import subgroup_aucs

    (cell, share, others), rng = case, np.random.default_rng([3, seed])
    scores, labels, units = cell.draw(rng)
    views = cell.aucs[0] == 0.85
    inside = rng.random(len(units) if views else cell.patients) < share
    inside = inside if views else inside[units]
    lower = special.ndtri(others) - special.ndtri(cell.aucs[0])
    values = scores[:, 0] + np.where(inside, 0, math.sqrt(2) * lower) * labels[:, 0]
    found = {g.name: g for g in subgroup_aucs(values, labels[:, 0], inside, groups=units)}
    if "True" in found:
        yield "AUC", cell.aucs[0], found["True"].auc
        yield "gap", cell.aucs[0] - others, found["True"].gap


def _of_point(cell: Cell, seed: int):
    """At the threshold in the middle between the means of positives and negatives."""
    import numpy as np
    from scipy import special

    from medsiglip_jax.metrics import operating_point

    scores, labels, units = cell.draw(np.random.default_rng([4, seed]))
    middle = special.ndtri(cell.aucs[0]) / math.sqrt(2)
    rate, prevalence = float(special.ndtr(middle)), cell.shares[0]
    called = prevalence * rate + (1 - prevalence) * (1 - rate)
    truth = {
        "sensitivity": rate, "specificity": rate, "ppv": prevalence * rate / called,
        "npv": (1 - prevalence) * rate / (1 - called),
    }  # fmt: skip
    by_patient = operating_point(scores[:, 0], labels[:, 0], middle, groups=units)
    by_image = operating_point(scores[:, 0], labels[:, 0], middle)
    for name, value in truth.items():
        yield name, value, getattr(by_patient, name)
    yield "sensitivity by image", truth["sensitivity"], by_image.sensitivity
