"""`probe fit` and `probe predict`: from labels and embeddings to probes, from probes to scores."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from medsiglip_jax import metrics
from medsiglip_jax.data.inputs import rows as input_rows
from medsiglip_jax.embeddings import output, provenance
from medsiglip_jax.embeddings.probe import features, linear
from medsiglip_jax.embeddings.probe.features import Features
from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places
from medsiglip_jax.inference.encode import encode_rows
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules, from_dict
from medsiglip_jax.preprocess.parts import Parts

_BLOCK = 65536  # ids that are Python objects at a time


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
    rule: str = "youden",
    at_least: float | None = None,
    validation: float = 0.2,
    seed: int = 0,
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
        rule: how thresholds are chosen; see `metrics.choose_threshold`.
        at_least: the sensitivity or specificity that the rule asks for.
        validation: share of the rows held out for choices, if no split is named for them.
        seed: of that draw.

    Returns:
        `probe` (path), `rows` of each split, `missing` (labels without an embedding), and for
        "validation" (too good, for choices were made on it) and "test" (if there is one):
        `macro_auc`, `undefined` (classes without an AUC), and for each class `auc`, `low`, `high`,
        `threshold`, `sensitivity`, `specificity`, `positives`, `negatives`, `missing`; undefined
        numbers are None.

    Raises:
        FileNotFoundError: no such file or folder.
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: what is wrong with the table, the join, the splits or an option.
    """
    linear.check_name(probe)
    metrics.check_rule(rule, at_least)
    joined = features.read(
        data, Embeddings(embeddings), label=label, group=group, split=split, id=id
    )
    splits = features.split(joined, validation, seed)
    train, chosen = splits.train, splits.validation
    fitted = linear.fit(
        train.vectors, train.labels, chosen.vectors, chosen.labels, joined.examples.classes,
        scale=scale, rule=rule, at_least=at_least, provenance=joined.provenance,
    )  # fmt: skip
    fitted.save(probe)
    given = {name: rows for name, rows in splits._asdict().items() if rows is not None}
    return {
        "probe": str(probe),
        "rows": {name: len(rows) for name, rows in given.items()},
        "missing": joined.missing,
        **{name: judge(fitted, rows) for name, rows in given.items() if name != "train"},
    }


def judge(fitted: Probe, rows: Features) -> dict[str, Any]:
    """How good a probe is on some rows; see "test" of `fit`."""
    scores = fitted.predict(rows.vectors, rows.provenance)
    labels = linear.label_columns(rows.labels, len(fitted.classes))
    aucs = metrics.class_aucs(
        np.where(fitted.fitted, scores, 0), np.where(fitted.fitted, labels, np.nan),
        fitted.classes, groups=rows.examples.groups,
    )  # fmt: skip
    per_class = {
        auc.name: _judge_class(auc, scores[:, k], labels[:, k], fitted.thresholds[k])
        for k, auc in enumerate(aucs.classes)
    }
    macro = json_files.plain(aucs.macro)
    return {"macro_auc": macro, "undefined": list(aucs.undefined), "classes": per_class}


def _judge_class(
    auc: metrics.ClassAuc, scores: np.ndarray, labels: np.ndarray, threshold: float
) -> dict[str, Any]:
    numbers = {"auc": auc.auc.value, "low": auc.auc.low, "high": auc.auc.high,
               "threshold": threshold, "sensitivity": np.nan, "specificity": np.nan}  # fmt: skip
    if not np.isnan(threshold):
        point = metrics.operating_point(scores, labels, threshold)
        numbers["sensitivity"] = point.sensitivity.value
        numbers["specificity"] = point.specificity.value
    counts = {
        "positives": int((labels == 1).sum()), "negatives": int((labels == 0).sum()),
        "missing": int(np.isnan(labels).sum()),
    }  # fmt: skip
    return json_files.plain(numbers) | counts


def predict(fitted: Probe, embeddings: Embeddings, scores_file: places.Given) -> int:
    """Scores every image of an embedding run; see `write` for the file.

    Args:
        fitted: the probe.
        embeddings: made with the model, preset and normalisation of the probe's own.
        scores_file: .csv or .parquet; an existing one is replaced.

    Returns:
        The number of images scored.

    Raises:
        ValueError: the embeddings were made differently, or the file has another suffix.
    """
    check_output(scores_file, fitted)
    made = provenance.of_run(embeddings.manifest)
    fitted.provenance.check(made, embeddings.folder)
    rows, scores = [np.zeros(0, np.int64)], [np.zeros((0, len(fitted.classes)))]
    for block in embeddings.blocks():
        rows.append(block.rows)
        scores.append(fitted.predict(block.vectors, made))
    ids = list(_ids(embeddings, np.concatenate(rows)))
    write(scores_file, fitted, ids, np.concatenate(scores))
    return len(ids)


def _ids(embeddings: Embeddings, rows: np.ndarray) -> Iterator[str]:
    for start in range(0, len(rows), _BLOCK):
        for row in embeddings.ids(rows[start : start + _BLOCK].tolist()):
            yield row["id"]


def predict_inputs(
    fitted: Probe,
    model: Model,
    inputs: Sequence[str],
    *,
    batch_size: int = 8,
    dicom: Rules | None = None,
    parts: Parts = Parts(),
    on_progress: Callable[[int], Any] = int,
) -> list[dict[str, Any]]:
    """Embeds images as the probe's own were embedded, and scores them.

    Args:
        fitted: the probe.
        model: the one that made its embeddings.
        inputs: what `inputs.rows` takes: images, folders, tables, tar.
        batch_size: images per call of the encoder.
        dicom: how DICOM files become pixels; default as the probe records it.
        parts: what is made of files that hold more than one image.
        on_progress: called with the number of images just done.

    Returns:
        For each image `{"image": source, "scores": [{"class", "probability", "positive"}, …]}`, or
        `{"image": source, "error": reason}` if it is unreadable.

    Raises:
        ValueError: another model, a probe that does not record how its vectors were made, or inputs
            that are texts.
    """
    preprocess, normalized = _check_model(fitted, model)
    rows = input_rows(inputs, text=None, parts=parts)
    if "text" in rows.table.column("kind").unique().to_pylist():
        raise ValueError("a probe scores images; some inputs are texts")
    dicom = dicom or from_dict(fitted.provenance.dicom)
    results: list[dict[str, Any]] = []
    for batch in encode_rows(model, rows, preprocess, normalized, batch_size, dicom, on_progress):
        scored = iter(_scored(fitted, batch.vectors))
        names = batch.rows.table.column("source").to_pylist()
        results += [
            {"image": name, **({"error": reason} if reason else {"scores": next(scored)})}
            for name, reason in zip(names, batch.reasons, strict=True)
        ]
    return results


def _check_model(fitted: Probe, model: Model) -> tuple[str, bool]:
    """Preset and normalisation of the probe's embeddings, which must be of this model."""
    wanted = fitted.provenance
    if wanted.preprocess is None or wanted.normalized is None:
        raise ValueError(
            "the probe was fitted to arrays and does not record how images become such vectors; "
            "fit it with provenance=, or to what embed wrote"
        )
    made = provenance.of_model(model, wanted.preprocess, wanted.normalized)
    wanted.check(made, "these images")
    return wanted.preprocess, wanted.normalized


def _scored(fitted: Probe, vectors: np.ndarray) -> list[list[dict[str, Any]]]:
    probabilities = fitted.predict(vectors)
    called = fitted.positive(probabilities)
    return [
        [
            {"class": name, "probability": p, "positive": yes}
            for name, p, yes in zip(fitted.classes, row, flags, strict=True)
        ]
        for row, flags in zip(probabilities.tolist(), called.tolist(), strict=True)
    ]


# ------------------------------------------------------------------------------------ the scores


def write(
    path: places.Given, fitted: Probe, ids: Sequence[str], scores: Float64[np.ndarray, "n c"]
) -> None:
    """Writes `id`, the probability of each class under its name, and `positive`: the classes that
    reach their thresholds, separated by ";"."""
    check_output(path, fitted)
    names = np.array(fitted.classes, object)
    table: dict[str, Any] = {"id": list(ids)}
    table |= {name: scores[:, k] for k, name in enumerate(fitted.classes)}
    table["positive"] = [";".join(names[row]) for row in fitted.positive(scores)]
    output.write(path, table)


def check_output(path: places.Given, fitted: Probe) -> None:
    """Raises ValueError unless `write` can write such a file."""
    output.check_name(path)
    if taken := {"id", "positive"} & set(fitted.classes):
        raise ValueError(f"a class is named {', '.join(taken)}, as another column; rename it")
