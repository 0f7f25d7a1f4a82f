"""Evaluations of the same images: how far apart their AUCs are, per class and on average.

Both are of the same patients, so differences are paired: an image that is hard is hard for both,
which cancels. Whether the two intervals overlap does not answer the question.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import aggregation, scores
from medsiglip_jax.evaluate.results import aucs, decisions
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.evaluate.units import Unit
from medsiglip_jax.files import places, settings
from medsiglip_jax.files.json import plain

_NAMED = 3  # images or classes in a message


def compare(
    first: places.Given,
    second: places.Given,
    *,
    file: str = scores.FILE,
    allow_missing: bool = False,
    margin: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares two evaluations, paired, by patient where patients are known.

    Where both were judged per patient, or per the same attribute, so is the comparison; where only
    one was, images are compared, with a warning.

    A class has DeLong's interval of the difference of its AUCs and its p, also adjusted by Holm for
    the number of classes; the mean over classes likewise. Classes with or without which there are
    fewer than 10 patients are flagged. Where both folders have scores of validation images, each
    side's thresholds are chosen on its own, and sensitivities and specificities on test images are
    compared; where images have one class, so are accuracy, F1 and so on.

    Args:
        first: folder A, which evaluate wrote.
        second: folder B; differences are B minus A.
        file: the name of the file of scores, in both folders.
        allow_missing: compare the images that both have; by default both need the same images.
        margin: AUC that B may be worse by and yet count as not inferior: then the lower limit of
            the difference lies above its negative.
        resamples: the number of resamples of the bootstrap, for accuracy and the like.
        seed: the seed of the bootstrap.

    Returns:
        JSON: `images`, `unit`, `groups`, `left_out`, `margin`, `macro`, `classes`,
        `operating_points`, `one_class_each`, `differs` (provenance) and `statistics`. None stands
        where a number is undefined.

    Raises:
        FileNotFoundError: a folder has no such file.
        ValueError: the two are of different images, classes, labels or patients, or have no class
            with scores in common; one is of pairs; or `margin` is out of range.
    """
    if margin is not None and not 0 < margin < 1:
        raise ValueError(f"margin is {margin:g}; expected an AUC above 0 and below 1, such as 0.02")
    folders = places.at(first), places.at(second)
    for folder in folders:
        if scores.of_pairs(folder):
            raise ValueError(
                f"{folder}: is of pairs, images with texts and without classes, which have no AUC "
                "to compare; its report.md has the recalls"
            )
    a, b = (scores.read(folder / file) for folder in folders)
    units = _same_units(a, b)
    a, b, left_out = _same_images(a, b, allow_missing)
    b = _same_classes(a, b)
    _check_labels(a, b)
    points, images = decisions.compare(a, b, folders, file, units), len(a.ids)
    if units:
        attributes = _attributes(folders[0], a)
        a, b = aggregation.both((a, b), units, decisions.exclusive(a), attributes)
    if not (a.learned & b.learned).any():
        raise ValueError(f"no class has scores in {file} of both A and B")
    classes = _adjusted([_class(a, b, j, margin) for j in range(len(a.classes))])
    statistics = aucs.Statistics(resamples, seed)
    each = decisions.of_classes(a, b, statistics)
    content = {
        "first": str(folders[0]),
        "second": str(folders[1]),
        "images": images,
        "unit": units and _unit(units, len(a.ids)),
        "groups": a.groups and len(set(a.groups)),
        "left_out": dict(zip(("first", "second"), left_out, strict=True)),
        "margin": margin,
        "macro": _macro(a, b, margin),
        "classes": classes,
        "operating_points": _adjusted(points),
        "one_class_each": each and {**each, "accuracy": _adjusted([each["accuracy"]])[0]},
        "differs": _differences(a.meta.get("provenance", {}), b.meta.get("provenance", {})),
        "statistics": statistics._asdict(),
    }
    return plain(content)


def compare_all(
    first: places.Given, others: Sequence[places.Given], **options: Any
) -> list[dict[str, Any]]:
    """Compares several evaluations with the first one.

    Args:
        first: folder A.
        others: folders, each compared with A.
        options: the other arguments of `compare`.

    Returns:
        What `compare` returns, for each of `others`; their p-values are adjusted by Holm for all
        of them together.

    Raises:
        FileNotFoundError, ValueError: as `compare`.
    """
    comparisons = [_named(first, other, **options) for other in others]
    for key in ("classes", "operating_points"):
        rows = _adjusted([row for content in comparisons for row in content[key]])
        for content in comparisons:
            content[key], rows = rows[: len(content[key])], rows[len(content[key]) :]
    single = [each for content in comparisons if (each := content["one_class_each"])]
    for each, accuracy in zip(single, _adjusted([e["accuracy"] for e in single]), strict=True):
        each["accuracy"] = accuracy
    macros = _adjusted([content["macro"] for content in comparisons])
    pairs = zip(comparisons, macros, strict=True)
    return plain([{**content, "macro": macro} for content, macro in pairs])


def _named(first: places.Given, other: places.Given, **options: Any) -> dict[str, Any]:
    """`compare`, whose errors name the folder."""
    try:
        return compare(first, other, **options)
    except ValueError as error:
        raise ValueError(f"A is {first}, B is {other}: {error}") from None


def _adjusted(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With p-values adjusted by Holm for all rows; None is no test."""
    p = [np.nan if row["p"] is None else row["p"] for row in rows]
    pairs = zip(rows, metrics.holm(p).tolist(), strict=True)
    return [{**row, "p_holm": adjusted} for row, adjusted in pairs]


# ------------------------------------------------------------------------------- are they the same


def aligned(a: Scores, b: Scores) -> Scores:
    """The second with the images and classes in the order of the first.

    Raises:
        ValueError: the two are of different images, classes, labels or patients.
    """
    _, b, _ = _same_images(a, b, allow_missing=False)
    b = _same_classes(a, b)
    _check_labels(a, b)
    return b


def _same_images(a: Scores, b: Scores, allow_missing: bool) -> tuple[Scores, Scores, list[int]]:
    """Both in the order of the first, and how many images of each are left out."""
    in_a, in_b = ({id: row for row, id in enumerate(side.ids)} for side in (a, b))
    only_a, only_b = [id for id in in_a if id not in in_b], [id for id in in_b if id not in in_a]
    if (only_a or only_b) and not allow_missing:
        raise ValueError(
            f"different images: {_some(only_a)} only in A, {_some(only_b)} only in B; "
            "--allow-missing compares those that both have"
        )
    common = [id for id in in_a if id in in_b]
    if not common:
        raise ValueError("no image is in both A and B; are they of the same data set?")
    rows_a, rows_b = (np.array([rows[id] for id in common]) for rows in (in_a, in_b))
    return a.select(rows_a), b.select(rows_b), [len(only_a), len(only_b)]


def _same_units(a: Scores, b: Scores) -> tuple[Unit, Unit] | None:
    """What both were judged per, and how each combined scores; None for images."""
    given = [side.meta.get("unit") for side in (a, b)]
    units = [unit and settings.build(Unit, unit, "unit") for unit in given]
    first, second = units
    if first and second and first.per == second.per:
        return first, second
    if any(units):
        judged = " and ".join(f"per {unit.per}" if unit else "per image" for unit in units)
        warnings.warn(f"A and B are judged {judged}; what is compared here is images", stacklevel=3)
    return None


def _unit(units: tuple[Unit, Unit], count: int) -> dict[str, Any]:
    return {"per": units[0].per, "count": count, "aggregates": [unit.aggregate for unit in units]}


def _attributes(folder: places.Place, side: Scores) -> dict[str, list[str]]:
    """Columns of the images that are compared; none of a probe's, which are judged per patient."""
    columns, _ = scores.read_columns(folder / scores.IMAGES)
    row_of = {id: row for row, id in enumerate(columns.pop("id"))}
    if not row_of.keys() >= set(side.ids):
        return {}
    rows = [row_of[id] for id in side.ids]
    return {name: [column[row] for row in rows] for name, column in columns.items()}


def _same_classes(a: Scores, b: Scores) -> Scores:
    """The second with its classes in the order of the first."""
    only_a = [name for name in a.classes if name not in b.classes]
    only_b = [name for name in b.classes if name not in a.classes]
    if only_a or only_b:
        raise ValueError(f"different classes: {_some(only_a)} only in A, {_some(only_b)} only in B")
    return scores.in_order(b, a.classes)


def _check_labels(a: Scores, b: Scores) -> None:
    apart = np.argwhere(~((a.labels == b.labels) | (np.isnan(a.labels) & np.isnan(b.labels))))
    if len(apart):
        i, j = apart[0]
        shown = ("unknown" if np.isnan(x) else f"{x:g}" for x in (a.labels[i, j], b.labels[i, j]))
        raise ValueError(
            f"{len(apart):,} labels differ, the first of image {a.ids[i]}, class {a.classes[j]}: "
            f"{' in A, '.join(shown)} in B; evaluate both with the same labels and policy"
        )
    if a.groups != b.groups:
        raise ValueError("the images belong to different patients in A and B; evaluate both again")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return f"{len(names):,} ({shown})" if names else "none"


# ---------------------------------------------------------------------------------------- numbers


def _class(a: Scores, b: Scores, column: int, margin: float | None) -> dict[str, Any]:
    counts = aucs.counts(a.labels[:, column], a.units)
    of_a, of_b, labels, units = scores.common(a, b, column)
    test = metrics.delong_test(of_b, of_a, labels, groups=units)
    return {
        "class": a.classes[column],
        "first": metrics.auc(of_a, labels),
        "second": metrics.auc(of_b, labels),
        **_tested(test, margin),
        **counts,
        "unknown": len(a.ids) - counts["positives"] - counts["negatives"],
    }


def _tested(test: metrics.Comparison, margin: float | None) -> dict[str, Any]:
    """The difference, its p, and whether it rules out that B is worse by the margin."""
    low = test.difference.low
    not_inferior = None if margin is None or np.isnan(low) else bool(low > -margin)
    return {
        **aucs.limits(test.difference, "difference"),
        "p": test.p,
        "not_inferior": not_inferior,
    }


def _macro(a: Scores, b: Scores, margin: float | None) -> dict[str, Any]:
    columns = a.learned & b.learned
    labels, of_a, of_b = a.labels[:, columns], a.scores[:, columns], b.scores[:, columns]
    test = metrics.macro_delong_test(of_b, of_a, labels, groups=a.units)
    return {
        "classes": sum({0, 1} <= set(column[~np.isnan(column)]) for column in labels.T),
        "first": metrics.macro_auc(of_a, labels),
        "second": metrics.macro_auc(of_b, labels),
        **_tested(test, margin),
    }


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What was done differently: key -> both values; keys of tables are "table.key"."""
    sides = [dict(_flat(side)) for side in (first, second)]
    keys = dict.fromkeys([*sides[0], *sides[1]])
    pairs = {key: [side.get(key) for side in sides] for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
