"""`probe fit`: from labels and embeddings to a probe, and how good it is."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medsiglip_jax import metrics
from medsiglip_jax.data.labels import label_columns, lacking
from medsiglip_jax.embeddings.elsewhere.formats import open_embeddings
from medsiglip_jax.embeddings.probe import features, linear
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places


def fit(
    data: places.Given,
    embeddings: places.Given,
    probe: places.Given,
    *,
    label: str | Sequence[str] = (),
    group: str | None = None,
    split: str | None = None,
    id: str | None = None,
    scale: str = "standard",
    strength: float | None = None,
    hidden: int = 0,
    rule: str = "youden",
    at_least: float | None = None,
    validation: float = 0.2,
    seed: int = 0,
    uncertain: str | Mapping[str, str] = "ignore",
    label_separator: str | None = None,
    all_files: bool = False,
) -> dict[str, Any]:
    """Fits a probe to labels and embeddings, writes it, and reports how good it is.

    Args:
        data: table of labels; see `features.read`, also for `label`, `group`, `split` and `id`.
        embeddings: what `embed` wrote.
        probe: file to write, .npz; an existing one is replaced.
        label: columns of labels.
        group: column of patients, which are never in two splits.
        split: column of splits; see `features.split`, also for `validation` and `seed`.
        id: column of ids.
        scale: of the features; see `scaling.fit_scaling`.
        strength: of regularisation, instead of the best on validation rows; see `linear.fit`.
        hidden: units of a hidden layer; 0 is a linear probe.
        rule: how thresholds are chosen; see `metrics.choose_threshold`.
        at_least: the sensitivity or specificity that the rule asks for.
        validation: share of the rows held out for choices, if no split is named for them.
        seed: of that draw, and of the hidden layer.
        uncertain, label_separator, all_files: see `examples.read`.

    Returns:
        `probe` (path), `rows` of each split, `joined_by` ("id", "source" or "the end of the path"),
        `missing` (labels without an embedding), `unlabelled` (embeddings without a label), `joined`
        (both in a sentence, with the first of each), and for
        "validation" (too good, for choices were made on it) and "test" (if there is one):
        `macro_auc`, `undefined` (classes without an AUC), and for each class `auc`, `low`, `high`,
        `threshold`, `sensitivity`, `specificity`, `positives`, `negatives`, `missing`; undefined
        numbers are None.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: what is wrong with the table, the join, the splits or an option.
    """
    places.check_suffix(probe, linear.SUFFIX)
    linear.check_options(rule, at_least, strength, hidden)
    joined = features.read(
        data, open_embeddings(embeddings), label=label, group=group, split=split, id=id,
        uncertain=uncertain, label_separator=label_separator, all_files=all_files,
    )  # fmt: skip
    splits = features.split(joined, validation, seed)
    train, chosen = splits.train, splits.validation
    for line in lacking(train.labels, joined.examples.classes):
        warnings.warn(f"{data}, training rows: {line}", stacklevel=2)
    fitted = linear.fit(
        train.vectors, train.labels, chosen.vectors, chosen.labels, joined.examples.classes,
        scale=scale, strength=strength, hidden=hidden, seed=seed, rule=rule, at_least=at_least,
        provenance=joined.provenance,
    )  # fmt: skip
    if not fitted.fitted.any():
        raise ValueError(
            f"{data}: the training rows have only one label of each of "
            f"{', '.join(joined.examples.classes)}; there is nothing to learn"
        )
    fitted.save(probe)
    assert (joining := joined.joined) is not None
    given = {name: rows for name, rows in splits._asdict().items() if rows is not None}
    return {
        "probe": str(probe),
        "rows": {name: len(rows) for name, rows in given.items()},
        "joined_by": joining.by,
        "missing": len(joining.missing),
        "unlabelled": joining.others[0],
        "joined": str(joining),
        **{name: judge(fitted, rows) for name, rows in given.items() if name != "train"},
    }


def judge(fitted: linear.Probe, rows: features.Features) -> dict[str, Any]:
    """How good a probe is on some rows; see "test" of `fit`."""
    scores = fitted.predict(rows.vectors, rows.provenance)
    labels = label_columns(rows.labels, len(fitted.classes))
    scores = np.where(fitted.fitted, scores, np.nan)
    return json_files.plain(
        metrics.judge_classes(
            scores, labels, fitted.classes, fitted.thresholds, rows.examples.groups
        )
    )
