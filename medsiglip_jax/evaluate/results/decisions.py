"""What two evaluations decide of the same images: at thresholds, and by the highest score."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import aggregation, learned, scores
from medsiglip_jax.evaluate.results import aucs, figures, held_out
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.units import Unit
from medsiglip_jax.files import places

_SHARES = ("sensitivity", "specificity")
# Scores of validation images that belong to those of test images.
_VALIDATION = {scores.FILE: learned.VALIDATION, learned.PROBE: learned.PROBE_VALIDATION}


def compare(
    a: Scores,
    b: Scores,
    folders: Sequence[places.Place],
    file: str,
    units: tuple[Unit, Unit] | None = None,
) -> list[dict[str, Any]]:
    """Sensitivities and specificities of both, at thresholds of their own validation images.

    Args:
        a: scores of folder A.
        b: those of folder B, for the same images and classes.
        folders: A and B.
        file: the name of the file of scores.
        units: what images of A and of B are judged per; None is single images.

    Returns:
        A row for each class, rule and share, with the p of `metrics.paired_shares`; none where a
        folder has no scores of validation images.

    Raises:
        ValueError: the validation images of a folder are of another run, or its images have no
            splits although splits were drawn.
    """
    paths = [folder / _VALIDATION[file] for folder in folders if file in _VALIDATION]
    # A run without --learn leaves the validation scores of the run before it.
    of_these = file != scores.FILE or (a.meta.get("learned") and b.meta.get("learned"))
    if not paths or not of_these or not all(path.is_file() for path in paths):
        return []
    read = [scores.read(path) for path in paths]
    for path, side, validation in zip(paths, (a, b), read, strict=True):
        if run := side.meta.get("run"):
            scores.check_runs(path.parent, run, {path.name: validation.meta.get("run")})
    test = _test_images(a, folders[0], file) & _test_images(b, folders[1], file)
    of_others = any(sorted(validation.classes) != sorted(a.classes) for validation in read)
    if of_others or not test.any():
        return []
    chosen = [scores.in_order(validation, a.classes) for validation in read]
    rows = np.flatnonzero(test)
    sides = [a.select(rows), b.select(rows)]
    if units:  # of patients: of validation images nothing else is known
        chosen, sides = (
            aggregation.both(part, units, exclusive(a), {}) for part in (chosen, sides)
        )
    return [row for j in range(len(a.classes)) for row in _class(j, chosen, sides)]


def _test_images(side: Scores, folder: places.Place, file: str) -> np.ndarray:
    """Which images are held out: others may have been drawn for training or validation."""
    facts = side.meta.get("learned") or {}
    if file != scores.FILE or not facts.get("drawn"):
        return np.ones(len(side.ids), bool)
    columns, _ = scores.read_columns(folder / scores.IMAGES)
    if not {"id", scores.PART} <= columns.keys():
        raise ValueError(
            f"{folder / scores.IMAGES}: no columns id and {scores.PART}; evaluate again"
        )
    part_of = dict(zip(columns["id"], columns[scores.PART], strict=True))
    return np.array([part_of.get(id) == "test" for id in side.ids])


def _class(
    column: int, chosen: Sequence[Scores], sides: Sequence[Scores]
) -> Iterator[dict[str, Any]]:
    of_validation = [scores.known(own, column) for own in chosen]
    of_a, of_b, labels, units = scores.common(sides[0], sides[1], column)
    if not all(len(np.unique(rows.positive)) == 2 for rows in of_validation) or not len(labels):
        return
    for rule, at_least in held_out.RULES:
        thresholds = [
            metrics.choose_threshold(rows.scores, rows.positive, rule, at_least)
            for rows in of_validation
        ]
        called = of_a >= thresholds[0], of_b >= thresholds[1]
        for share in _SHARES:
            positive = share == "sensitivity"
            of = labels == positive
            right = [side[of] == positive for side in called]
            groups = None if units is None else units[of]
            yield {
                "class": sides[0].classes[column],
                "rule": rule,
                "at_least": at_least,
                "share": share,
                "thresholds": thresholds,
                **_compared(right[0], right[1], groups),
                "few": len(right[0] if groups is None else np.unique(groups)) < metrics.FEW,
            }


def _compared(first: np.ndarray, second: np.ndarray, groups: Any) -> dict[str, Any]:
    test = metrics.paired_shares(second, first, groups)
    return {
        "first": float(first.mean()) if len(first) else np.nan,
        "second": float(second.mean()) if len(second) else np.nan,
        **aucs.limits(test.difference, "difference"),
        "only_first": test.second_only,
        "only_second": test.first_only,
        "chi_square": test.chi_square,
        "p": test.p,
        "p_exact": test.p_exact,
        "rows": len(first),
    }


def of_classes(a: Scores, b: Scores, statistics: aucs.Statistics) -> dict[str, Any] | None:
    """Accuracy and so on of images with one class; None for tasks of findings.

    The accuracy also has McNemar's test.
    """
    if not exclusive(a):
        return None
    (of_a, units, labels), (of_b, _, _) = figures.one_class(a), figures.one_class(b)
    if not len(labels) or not (a.learned.all() and b.learned.all()):
        return None
    named = of_a.argmax(axis=1), of_b.argmax(axis=1)
    differences = metrics.class_figures_pair(
        named[1], named[0], labels, groups=units, samples=statistics.resamples, seed=statistics.seed
    )
    right = _compared(named[0] == labels, named[1] == labels, units)
    del differences["accuracy"]  # `right` has it
    if not _graded(a):
        del differences["quadratic_kappa"]
    return {
        "accuracy": right,
        "figures": {
            name: {
                "first": getattr(metrics, name)(named[0], labels),
                "second": getattr(metrics, name)(named[1], labels),
                **aucs.limits(difference, "difference"),
            }
            for name, difference in differences.items()
        },
    }


def exclusive(side: Scores) -> bool:
    """Whether an image shows exactly one class."""
    return (side.meta.get("task") or {}).get("kind") == "multi_class"


def _graded(side: Scores) -> bool:
    return bool((side.meta.get("task") or {}).get("ordinal_from"))
