"""Two evaluations of the same images -> how far apart they are, class by class and on the whole.

Both are of the same patients, so differences are paired: what is hard in an image is so for both,
and cancels. Two intervals that overlap say nothing about that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.evaluate import aucs, scores
from medsiglip_jax.evaluate.report import tables
from medsiglip_jax.evaluate.report.tables import Section, interval, number, p_value, signed
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.files import places
from medsiglip_jax.files.places import Given
from medsiglip_jax.metrics.subgroups import FEW

_NAMED = 3  # images or classes in a message


def compare(
    first: Given,
    second: Given,
    *,
    file: str = scores.FILE,
    allow_missing: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the AUCs of two evaluations, paired, by patient where patients are known.

    Of a class: DeLong's interval of the difference and its p, which Holm adjusts for the number of
    classes. Of the mean over classes: a bootstrap interval, the mean being inside the loop. Few
    positives make intervals too narrow and p too small: classes with fewer than 10 are flagged.

    Args:
        first: folder that evaluate wrote, A.
        second: another, B; differences are B minus A.
        file: of the scores, in both folders.
        allow_missing: compare the images that both have; default, both have to have the same.
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
    found = [_class(a, b, j) for j in range(len(a.classes))]
    adjusted = metrics.holm([c["p"] for c in found])
    return aucs.plain(
        {
            "first": str(folders[0]),
            "second": str(folders[1]),
            "images": len(a.ids),
            "groups": a.groups and len(set(a.groups)),
            "left_out": dict(zip(("first", "second"), left_out, strict=True)),
            "macro": _macro(a, b, resamples, seed),
            "classes": [{**c, "p_holm": p} for c, p in zip(found, adjusted, strict=True)],
            "differs": _differences(a.meta.get("provenance", {}), b.meta.get("provenance", {})),
            "statistics": {"resamples": resamples, "seed": seed},
        }
    )


# ------------------------------------------------------------------------------- are they the same


def _same_images(a: Scores, b: Scores, allow_missing: bool) -> tuple[Scores, Scores, list[int]]:
    """Both in the order of the first, and how many images of each are left out."""
    row_of = {name: row for row, name in enumerate(b.ids)}
    there = set(a.ids)
    alone = [n for n in a.ids if n not in row_of], [n for n in b.ids if n not in there]
    if any(alone) and not allow_missing:
        raise ValueError(
            f"different images: {_some(alone[0])} only in A, {_some(alone[1])} only in B; "
            "--allow-missing compares those that both have"
        )
    if not there & row_of.keys():
        raise ValueError("no image is in both A and B; are they of the same data set?")
    rows = np.array([row for row, name in enumerate(a.ids) if name in row_of])
    a = a.select(rows)
    return a, b.select(np.array([row_of[name] for name in a.ids])), [len(x) for x in alone]


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
    positives, negatives = (int((a.labels[:, column] == value).sum()) for value in (1, 0))
    one, other, labels, units = scores.common(a, b, column)
    test = metrics.delong_test(other, one, labels, groups=units)
    return {
        "class": a.classes[column],
        "first": metrics.auc(one, labels),
        "second": metrics.auc(other, labels),
        **aucs.limits(test.difference, "difference"),
        "p": test.p,
        "positives": positives,
        "negatives": negatives,
        "unknown": len(a.ids) - positives - negatives,
        "few": min(positives, negatives) < FEW,
    }


def _macro(a: Scores, b: Scores, resamples: int, seed: int) -> dict[str, Any]:
    there = a.learned & b.learned
    labels, one, other = a.labels[:, there], a.scores[:, there], b.scores[:, there]
    pair = metrics.bootstrap_pair(
        metrics.macro_auc, other, one, labels, groups=a.units, samples=resamples, seed=seed
    )
    return {
        "classes": sum({0, 1} <= set(column[~np.isnan(column)]) for column in labels.T),
        "first": pair.second.value,
        "second": pair.first.value,
        **aucs.limits(pair.difference, "difference"),
        "dropped": pair.difference.dropped,
    }


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What was done otherwise: key -> both values, those of tables as "table.key"."""
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


# ----------------------------------------------------------------------------------------- tables


def sections(found: Mapping[str, Any]) -> Iterator[Section]:
    """The tables of what `compare` returns."""
    whose = "" if found["groups"] is None else f" of {found['groups']:,} patients or groups"
    left_out = "; left out: {first:,} that only A has, {second:,} that only B has"
    lost = left_out.format(**found["left_out"]) if any(found["left_out"].values()) else ""
    text = (
        f"A: {found['first']}. B: {found['second']}. {found['images']:,} images{whose}{lost}. "
        "Differences are B minus A, paired on the same images: of a class DeLong's, with Holm's p "
        "for all classes together; of the mean the bootstrap's. * fewer than 10 positives or "
        "negatives: read little into it."
    )
    header = ("class", "A", "B", "B - A", "95 % interval", "p", "p (Holm)", "positives")
    rows = [
        (
            c["class"] + (" *" if c["few"] else ""),
            *_compared(c),
            p_value(c["p"]),
            p_value(c["p_holm"]),
            f"{c['positives']:,}",
        )
        for c in found["classes"]
    ]
    rows.append(("mean", *_compared(found["macro"]), "", "", ""))
    yield Section("AUC", text, header, rows)
    if found["differs"]:
        apart = [(key, *map(_shown, pair)) for key, pair in found["differs"].items()]
        yield Section("What was done otherwise", "", ("", "A", "B"), apart)


def _compared(found: Mapping[str, Any]) -> tuple[str, ...]:
    aucs = number(found["first"]), number(found["second"])
    return *aucs, signed(found["difference"]), interval(found)


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def markdown(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    return tables.markdown("Comparison of two evaluations", sections(found))
