"""Two evaluations of the same images: how far apart their AUCs are, per class and on average.

Both are of the same patients, so differences are paired: an image that is hard is hard for both,
which cancels. Whether the two intervals overlap does not answer the question.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import scores
from medsiglip_jax.evaluate.results import aucs
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.files import places
from medsiglip_jax.files.json import plain

_NAMED = 3  # images or classes in a message


def compare(
    first: places.Given,
    second: places.Given,
    *,
    file: str = scores.FILE,
    allow_missing: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the AUCs of two evaluations, paired, by patient where patients are known.

    A class has DeLong's interval of the difference and its p, also adjusted by Holm for the number
    of classes. The mean over classes has a bootstrap interval; each resample has its own mean. Few
    positives make intervals too narrow and p too small: classes with fewer than 10 are flagged.

    Args:
        first: folder A, which evaluate wrote.
        second: folder B; differences are B minus A.
        file: of the scores, in both folders.
        allow_missing: compare the images that both have; by default both need the same images.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        JSON: `images`, `groups`, `left_out`, `macro`, `classes`, `differs` (provenance) and
        `statistics`. None stands where a number is undefined.

    Raises:
        FileNotFoundError: a folder has no such file.
        ValueError: the two are of different images, classes, labels or patients, or have no class
            with scores in common; or one is of pairs.
    """
    folders = places.at(first), places.at(second)
    for folder in folders:
        if scores.of_pairs(folder):
            raise ValueError(
                f"{folder}: is of pairs, images with texts and without classes, which have no AUC "
                "to compare; its report.md has the recalls"
            )
    a, b = (scores.read(folder / file) for folder in folders)
    a, b, left_out = _same_images(a, b, allow_missing)
    b = _same_classes(a, b)
    _check_labels(a, b)
    if not (a.learned & b.learned).any():
        raise ValueError(f"no class has scores in {file} of both A and B")
    classes = [_class(a, b, j) for j in range(len(a.classes))]
    adjusted = metrics.holm([c["p"] for c in classes])
    content = {
        "first": str(folders[0]),
        "second": str(folders[1]),
        "images": len(a.ids),
        "groups": a.groups and len(set(a.groups)),
        "left_out": dict(zip(("first", "second"), left_out, strict=True)),
        "macro": _macro(a, b),
        "classes": [{**c, "p_holm": p} for c, p in zip(classes, adjusted, strict=True)],
        "differs": _differences(a.meta.get("provenance", {}), b.meta.get("provenance", {})),
        "statistics": {"resamples": resamples, "seed": seed},
    }
    return plain(content)


# ------------------------------------------------------------------------------- are they the same


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


def _same_classes(a: Scores, b: Scores) -> Scores:
    """The second with its classes in the order of the first."""
    only_a = [name for name in a.classes if name not in b.classes]
    only_b = [name for name in b.classes if name not in a.classes]
    if only_a or only_b:
        raise ValueError(f"different classes: {_some(only_a)} only in A, {_some(only_b)} only in B")
    order = [b.classes.index(name) for name in a.classes]
    return replace(b, classes=a.classes, scores=b.scores[:, order], labels=b.labels[:, order])


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


def _class(a: Scores, b: Scores, column: int) -> dict[str, Any]:
    counts = aucs.counts(a.labels[:, column], a.units)
    of_a, of_b, labels, units = scores.common(a, b, column)
    test = metrics.delong_test(of_b, of_a, labels, groups=units)
    return {
        "class": a.classes[column],
        "first": metrics.auc(of_a, labels),
        "second": metrics.auc(of_b, labels),
        **aucs.limits(test.difference, "difference"),
        "p": test.p,
        **counts,
        "unknown": len(a.ids) - counts["positives"] - counts["negatives"],
    }


def _macro(a: Scores, b: Scores) -> dict[str, Any]:
    columns = a.learned & b.learned
    labels, of_a, of_b = a.labels[:, columns], a.scores[:, columns], b.scores[:, columns]
    test = metrics.macro_delong_test(of_b, of_a, labels, groups=a.units)
    return {
        "classes": sum({0, 1} <= set(column[~np.isnan(column)]) for column in labels.T),
        "first": metrics.macro_auc(of_a, labels),
        "second": metrics.macro_auc(of_b, labels),
        **aucs.limits(test.difference, "difference"),
        "p": test.p,
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
