"""Scores of images -> one score of what several images are of: a patient, a study, a slide."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from medsiglip_jax.evaluate import zero_shot
from medsiglip_jax.evaluate.learned import Learned
from medsiglip_jax.evaluate.results.calibrated import PROBABILITIES
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.evaluate.units import NOISY_OR, PATIENT, Unit, combine, noisy_or_of_log_odds


def check(
    unit: Unit,
    task: Task,
    groups: Sequence[str] | None,
    attributes: Mapping[str, Sequence[str]],
    learning: bool,
) -> None:
    """Raises ValueError unless images of this task can be judged by this unit.

    Args:
        unit: what is to be judged.
        task: whose images are scored.
        groups: patient of each image, if known.
        attributes: name -> value per image.
        learning: whether anything is learned from other images.
    """
    if task.kind == "pairs":
        raise ValueError("pairs of images and texts have no scores to combine")
    if learning and unit.per != PATIENT:
        raise ValueError(f"per is {unit.per}; with --learn only {PATIENT} can be judged")
    probable = task.score in PROBABILITIES or zero_shot.rule(task.score).log_odds
    if unit.aggregate == NOISY_OR and not probable:
        raise ValueError(
            f"{NOISY_OR} needs probabilities, and scores by {task.score} are none; use --score "
            "pair_softmax, or another --aggregate"
        )
    nobody = np.zeros((len(groups or ()), 0))
    images = Scores([""] * len(nobody), [], nobody, nobody, groups, {})
    unit_of = names(unit, images, attributes)
    if groups is not None:
        _groups(images, _rows(unit_of))


def names(unit: Unit, scores: Scores, attributes: Mapping[str, Sequence[str]]) -> list[str]:
    """The unit of each image.

    Raises:
        ValueError: the data does not say it, or not for every image.
    """
    if unit.per == PATIENT:
        if scores.groups is None:
            raise ValueError("per is patient, and the data names no patients; give an attribute")
        return list(scores.groups)
    if unit.per not in attributes:
        known = ", ".join((PATIENT, *attributes))
        raise ValueError(f"per is {unit.per!r}; expected one of {known}")
    column = list(attributes[unit.per])
    if empty := column.count(""):
        raise ValueError(f"per is {unit.per}, and {empty:,} of {len(column):,} images have none")
    return column


def both(
    sides: Sequence[Scores],
    units: Sequence[Unit],
    exclusive: bool,
    attributes: Mapping[str, Sequence[str]],
) -> list[Scores]:
    """`of_units` of two evaluations of the same images, which share attributes."""
    return [
        of_units(side, names(unit, side, attributes), unit.aggregate, exclusive)
        for side, unit in zip(sides, units, strict=True)
    ]


def of_units(scores: Scores, unit_of: Sequence[str], aggregate: str, exclusive: bool) -> Scores:
    """One row for each unit, in the order in which they appear.

    A unit has a finding if one of its images has it, and lacks it if none has it and one lacks it.
    A unit whose images are of several exclusive classes has no label.

    Args:
        scores: of images.
        unit_of: the unit of each image.
        how: see `units.combine`.
        exclusive: whether an image shows exactly one class.

    Raises:
        ValueError: a unit is of several patients.
    """
    rows = _rows(unit_of)
    combined = (
        noisy_or_of_log_odds if aggregate == NOISY_OR and scores.log_odds else combine(aggregate)
    )
    labels = np.stack([_label(scores.labels[members], exclusive) for members in rows.values()])
    values = np.stack([combined(scores.scores[members]) for members in rows.values()])
    groups = _groups(scores, rows)
    return replace(scores, ids=list(rows), scores=values, labels=labels, groups=groups)


def _rows(unit_of: Sequence[str]) -> dict[str, np.ndarray]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(unit_of):
        rows.setdefault(name, []).append(row)
    return {name: np.array(members) for name, members in rows.items()}


def _label(labels: Float[np.ndarray, "k c"], exclusive: bool) -> Float[np.ndarray, " c"]:
    known = ~np.isnan(labels)
    label = np.where(known, labels, -1).max(axis=0)
    label = np.where(known.any(axis=0), label, np.nan)
    return np.full_like(label, np.nan) if exclusive and np.nansum(label) > 1 else label


def _groups(scores: Scores, rows: Mapping[str, np.ndarray]) -> list[str] | None:
    """The patient of each unit; None where each unit is a patient."""
    if scores.groups is None:
        return None
    column = list(scores.groups)
    groups = {name: {column[int(i)] for i in members} for name, members in rows.items()}
    if several := [name for name, patients in groups.items() if len(patients) > 1]:
        raise ValueError(
            f"{len(several):,} units have images of several patients, the first: {several[0]!r}; "
            "choose another column"
        )
    patients = [next(iter(group)) for group in groups.values()]
    return None if len(set(patients)) == len(patients) else patients


def of_attributes(
    attributes: Mapping[str, Sequence[str]], unit_of: Sequence[str]
) -> dict[str, list[str]]:
    """What the images of a unit have in common; "" where they differ."""
    rows = _rows(unit_of)

    def common(column: Sequence[str], members: np.ndarray) -> str:
        values = {column[int(i)] for i in members}
        return values.pop() if len(values) == 1 else ""

    return {
        name: [common(column, members) for members in rows.values()]
        for name, column in attributes.items()
    }


def of_learned(learned: Learned, unit: Unit, exclusive: bool) -> Learned:
    """The same of what was learned; the unit is a patient, since attributes of validation images
    are not known."""
    sides = ("zero_shot", "validation", "probe", "probe_validation", "knn")
    given = {name: getattr(learned, name) for name in sides}
    changed = {
        name: of_units(side, names(unit, side, {}), unit.aggregate, exclusive)
        for name, side in given.items()
        if side is not None
    }
    return replace(learned, **changed)
