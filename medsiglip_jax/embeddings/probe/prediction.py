"""`probe predict`: from a probe to the scores of an embedding run, or of images."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medsiglip_jax.data.inputs import rows as input_rows
from medsiglip_jax.data.rows import Rows, describe_skipped
from medsiglip_jax.embeddings import output, provenance, store
from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.files import places
from medsiglip_jax.inference import classifier
from medsiglip_jax.inference.encode import encode_rows, score_rows
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules, from_dict
from medsiglip_jax.preprocess.parts import Parts


def predict(fitted: Probe, embeddings: store.Embeddings, scores_file: places.Given) -> int:
    """Scores every image of an embedding run.

    The file has `id`, the probability of each class under its name, and `positive`: the classes
    that reach their thresholds, separated by ";".

    Args:
        fitted: the probe.
        embeddings: made with the model, preset and normalisation of the probe's own.
        scores_file: .csv or .parquet; an existing one is replaced.

    Returns:
        The number of images scored.

    Raises:
        ValueError: the embeddings were made differently or have no direction, the file has another
            suffix, or a class is named like another column.
    """
    places.check_suffix(scores_file, *output.SUFFIXES)
    if taken := {"id", "positive"} & set(fitted.classes):
        raise ValueError(f"a class is named {', '.join(taken)}, as another column; rename it")
    made = provenance.of_run(embeddings.manifest)
    fitted.provenance.check(made, embeddings.folder)
    rows, blocks = [np.zeros(0, np.int64)], [np.zeros((0, len(fitted.classes)))]
    for block in embeddings.blocks():
        if not embeddings.without_direction:  # they are all counted before they are told
            rows.append(block.rows)
            blocks.append(fitted.predict(block.vectors, made))
    embeddings.check_directions()
    ids = [row["id"] for row in embeddings.names(np.concatenate(rows).tolist())]
    scores, classes = np.concatenate(blocks), np.array(fitted.classes, object)
    columns = {"id": ids, **dict(zip(fitted.classes, scores.T, strict=True))}
    positive = [";".join(classes[row]) for row in fitted.positive(scores)]
    output.write(scores_file, {**columns, "positive": positive})
    return len(ids)


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

    Returns:
        For each image `{"image": source, "scores": [{"class", "probability", "positive"}, …]}`, or
        `{"image": source, "error": reason}` if it is unreadable.

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

    return score_rows(batches, score, ("class", "probability", "positive"), fitted.classes)


def predict_by_classifier(
    model: Model,
    inputs: Sequence[str],
    *,
    batch_size: int = 8,
    dicom: Rules = Rules(),
    parts: Parts = Parts(),
    all_files: bool = False,
    on_progress: Callable[[int], Any] = int,
) -> list[dict[str, Any]]:
    """Scores images with the model's own classifier; arguments and result as `predict_inputs`."""
    _ = model.features  # without a classifier there is nothing to read files for
    results = classifier.classify_labels(
        model, _images(inputs, parts, all_files), None, batch_size, on_progress, dicom,
        ("class", "logit", "probability", "positive"),
    )  # fmt: skip
    return results


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
            "fit it with provenance=, or to what embed wrote"
        )
    made = provenance.of_model(model, wanted.preprocess, wanted.normalized)
    wanted.check(made, "these images")
    return wanted.preprocess, wanted.normalized
