"""What is learned from the training and validation images of a data set, and its files.

    DIR/validation.parquet         zero-shot scores of the validation images
    DIR/probe.npz                  linear probe, which `probe predict` takes
    DIR/probe.parquet              its probabilities for the test images
    DIR/probe-validation.parquet   and for the validation images
    DIR/knn.parquet                share of each class among the nearest training images
    DIR/learning.json              learning curves

Scores are as in scores.parquet. Every file names the `run` that it belongs to.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from medsiglip_jax import __version__
from medsiglip_jax.embeddings import provenance
from medsiglip_jax.embeddings.probe import learning, linear, logistic
from medsiglip_jax.evaluate import image_embeddings, options, scores
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places, storage
from medsiglip_jax.files.failures import explained

VALIDATION, PROBE, KNN = "validation.parquet", "probe.parquet", "knn.parquet"
PROBE_VALIDATION, PROBE_FILE, CURVES = "probe-validation.parquet", "probe.npz", "learning.json"
NEIGHBOURS = 20
SCALE = "standard"
_SAVE_SECONDS = 2.0

Curve = Sequence[Mapping[str, Any]]  # the rows of one kind


@dataclass(frozen=True, eq=False)
class LabelledSplits:
    """What is learned from.

    Attributes:
        images: with labels and embeddings, of "train", "validation" and "test".
        classes: names.
        exclusive: whether an image shows exactly one class.
    """

    images: Mapping[str, image_embeddings.ImageEmbeddings]
    classes: Sequence[str]
    exclusive: bool

    def digest(self, *names: str) -> str:
        """Identity of images, labels and embeddings of these splits (or all), and the method."""
        method = [list(self.classes), self.exclusive, SCALE, logistic.STRENGTHS, __version__]
        sha256 = hashlib.sha256(json_files.to_hash(method))
        for name in sorted(names or self.images):
            images = self.images[name]
            sha256.update(f"{name} {images.dataset.labels_sha256()}".encode())
            sha256.update(np.ascontiguousarray(images.vectors).data)
        return sha256.hexdigest()

    def labelled(self, *names: str) -> Iterator[logistic.Labelled]:
        """Labels as probes take them; an exclusive image of no or several classes is unknown."""
        for images in (self.images[name] for name in names):
            labels = images.dataset.labels
            if self.exclusive:
                single = labels.sum(axis=1) == 1  # NaN is not
                labels = np.where(single, np.nan_to_num(labels).argmax(axis=1), -1)
            yield logistic.Labelled(images.vectors, labels)


@dataclass(frozen=True, eq=False)
class Learned:
    """Scores of held-out images, read back.

    Attributes:
        origin: where the splits come from.
        prevalence: a share of positives for which predictive values are stated, too, besides that
            of the test images.
        zero_shot: scores of the test images by prompts.
        validation: scores of the validation images by prompts.
        probe: of the test images; it and the next two are None where only thresholds were asked
            for.
        probe_validation: of the validation images.
        knn: of the test images.
        curves: rows of `learning`, by kind of curve.
    """

    origin: str
    prevalence: float | None
    zero_shot: scores.Scores
    validation: scores.Scores
    probe: scores.Scores | None = None
    probe_validation: scores.Scores | None = None
    knn: scores.Scores | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)


def learn(
    folder: places.Place,
    splits: LabelledSplits,
    draws: options.Draws,
    meta: Mapping[str, Any],
    on_fit: Callable[[], Any],
) -> None:
    """Fits probe, nearest neighbours and learning curves, and writes their files.

    What was fitted to the same images, labels and embeddings before is reused. Strength and
    thresholds are chosen on the validation images, nothing on the test images.

    Args:
        folder: of the files.
        splits: see `LabelledSplits`.
        draws: of learning curves.
        meta: `run`, `provenance` and what else to write with the scores.
        on_fit: called after each fit.

    Raises:
        ValueError: all training images are of one class.
    """
    fitted, classes = _probe(folder / PROBE_FILE, splits), splits.classes
    on_fit()
    strengths = dict(zip(classes, fitted.facts["strengths"], strict=True))
    meta = {**meta, "scale": fitted.facts["scale"], "strengths": strengths}
    for name, split in ((PROBE_VALIDATION, "validation"), (PROBE, "test")):
        # For a class without training images a softmax would give 0, which is no score.
        images = splits.images[split]
        values = np.where(fitted.fitted, fitted.predict(images.vectors), np.nan)
        scores.write(folder / name, scores_of(images.dataset, classes, values, meta))
    train, test = splits.labelled("train", "test")
    shares = learning.nearest(train, test.vectors, len(classes), NEIGHBOURS)
    knn = scores_of(splits.images["test"].dataset, classes, shares, {**meta, "k": NEIGHBOURS})
    scores.write(folder / KNN, knn)
    on_fit()
    judged = learning.judge(fitted.predict(test.vectors), train.labels, test.labels)
    of_probe = {"method": "logistic", "n": len(train.vectors), "seed": 0, **judged}
    _learn_curves(folder / CURVES, splits, draws, meta["run"], of_probe, on_fit)


def _learn_curves(
    path: places.Place,
    splits: LabelledSplits,
    draws: options.Draws,
    run: str,
    of_probe: dict[str, Any],
    on_fit: Callable[[], Any],
) -> None:
    """Fits and writes the points of learning curves; `of_probe`, the probe itself, is the last of
    one. Rows that the file has of the same data are not recomputed."""
    train, validation, test = splits.labelled("train", "validation", "test")
    identity = {"run": run, "data": splits.digest()}
    rows = [of_probe, *_saved(path, identity["data"])]
    saved = time.monotonic()

    def keep(row: dict[str, Any]) -> None:
        nonlocal saved
        rows.extend([] if row in rows else [row])
        if time.monotonic() > saved + _SAVE_SECONDS:
            _save(path, identity, rows)
            saved = time.monotonic()
        on_fit()

    parts, seeds = (train, validation, test), range(draws.seeds)
    asked = learning.learning_curve(*parts, sizes=draws.sizes, seeds=seeds, done=rows, on_row=keep)
    # Prototypes need no validation images, so that few shots are really few.
    asked += learning.few_shot(*parts, seeds=seeds, method="prototypes", done=rows, on_row=keep)
    _save(path, identity, asked, others=[row for row in rows if row not in asked])


def scores_of(
    dataset: Dataset, classes: Sequence[str], values: np.ndarray, meta: Mapping[str, Any]
) -> scores.Scores:
    """Scores of the images of a data set."""
    values = values.astype(np.float64)
    return scores.Scores(dataset.ids, classes, values, dataset.labels, dataset.groups, meta)


def _probe(path: places.Place, splits: LabelledSplits) -> linear.Probe:
    """The probe in the file, if it was fitted to the same, or a new one."""
    fitted_to = splits.digest("train", "validation")
    with contextlib.suppress(FileNotFoundError, ValueError):  # of another version: fit again
        saved = linear.open_probe(path)
        if saved.facts.get("fitted_to") == fitted_to:
            return saved
    train, validation = splits.labelled("train", "validation")
    of_embeddings = provenance.of_run(splits.images["test"].manifest)
    fitted = linear.fit(*train, *validation, splits.classes, scale=SCALE, provenance=of_embeddings)
    fitted = replace(fitted, facts={**fitted.facts, "fitted_to": fitted_to})
    fitted.save(path)
    return fitted


# ---------------------------------------------------------------------------------------- curves


_KINDS, _OTHERS = {"learning_curve": "n", "few_shot": "shots"}, "others"


def _save(path: places.Place, identity: Mapping[str, str], rows: Curve, others: Curve = ()) -> None:
    """Writes rows, and others of the same data that were not asked for this time."""
    kinds = {kind: [row for row in rows if name in row] for kind, name in _KINDS.items()}
    content = {**identity, **kinds, _OTHERS: list(others)}
    with storage.new_file(path) as partial:
        partial.write_text(json_files.dumps(content, indent=1) + "\n", encoding="utf-8")


def _saved(path: places.Place, data: str) -> list[dict[str, Any]]:
    """The rows of these data that the file has."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        content = _content(path)
        if content.get("data") == data:
            return [row for kind in (*_KINDS, _OTHERS) for row in content.get(kind, ())]
    return []


def _content(path: places.Place) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; evaluate again")
    with explained(path, "not what evaluate wrote", "evaluate again"):
        content = json_files.parse(path.read_text(encoding="utf-8"))
        rows = [row for kind in (*_KINDS, _OTHERS) for row in content.get(kind, ())]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("its curves are no lists of objects")
        return content


# ----------------------------------------------------------------------------------------- read


def read(folder: places.Place, zero_shot: scores.Scores, facts: Mapping[str, Any]) -> Learned:
    """Reads back what belongs to a run.

    Args:
        folder: of the files.
        zero_shot: of the test images; its `meta` has the run.
        facts: `how` the splits came about, `prevalence`, and whether there is a `probe`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is of another run, or damaged.
    """
    names = {"validation": VALIDATION}
    if facts["probe"]:
        names |= {"probe": PROBE, "probe_validation": PROBE_VALIDATION, "knn": KNN}
    read = {name: scores.read(folder / file) for name, file in names.items()}
    runs = {names[name]: part.meta.get("run") for name, part in read.items()}
    curves = _content(folder / CURVES) if facts["probe"] else {}
    runs |= {CURVES: curves.get("run")} if facts["probe"] else {}
    scores.check_runs(folder, zero_shot.meta.get("run"), runs)
    rows = {kind: curves.get(kind, []) for kind in _KINDS}
    return Learned(facts["how"], facts["prevalence"], zero_shot, **read, curves=rows)
