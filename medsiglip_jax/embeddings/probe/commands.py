"""`probe fit` and `probe predict`: labels, embeddings and images in, probes and scores out."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from medsiglip_jax import metrics
from medsiglip_jax.data import inputs as manifest
from medsiglip_jax.data.tables import write_parquet
from medsiglip_jax.embeddings.probe import features, linear
from medsiglip_jax.embeddings.probe.features import Features
from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.files import places, storage
from medsiglip_jax.inference.engine import Engine
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules, from_dict
from medsiglip_jax.preprocess.parts import Parts

_BLOCK = 65536  # ids that are Python objects at a time


def fit(
    data: places.Given,
    embeddings: places.Given,
    output: places.Given,
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
    """Fits a probe to labels and embeddings, writes it, and tells how good it is.

    Args:
        data: table of labels; see `features.read`, also for `label`, `group`, `split` and `id`.
        embeddings: what `embed` wrote.
        output: the probe, .npz; what is there is replaced.
        label: columns of labels.
        group: column of patients, which are never in two parts.
        split: column of splits; see `features.split`, also for `validation` and `seed`.
        id: column of ids.
        scale: of the features; see `features.fit_scaling`.
        rule: how thresholds are chosen; see `metrics.choose_threshold`.
        at_least: the sensitivity or specificity that the rule asks for.
        validation: share of the rows to choose by, where no split says which.
        seed: of that choice.

    Returns:
        `probe` (path), `rows` of each part, `missing` (labels without an embedding), and for
        "validation", on which choices were made and which therefore flatters, and "test", if there
        is one: `macro_auc`, `undefined` (classes without an AUC), and per class `auc`, `low`,
        `high`, `threshold`, `sensitivity`, `specificity`, `positives`, `negatives`, `missing`; what
        is undefined is None.

    Raises:
        FileNotFoundError: no such file or folder.
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: what is wrong with the table, the join, the split or an option.
    """
    linear.check_name(output)
    metrics.check_rule(rule, at_least)
    found = features.read(
        data, Embeddings(embeddings), label=label, group=group, split=split, id=id
    )
    parts = features.split(found, validation, seed)
    train, chosen = parts.train, parts.validation
    fitted = linear.fit(
        train.vectors, train.labels, chosen.vectors, chosen.labels, found.examples.classes,
        scale=scale, rule=rule, at_least=at_least, provenance=found.provenance,
    )  # fmt: skip
    fitted.save(output)
    there = {name: part for name, part in parts._asdict().items() if part is not None}
    return {
        "probe": str(output),
        "rows": {name: len(part) for name, part in there.items()},
        "missing": found.missing,
        **{name: judge(fitted, part) for name, part in there.items() if name != "train"},
    }


def judge(fitted: Probe, part: Features) -> dict[str, Any]:
    """How good a probe is on some rows; the content is that of `fit`'s "test"."""
    scores = fitted.predict(part.vectors, part.provenance)
    labels = linear.columns(part.labels, len(fitted.classes))
    aucs = metrics.class_aucs(
        np.where(fitted.fitted, scores, 0), np.where(fitted.fitted, labels, np.nan),
        fitted.classes, groups=part.examples.groups,
    )  # fmt: skip
    per_class = {
        found.name: _judge_class(found, scores[:, k], labels[:, k], fitted.thresholds[k])
        for k, found in enumerate(aucs.classes)
    }
    macro = _number(aucs.macro)
    return {"macro_auc": macro, "undefined": list(aucs.undefined), "classes": per_class}


def _judge_class(found: metrics.ClassAuc, scores, labels, threshold: float) -> dict[str, Any]:
    numbers = {"auc": found.auc.value, "low": found.auc.low, "high": found.auc.high,
               "threshold": threshold, "sensitivity": np.nan, "specificity": np.nan}  # fmt: skip
    if not np.isnan(threshold):
        point = metrics.operating_point(scores, labels, threshold)
        numbers["sensitivity"] = point.sensitivity.value
        numbers["specificity"] = point.specificity.value
    counts = {
        "positives": int((labels == 1).sum()), "negatives": int((labels == 0).sum()),
        "missing": int(np.isnan(labels).sum()),
    }  # fmt: skip
    return {name: _number(x) for name, x in numbers.items()} | counts


def _number(x: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(x) if np.isfinite(x) else None


def predict(fitted: Probe, embeddings: Embeddings, output: places.Given) -> int:
    """Scores every image of an embedding run; see `write` for the file.

    Args:
        fitted: the probe.
        embeddings: of the model, preset and length that it demands.
        output: .csv or .parquet; what is there is replaced.

    Returns:
        How many images were scored.

    Raises:
        ValueError: the embeddings were made another way, or an unknown kind of file.
    """
    check_output(output, fitted)
    made = features.provenance(embeddings.manifest)
    fitted.provenance.check(made, embeddings.folder)
    rows, scores = [np.zeros(0, np.int64)], [np.zeros((0, len(fitted.classes)))]
    for block in embeddings.blocks():
        rows.append(block.rows)
        scores.append(fitted.predict(block.vectors, made))
    ids = list(_ids(embeddings, np.concatenate(rows)))
    write(output, fitted, ids, np.concatenate(scores))
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
    """Embeds images as the probe demands, and scores them.

    Args:
        fitted: the probe.
        model: the one that its embeddings were made with.
        inputs: what `manifest.rows` takes: images, folders, manifests, tar.
        batch_size: images per call of the encoder.
        dicom: how DICOM files become pixels; default as the probe records it.
        parts: what is made of files that hold more than one image.
        on_progress: called with the number of images just done.

    Returns:
        Per image `{"image": source, "scores": [{"class", "probability", "positive"}, …]}`, or
        `{"image": source, "error": reason}` if it is unreadable.

    Raises:
        ValueError: another model, a probe that does not know how its vectors were made, or inputs
            that are texts.
    """
    engine = _engine(fitted, model, batch_size, dicom)
    rows = manifest.rows(inputs, text=None, parts=parts)
    if "text" in rows.table.column("kind").unique().to_pylist():
        raise ValueError("a probe scores images; some inputs are texts")
    results: list[dict[str, Any]] = []
    for batch in engine.run(rows.batches(batch_size)):
        sources = batch.rows.table.column("source").to_pylist()
        reasons = dict(batch.errors)
        scored = iter(_scored(fitted, batch.vectors))
        for source, readable in zip(sources, batch.readable, strict=True):
            rest = {"scores": next(scored)} if readable else {"error": reasons[source]}
            results.append({"image": source, **rest})
        on_progress(len(batch.rows))
    return results


def _engine(fitted: Probe, model: Model, batch_size: int, dicom: Rules | None) -> Engine:
    wanted = fitted.provenance
    if wanted.preprocess is None or wanted.normalized is None:
        raise ValueError(
            "the probe was fitted to arrays and does not say how images become such vectors; fit "
            "it with provenance=, or to what embed wrote"
        )
    preprocess, normalized = wanted.preprocess, wanted.normalized
    wanted.check(features.wanted(model, preprocess, normalized), "these images")
    return Engine(model, preprocess, normalized, batch_size, dicom or from_dict(wanted.dicom))


def _scored(fitted: Probe, vectors: np.ndarray) -> list[list[dict[str, Any]]]:
    probabilities = fitted.predict(vectors)
    called = fitted.positive(probabilities)
    return [
        [
            {"class": name, "probability": p, "positive": yes}
            for name, p, yes in zip(fitted.classes, row.tolist(), flags.tolist(), strict=True)
        ]
        for row, flags in zip(probabilities, called, strict=True)
    ]


# ------------------------------------------------------------------------------------ the scores


def write(
    path: places.Given, fitted: Probe, ids: Sequence[str], scores: Float64[np.ndarray, "n c"]
) -> None:
    """Writes `id`, the probability of each class under its name, and `positive`: the classes that
    reach their thresholds, separated by ";"."""
    check_output(path, fitted)
    called = fitted.positive(scores)
    names = np.array(fitted.classes, object)
    table: dict[str, Any] = {"id": list(ids)}
    table |= {name: scores[:, k] for k, name in enumerate(fitted.classes)}
    table["positive"] = [";".join(names[row]) for row in called]
    if Path(str(path)).suffix.lower() == ".parquet":
        write_parquet(str(path), table, None, None)
    else:
        _write_csv(path, table)


def check_output(path: places.Given, fitted: Probe) -> None:
    """Raises ValueError unless `write` can write such a file."""
    if Path(str(path)).suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"{path}: expected a name ending in .csv or .parquet")
    if taken := {"id", "positive"} & set(fitted.classes):
        raise ValueError(f"a class is named {', '.join(taken)}, as another column; rename it")


def _write_csv(path: places.Given, table: Mapping[str, Any]) -> None:
    with storage.new_file(places.at(path)) as partial:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            lists = [x.tolist() if isinstance(x, np.ndarray) else x for x in table.values()]
            writer.writerows(zip(*lists, strict=True))
