"""`probe predict`: from a probe to the scores of an embedding run, or of images."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from medsiglip_jax.data.inputs import rows as input_rows
from medsiglip_jax.data.rows import Rows, describe_skipped
from medsiglip_jax.embeddings import output, provenance, store
from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.files import places
from medsiglip_jax.inference import classifier
from medsiglip_jax.inference.abstain import Abstention, Judged
from medsiglip_jax.inference.encode import encode_rows, score_rows
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules, from_dict
from medsiglip_jax.preprocess.parts import Parts

# The orders of a triage list.
RANKS = ("uncertainty", "score")


def predict(
    fitted: Probe,
    embeddings: store.Embeddings,
    scores_file: places.Given,
    abstention: Abstention | None = None,
    rank: str | None = None,
) -> int:
    """Scores every image of an embedding run.

    The file has `id`, the probability of each class under its name, and `positive`: the classes
    that reach their thresholds, separated by ";". With `abstention` also `distance` and
    `no_assist`, the reason why a row has no answer; its other cells are empty.

    Args:
        fitted: the probe.
        embeddings: made with the model, preset and normalisation of the probe's own.
        scores_file: .csv or .parquet; an existing one is replaced.
        abstention: when there is no answer; see `trust.known`.
        rank: the order of the rows, see `triage`; default that of the run.

    Returns:
        The number of images scored.

    Raises:
        ValueError: the embeddings were made differently or have no direction, the file has another
            suffix, or a class is named like another column.
    """
    places.check_suffix(scores_file, *output.SUFFIXES)
    own = {"id", "positive", *(("distance", "no_assist") if abstention else ())}
    if taken := own & set(fitted.classes):
        raise ValueError(f"a class is named {', '.join(taken)}, as another column; rename it")
    made = provenance.of_run(embeddings.manifest)
    fitted.provenance.check(made, embeddings.folder)
    rows, blocks = [np.zeros(0, np.int64)], [np.zeros((0, len(fitted.classes)))]
    judged = [Judged(np.zeros(0), [])]
    for block in embeddings.blocks():
        if not embeddings.without_direction:  # they are all counted before they are told
            rows.append(block.rows)
            blocks.append(fitted.predict(block.vectors, made))
            if abstention is not None:
                judged.append(_judge(abstention, fitted, block.vectors, blocks[-1]))
    embeddings.check_directions()
    ids = [row["id"] for row in embeddings.names(np.concatenate(rows).tolist())]
    scores, classes = np.concatenate(blocks), np.array(fitted.classes, object)
    reasons: list[str | None] = [reason for part in judged for reason in part.reasons]
    reasons = reasons if abstention is not None else [None] * len(ids)
    order = _order(fitted, scores, reasons, rank)
    positive = [";".join(classes[row]) for row in fitted.positive(scores)]
    named = dict(zip(fitted.classes, scores.T.tolist(), strict=True))
    answers = {**named, "positive": positive}
    columns: dict[str, list] = {"id": ids}
    for name, cells in answers.items():
        columns[name] = [None if no else cell for cell, no in zip(cells, reasons, strict=True)]
    if abstention is not None:
        columns["distance"] = np.concatenate([part.distances for part in judged]).tolist()
        columns["no_assist"] = reasons
    output.write(scores_file, {n: [cells[i] for i in order] for n, cells in columns.items()})
    return len(ids)


def _judge(
    abstention: Abstention, fitted: Probe, vectors: np.ndarray, probabilities: np.ndarray
) -> Judged:
    return abstention.judge(vectors, probabilities, fitted.classes, fitted.exclusive)


def triage(
    probabilities: Float64[np.ndarray, "n c"], exclusive: bool, rank: str
) -> Float64[np.ndarray, " n"]:
    """What a triage list is sorted by, the highest first.

    Args:
        probabilities: of each class; NaN for findings that could not be fitted.
        exclusive: whether a row has exactly one class.
        rank: "score" is the highest probability of any class. "uncertainty" is how far the
            likeliest of exclusive classes is from certain, or else the least certain finding, 0.5
            at most.

    Raises:
        ValueError: another rank.
    """
    if rank not in RANKS:
        raise ValueError(f"rank is {rank!r}; expected one of {', '.join(RANKS)}")
    highest = np.nanmax(probabilities, axis=1)
    if rank == "score":
        return highest
    return 1 - highest if exclusive else np.nanmax(np.minimum(probabilities, 1 - probabilities), 1)


def _order(
    fitted: Probe, scores: np.ndarray, reasons: Sequence[str | None], rank: str | None
) -> list[int]:
    """Rows without an answer first, since a person has to look at them, and then by rank."""
    if rank is None or not len(scores):
        return list(range(len(scores)))
    keys = triage(scores, fitted.exclusive, rank)
    return sorted(range(len(scores)), key=lambda i: (reasons[i] is None, -keys[i]))


def predict_inputs(
    fitted: Probe,
    model: Model,
    inputs: Sequence[str],
    *,
    batch_size: int = 8,
    dicom: Rules | None = None,
    parts: Parts = Parts(),
    all_files: bool = False,
    on_progress: Callable[[int], Any] = int,
    abstention: Abstention | None = None,
) -> list[dict[str, Any]]:
    """Embeds images as the probe's own were embedded, and scores them.

    Args:
        fitted: the probe.
        model: the one that made its embeddings.
        inputs: what `inputs.rows` takes: images, folders, tables, tar; what of them is skipped is
            said in a warning.
        batch_size: images per call of the encoder.
        dicom: how DICOM files become pixels; default as the probe records it.
        parts: what is made of files that hold more than one image.
        all_files: know images in folders and shards by their content, whatever their suffix.
        on_progress: called with the number of images just done.
        abstention: when there is no answer; see `trust.known`.

    Returns:
        For each image `{"image": source, "scores": [{"class", "probability", "positive"}, …]}`, or
        `{"image": source, "error": reason}` if it is unreadable; with `abstention` as
        `encode.score_rows` has it.

    Raises:
        ValueError: another model, a probe that does not record how its vectors were made, or inputs
            that are texts.
    """
    preprocess, normalized = check_model(fitted, model)
    rows = _images(inputs, parts, all_files)
    dicom = dicom or from_dict(fitted.provenance.dicom)
    batches = encode_rows(model, rows, preprocess, normalized, batch_size, dicom, on_progress)

    def score(vectors: np.ndarray) -> list[np.ndarray]:
        probabilities = fitted.predict(vectors)
        return [probabilities, fitted.positive(probabilities)]

    def judge(vectors: np.ndarray, arrays: Sequence[np.ndarray]) -> Judged:
        assert abstention is not None
        return _judge(abstention, fitted, vectors, arrays[0])

    return score_rows(
        batches, score, ("class", "probability", "positive"), fitted.classes,
        None if abstention is None else judge,
    )  # fmt: skip


def predict_by_classifier(
    model: Model,
    inputs: Sequence[str],
    *,
    batch_size: int = 8,
    dicom: Rules | None = None,
    parts: Parts = Parts(),
    all_files: bool = False,
    on_progress: Callable[[int], Any] = int,
    abstention: Abstention | None = None,
) -> list[dict[str, Any]]:
    """Scores images with the model's own classifier; arguments and result as `predict_inputs`."""
    _ = model.features  # without a classifier there is nothing to read files for
    results = classifier.classify_labels(
        model, _images(inputs, parts, all_files), None, batch_size, on_progress, dicom,
        ("class", "logit", "probability", "positive"), abstention,
    )  # fmt: skip
    return results


def ranked(results: Sequence[dict[str, Any]], exclusive: bool, rank: str) -> list[dict[str, Any]]:
    """Results as a triage list: without an answer first, then by `triage`, unreadable ones last."""

    def key(result: dict[str, Any]) -> tuple[int, float]:
        if "scores" not in result:
            return (0 if "no_assist" in result else 2), 0.0
        shares = np.array([[score["probability"] for score in result["scores"]]])
        return 1, -float(triage(shares, exclusive, rank)[0])

    return sorted(results, key=key)


def _images(inputs: Sequence[str], parts: Parts, all_files: bool) -> Rows:
    rows = input_rows(inputs, text=None, parts=parts, all_files=all_files)
    for line in describe_skipped(rows.skipped, all_files):
        warnings.warn(line, stacklevel=3)
    if "text" in rows.table.column("kind").unique().to_pylist():
        raise ValueError("a probe scores images; some inputs are texts")
    return rows


def check_model(fitted: Probe, model: Model) -> tuple[str, bool]:
    """Preset and normalisation of the probe's embeddings, which must be of this model."""
    wanted = fitted.provenance
    if wanted.preprocess is None or wanted.normalized is None:
        raise ValueError(
            "the probe was fitted to arrays and does not record how images become such vectors; "
            "give vectors made in the same way (--embeddings), or fit it to what embed wrote (in "
            "Python with provenance=)"
        )
    made = provenance.of_model(model, wanted.preprocess, wanted.normalized)
    wanted.check(made, "these images")
    return wanted.preprocess, wanted.normalized
