"""What is learned from the training and validation parts of a data set, and the files of it.

    DIR/validation.parquet         zero-shot scores of the validation images
    DIR/probe.npz                  linear probe, which `probe predict` takes
    DIR/probe.parquet              its probabilities of the test images
    DIR/probe-validation.parquet   and of the validation images
    DIR/knn.parquet                shares of each class among the nearest training images
    DIR/learning.json              learning curves

Scores are as in scores.parquet. Each file knows the `run` that it is of.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from medsiglip_jax import __version__
from medsiglip_jax.embeddings.probe import learning
from medsiglip_jax.embeddings.probe import linear as probe
from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.embeddings.probe.logistic import STRENGTHS, LabelledVectors
from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.evaluate import scores
from medsiglip_jax.evaluate.data import datasets
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.evaluate.scores import Scores
from medsiglip_jax.files import storage
from medsiglip_jax.files.places import Place

VALIDATION, PROBE, KNN = "validation.parquet", "probe.parquet", "knn.parquet"
PROBE_VALIDATION, PROBE_FILE, CURVES = "probe-validation.parquet", "probe.npz", "learning.json"
NEIGHBOURS = 20
SCALE = "standard"
_SAVE_SECONDS = 2.0


class Sample(NamedTuple):
    """Images of a part and their embeddings."""

    found: Dataset
    vectors: Float[np.ndarray, "n d"]


@dataclass(frozen=True)
class Draws:
    """How learning curves are drawn.

    Attributes:
        sizes: training images to learn from; all of them are always the last point.
        seeds: draws of each.
    """

    sizes: tuple[int, ...] = learning.SIZES
    seeds: int = 3

    def __post_init__(self):
        if self.seeds < 1 or not all(size > 0 for size in self.sizes):
            raise ValueError(
                f"sizes are {list(self.sizes)} and seeds {self.seeds}; expected at least 1"
            )


@dataclass(frozen=True, eq=False)
class Learned:
    """Scores of held-out images, read back.

    Attributes:
        how: where the parts come from.
        prevalence: at which predictive values are asked for, besides that of the test images.
        zero_shot: of the test images.
        validation: zero-shot, of the validation images.
        probe: of the test images; None as the next three where only thresholds were asked for.
        probe_validation: of the validation images.
        knn: of the test images.
        curves: rows of `learning`, with `method`, by key.
    """

    how: str
    prevalence: float | None
    zero_shot: Scores
    validation: Scores
    probe: Scores | None = None
    probe_validation: Scores | None = None
    knn: Scores | None = None
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def digest(samples: Mapping[str, Sample], classes: Sequence[str], exclusive: bool) -> str:
    """Identity of what is learned, and from what: images, labels and embeddings of each part."""
    how = [list(classes), exclusive, SCALE, STRENGTHS, __version__]
    found = hashlib.sha256(json.dumps(how).encode())
    for name, sample in sorted(samples.items()):
        found.update(f"{name} {datasets.labels_sha256(sample.found)}".encode())
        found.update(np.ascontiguousarray(sample.vectors).data)
    return found.hexdigest()


def learn(
    folder: Place,
    samples: Mapping[str, Sample],
    classes: Sequence[str],
    exclusive: bool,
    provenance: Provenance,
    draws: Draws,
    meta: Mapping[str, Any],
    on_fit: Callable[[], Any],
) -> None:
    """Fits probe, neighbours and learning curves, and writes their files.

    What is there and of the same images, labels and embeddings is not fitted again. Strength and
    thresholds are chosen on the validation images; nothing is on those of the test.

    Args:
        folder: of the files.
        samples: "train", "validation" and "test".
        classes: names.
        exclusive: whether an image is of one class.
        provenance: of the embeddings, for the probe.
        draws: of learning curves.
        meta: `run`, `provenance` and what else is to be said with the scores.
        on_fit: called after each fit.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: the training images are all of one class.
    """
    fitted = _probe(folder / PROBE_FILE, samples, classes, exclusive, provenance)
    on_fit()
    strengths = dict(zip(classes, fitted.facts["strengths"], strict=True))
    meta = {**meta, "scale": fitted.facts["scale"], "strengths": strengths}
    for name, part in ((PROBE_VALIDATION, "validation"), (PROBE, "test")):
        # Of a class that training lacks, a softmax would say 0, which is no score.
        values = np.where(fitted.fitted, fitted.predict(samples[part].vectors), np.nan)
        scores.write(folder / name, made(samples[part].found, classes, values, meta))
    rows = {name: _rows(sample, exclusive) for name, sample in samples.items()}
    train, validation, test = (rows[name] for name in ("train", "validation", "test"))
    near = learning.nearest(train, validation, test, len(classes), NEIGHBOURS)
    knn = made(samples["test"].found, classes, near, {**meta, "k": NEIGHBOURS})
    scores.write(folder / KNN, knn)
    on_fit()
    judged = learning.judge(fitted.predict(test.vectors), train.labels, test.labels)
    whole = {"method": "logistic", "n": len(train.vectors), "seed": 0, **judged}
    of = {"run": meta["run"], "data": digest(samples, classes, exclusive)}
    _curves(folder / CURVES, (train, validation, test), draws, whole, of, on_fit)


def made(
    found: Dataset, classes: Sequence[str], values: np.ndarray, meta: Mapping[str, Any]
) -> Scores:
    """Scores of the images of a data set."""
    return Scores(found.ids, classes, values.astype(np.float64), found.labels, found.groups, meta)


def _rows(sample: Sample, exclusive: bool) -> LabelledVectors:
    """Vectors and labels as probes take them; an image of no or several classes is unknown."""
    labels = sample.found.labels
    if not exclusive:
        return LabelledVectors(sample.vectors, labels)
    one = labels.sum(axis=1) == 1  # NaN is not
    numbers = np.where(one, np.nan_to_num(labels).argmax(axis=1), -1)
    return LabelledVectors(sample.vectors, numbers)


def _probe(
    path: Place,
    samples: Mapping[str, Sample],
    classes: Sequence[str],
    exclusive: bool,
    provenance: Provenance,
) -> Probe:
    """The probe that is there, if it was fitted to the same, or a new one."""
    parts = {name: samples[name] for name in ("train", "validation")}
    fitted_to = digest(parts, classes, exclusive)
    with contextlib.suppress(FileNotFoundError, ValueError):  # of another version: fit again
        found = probe.open_probe(path)
        if found.facts.get("fitted_to") == fitted_to:
            return found
    train, validation = (_rows(sample, exclusive) for sample in parts.values())
    found = probe.fit(*train, *validation, classes, scale=SCALE, provenance=provenance)
    found = replace(found, facts={**found.facts, "fitted_to": fitted_to})
    found.save(path)
    return found


# ---------------------------------------------------------------------------------------- curves


def _curves(
    path: Place,
    parts: Sequence[LabelledVectors],
    draws: Draws,
    whole: dict[str, Any],
    of: Mapping[str, str],
    on_fit: Callable[[], Any],
) -> None:
    """Computes the rows that are not there yet; those that a killed run had are.

    Args:
        path: of the file.
        parts: to learn from, to choose on and to judge by.
        draws: of the rows.
        whole: the row of the probe itself, which learned from all.
        of: `run` that the file is of, and digest of the `data`.
        on_fit: called after each row.
    """
    rows, saved = [whole, *_saved(path, of["data"])], time.monotonic()

    def keep(row: dict[str, Any]) -> None:
        nonlocal saved
        rows.extend([] if row in rows else [row])
        if time.monotonic() > saved + _SAVE_SECONDS:
            _save(path, of, rows)
            saved = time.monotonic()
        on_fit()

    seeds = range(draws.seeds)
    found = learning.learning_curve(*parts, sizes=draws.sizes, seeds=seeds, done=rows, on_row=keep)
    # Prototypes need no validation images, so that few shots are few.
    found += learning.few_shot(*parts, seeds=seeds, method="prototypes", done=rows, on_row=keep)
    _save(path, of, found, others=[row for row in rows if row not in found])


_KINDS, _OTHERS = {"learning_curve": "n", "few_shot": "shots"}, "others"


def _save(
    path: Place,
    of: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes rows, and others of the same data that were not asked for this time."""
    kinds = {kind: [row for row in rows if name in row] for kind, name in _KINDS.items()}
    content = {**of, **kinds, _OTHERS: list(others)}
    with storage.new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _saved(path: Place, data: str) -> list[dict[str, Any]]:
    """Rows of these data."""
    content: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        content = _content(path)
    if content.get("data") != data:
        return []
    return [row for kind in (*_KINDS, _OTHERS) for row in content.get(kind, ())]


def _content(path: Place) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; evaluate again")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); evaluate again") from None


# ----------------------------------------------------------------------------------------- read


def read(folder: Place, zero_shot: Scores, facts: Mapping[str, Any]) -> Learned:
    """Reads back what belongs to a run.

    Args:
        folder: of the files.
        zero_shot: of the test images; its `meta` has the run.
        facts: `how`, `prevalence`, and whether there is a `probe`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is of another run, or damaged.
    """
    names = [VALIDATION, *([PROBE, PROBE_VALIDATION, KNN] if facts["probe"] else [])]
    found = [scores.read(folder / name) for name in names]
    runs = {name: part.meta.get("run") for name, part in zip(names, found, strict=True)}
    curves = _content(folder / CURVES) if facts["probe"] else {}
    runs |= {CURVES: curves.get("run")} if facts["probe"] else {}
    scores.check_runs(folder, zero_shot.meta.get("run"), runs)
    rows = {kind: curves.get(kind, []) for kind in _KINDS}
    parts = dict(zip(("validation", "probe", "probe_validation", "knn"), found, strict=False))
    return Learned(facts["how"], facts["prevalence"], zero_shot, **parts, curves=rows)
