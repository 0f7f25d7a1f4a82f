"""A linear probe: logistic regression on frozen embeddings, saved with what its use requires."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy import special

from medsiglip_jax import __version__, metrics
from medsiglip_jax.data.labels import label_columns
from medsiglip_jax.embeddings.probe import logistic
from medsiglip_jax.embeddings.probe.scaling import Scaling, fit_scaling
from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.files import arrays, places, settings, storage
from medsiglip_jax.files import json as json_files
from medsiglip_jax.files.failures import explained

_FORMAT = "medsiglip_jax probe 1"
_OWN, _OF_SCALING = ("coefficients", "intercepts", "thresholds"), ("mean", "deviation")


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe.

    Attributes:
        coefficients: of each class; NaN for a finding that could not be fitted.
        intercepts: of each class; NaN likewise, -inf for an exclusive class without training rows.
        thresholds: the probability from which on a row is positive for each class, chosen on
            validation rows; NaN where the training or validation rows have only one label.
        scaling: of the vectors.
        classes: names.
        exclusive: whether a row has exactly one class (softmax), or any findings (sigmoid).
        provenance: how the embeddings were made that it takes.
        facts: how it was fitted, and its AUCs on the validation rows; JSON.
    """

    coefficients: Float64[np.ndarray, "c d"]
    intercepts: Float64[np.ndarray, " c"]
    thresholds: Float64[np.ndarray, " c"]
    scaling: Scaling
    classes: tuple[str, ...]
    exclusive: bool
    provenance: Provenance
    facts: Mapping[str, Any]

    @property
    def fitted(self) -> Bool[np.ndarray, " c"]:
        """Which classes have training rows of both labels."""
        return np.isfinite(self.intercepts)

    def predict(
        self, vectors: Float[np.ndarray, "n d"], made: Provenance | None = None
    ) -> Float64[np.ndarray, "n c"]:
        """Returns the probability of each class; NaN for findings that could not be fitted.

        Args:
            vectors: embeddings.
            made: how they were made, if known.

        Raises:
            ValueError: they were made differently, have another size, or are not finite.
        """
        self.provenance.check(made or Provenance(vectors.shape[1]))
        logits = self.scaling(vectors) @ self.coefficients.T + self.intercepts
        return special.softmax(logits, axis=1) if self.exclusive else special.expit(logits)

    def positive(self, probabilities: Float64[np.ndarray, "n c"]) -> Bool[np.ndarray, "n c"]:
        """Which classes reach their thresholds; never those without one."""
        return probabilities >= self.thresholds

    def save(self, path: places.Given) -> None:
        """Writes an .npz without pickle, whose entry "metadata" is JSON; equal probes, equal bytes.

        Raises:
            ValueError: the name does not end in .npz.
        """
        check_name(path)
        metadata = {
            "format": _FORMAT, "classes": self.classes, "exclusive": self.exclusive,
            "unit": self.scaling.unit, "provenance": asdict(self.provenance),
            "facts": dict(self.facts),
        }  # fmt: skip
        arrays = {name: getattr(self, name) for name in _OWN}
        arrays |= {name: getattr(self.scaling, name) for name in _OF_SCALING}
        with storage.new_file(places.at(path)) as partial, open(partial, "wb") as file:
            np.savez(file, metadata=np.array(json_files.dumps(metadata)), **arrays)


def check_name(path: places.Given) -> None:
    """Raises ValueError unless the name of a probe ends in .npz."""
    if Path(str(path)).suffix != ".npz":
        raise ValueError(f"{path}: expected a name that ends in .npz")


def open_probe(path: places.Given) -> Probe:
    """Reads what `Probe.save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a probe, or one of another version.
    """
    place = places.at(path)
    if not place.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with explained(path, "not a probe that this version can read"), place.open("rb") as file:
        with arrays.opened(file) as content:
            return _read(content)


@dataclass(frozen=True)
class _Metadata:
    """The entry "metadata" of a probe's file."""

    format: Annotated[str, settings.one_of([_FORMAT])]
    classes: tuple[str, ...]
    exclusive: bool
    unit: bool
    provenance: Provenance
    facts: Mapping[str, Any]


def _read(file: arrays.Npz) -> Probe:
    shape = file.headers["metadata"].shape
    if shape:
        raise ValueError(f"its metadata has the shape {shape}; expected one text")
    metadata = settings.build(_Metadata, json_files.parse(str(file.read("metadata"))), "metadata")
    c, d = len(metadata.classes), metadata.provenance.dim
    expected = dict(zip((*_OWN, *_OF_SCALING), ((c, d), (c,), (c,), (d,), (d,)), strict=True))
    for name, shape in expected.items():
        header = file.headers[name]
        if header.shape != shape or header.dtype.kind != "f":
            raise ValueError(f"{name} is {header.dtype} {header.shape}; expected floats {shape}")
    own, of_scaling = ({name: file.read(name) for name in names} for names in (_OWN, _OF_SCALING))
    probe = Probe(
        **own, scaling=Scaling(**of_scaling, unit=metadata.unit), classes=metadata.classes,
        exclusive=metadata.exclusive, provenance=metadata.provenance, facts=metadata.facts,
    )  # fmt: skip
    _check_finite(probe)
    return probe


def _check_finite(probe: Probe) -> None:
    """Raises a ValueError for numbers that would make probabilities undefined where they are not
    meant to be."""
    arrays = {"mean": probe.scaling.mean, "deviation": probe.scaling.deviation,
              "coefficients": probe.coefficients[probe.fitted]}  # fmt: skip
    for name, values in arrays.items():
        if wrong := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{name} has {wrong:,} values that are NaN or infinite; fit it again")
    if not (probe.scaling.deviation > 0).all():
        raise ValueError("deviation has values that are not positive; fit it again")
    if not probe.fitted.any() or (probe.exclusive and np.isnan(probe.intercepts).any()):
        raise ValueError("intercepts are NaN or infinite; fit it again")


def fit(
    vectors: Float[np.ndarray, "n d"],
    labels: logistic.Labels,
    validation_vectors: Float[np.ndarray, "m d"],
    validation_labels: logistic.Labels,
    classes: Sequence[str] = (),
    *,
    scale: str = "standard",
    rule: str = "youden",
    at_least: float | None = None,
    provenance: Provenance | None = None,
) -> Probe:
    """Fits a probe; the same arguments give the same probe.

    The regularisation strength and the thresholds are chosen on the validation rows, everything
    else comes from the training rows. See `logistic.fit`.

    Args:
        vectors: training embeddings.
        labels: class numbers [n], -1 unknown; or findings [n, c] of 0, 1 and NaN for unknown.
        validation_vectors: of other patients.
        validation_labels: as `labels`.
        classes: names; default the numbers of the classes.
        scale: of the features; see `scaling.fit_scaling`.
        rule: how thresholds are chosen; see `metrics.choose_threshold`.
        at_least: the sensitivity or specificity that the rule asks for.
        provenance: how the vectors were made; vectors to predict on must agree with it.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: shapes disagree, vectors are not finite, all labels are of one class, or the
            scale or rule is unknown.
    """
    metrics.check_rule(rule, at_least)
    classes = tuple(classes) or tuple(map(str, range(count_classes(labels, validation_labels))))
    for x, y in ((vectors, labels), (validation_vectors, validation_labels)):
        _check(x, y, classes)
    scaling = fit_scaling(vectors, scale)
    train = logistic.Labelled(scaling(vectors), labels)
    validation = logistic.Labelled(scaling(validation_vectors), validation_labels)
    fitted = logistic.fit(train, validation, len(classes))
    facts = {
        "scale": scale, "strengths": json_files.plain(fitted.strengths),
        "rule": rule, "at_least": at_least,
        "rows": len(vectors), "validation_rows": len(validation_vectors), "version": __version__,
    }  # fmt: skip
    probe = Probe(
        fitted.coefficients, fitted.intercepts, np.full(len(classes), np.nan), scaling, classes,
        labels.ndim == 1, provenance or Provenance(vectors.shape[1]), facts,
    )  # fmt: skip
    return _with_thresholds(probe, validation_vectors, validation_labels)


def count_classes(*labels: logistic.Labels) -> int:
    """The number of findings, or one more than the highest number of a class."""
    if labels[0].ndim == 2:
        return labels[0].shape[1]
    return int(max(part.max(initial=-1) for part in labels)) + 1


def _check(vectors: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    fits = labels.shape in ((len(vectors),), (len(vectors), len(classes)))
    if not fits or (labels.ndim == 1 and np.any((labels < -1) | (labels >= len(classes)))):
        raise ValueError(
            f"labels has shape {labels.shape} and values {np.unique(labels)[:8]}; expected for "
            f"{len(vectors)} vectors and {len(classes)} classes one number each below "
            f"{len(classes)} (-1 unknown), or a column of 0, 1 and NaN for each class"
        )


def _with_thresholds(probe: Probe, vectors: np.ndarray, labels: np.ndarray) -> Probe:
    scores, columns = probe.predict(vectors), label_columns(labels, len(probe.classes))
    thresholds, aucs = np.full((2, len(probe.classes)), np.nan)
    rule, at_least = probe.facts["rule"], probe.facts["at_least"]
    for k in np.flatnonzero(probe.fitted):
        rows = metrics.known(scores[:, k], columns[:, k])
        thresholds[k] = metrics.choose_threshold(rows.scores, rows.positive, rule, at_least)
        aucs[k] = metrics.auc(rows.scores, rows.positive)
    facts = {**probe.facts, "validation_auc": json_files.plain(aucs)}
    return replace(probe, thresholds=thresholds, facts=facts)
