"""The mean of the scores of several evaluations: of checkpoints, or of ways to prepare pixels."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medsiglip_jax.evaluate import learned, scores
from medsiglip_jax.evaluate.recompute import RESULTS
from medsiglip_jax.evaluate.results.comparison import aligned
from medsiglip_jax.evaluate.run import check_folder
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.files import places
from medsiglip_jax.files.json_text import to_hash

# What has to be the same for scores to be on one scale.
_SCALE = ("score", "temperature")


def average(folders: Sequence[places.Given], output: places.Given) -> None:
    """Writes an evaluation whose scores are the means of those of others; `recompute` reads it.

    Where all of them have scores of validation images, thresholds and calibration are chosen on
    the means of these. Probes, curves, retrieval and variants are left out.

    Args:
        folders: those of evaluations of the same images, classes and labels by the same rule.
        output: folder to write.

    Raises:
        FileExistsError: `output` holds something else than an average.
        FileNotFoundError: a folder has no scores.
        ValueError: there are fewer than two, or they are of different images, classes, labels,
            patients or rules.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} evaluation to average; expected at least two")
    read_from, folder = [places.at(given) for given in folders], places.at(output)
    check_folder(folder)
    _check_output(folder)
    sides = [scores.read(one / scores.FILE) for one in read_from]
    means, metas = _mean(read_from, sides), [side.meta for side in sides]
    columns, meta = scores.read_columns(read_from[0] / scores.IMAGES)
    scores.check_runs(read_from[0], means.meta.get("run"), {scores.IMAGES: meta.get("run")})
    facts, validation = means.meta.get("learned") or {}, None
    if all(meta.get("learned") for meta in metas):
        validation = _mean(read_from, list(map(_validation, read_from, metas)))
    else:  # what was drawn for it is of no use
        columns.pop(scores.PART, None)
    runs = [meta.get("run") for meta in metas]
    run = hashlib.sha256(to_hash(["average", runs])).hexdigest()
    changed = {"run": run, "cells": [], "retrieval": False, "localization": None}
    changed["provenance"] = _common([meta["provenance"] for meta in metas])
    changed["provenance"]["average_of"] = ", ".join(map(str, folders))
    changed["leaks"] = [leak for meta in metas for leak in meta.get("leaks") or ()]
    changed["learned"] = None if validation is None else {**facts, "probe": False}
    (folder / RESULTS).unlink(missing_ok=True)  # it does not belong to what follows
    scores.write_columns(folder / scores.IMAGES, columns, {"run": run})
    if validation is not None:
        kept = replace(validation, meta={**validation.meta, "run": run})
        scores.write(folder / learned.VALIDATION, kept)
    scores.write(folder / scores.FILE, replace(means, meta={**means.meta, **changed}))


def _check_output(folder: places.Place) -> None:
    """Refuses the folder of an evaluation that is no average: it may be one of those averaged."""
    file = folder / scores.FILE
    if file.is_file() and "average_of" not in scores.read(file).meta.get("provenance", {}):
        raise FileExistsError(f"{folder}: holds an evaluation of a model; choose a new folder")


def _common(provenances: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was the same in all of them."""
    first, *others = provenances
    same = lambda key: all(other.get(key) == first[key] for other in others)  # noqa: E731
    return {key: value for key, value in first.items() if same(key)}


def _mean(folders: Sequence[places.Place], sides: Sequence[Scores]) -> Scores:
    """The scores of the first, which are replaced by the means; `folders` are for messages."""
    first, *others = sides
    values = [first.scores]
    for folder, other in zip(folders[1:], others, strict=True):
        try:
            values.append(aligned(first, other).scores)
            _check_scale(first.meta["provenance"], other.meta["provenance"])
        except ValueError as error:
            raise ValueError(f"A is {folders[0]}, B is {folder}: {error}") from None
    return replace(first, scores=np.mean(values, axis=0))


def _validation(folder: places.Place, meta: Mapping[str, Any]) -> Scores:
    """Scores of the validation images of the run of the folder."""
    validation = scores.read(folder / learned.VALIDATION)
    scores.check_runs(folder, meta.get("run"), {learned.VALIDATION: validation.meta.get("run")})
    return validation


def _check_scale(first: dict[str, Any], other: dict[str, Any]) -> None:
    for key in _SCALE:
        if first.get(key) != other.get(key):
            raise ValueError(
                f"{key} is {first.get(key)} in A and {other.get(key)} in B; scores on different "
                "scales have no mean"
            )
