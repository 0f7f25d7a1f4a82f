"""A probe: logistic regression on frozen embeddings, or on a hidden layer of them, saved with what
its use requires."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy import special

from medsiglip_jax import __version__, metrics
from medsiglip_jax.data.labels import label_columns
from medsiglip_jax.embeddings.probe import hidden as hidden_layer
from medsiglip_jax.embeddings.probe import logistic
from medsiglip_jax.embeddings.probe.hidden import Hidden
from medsiglip_jax.embeddings.probe.scaling import Scaling, fit_scaling
from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.files import arrays, places, settings, storage
from medsiglip_jax.files import json as json_files

SUFFIX = ".npz"  # of the files of probes
_FORMAT = "medsiglip_jax probe 1"
_OWN, _OF_SCALING = ("coefficients", "intercepts", "thresholds"), ("mean", "deviation")
_STRENGTHS = (1e-12, 1e12)  # beyond, float64 cannot hold the problem
_OF_HIDDEN = ("hidden_weights", "hidden_biases")


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
        hidden: the layer that turns scaled vectors into what the coefficients are for; None in a
            linear probe, where h is d.
    """

    coefficients: Float64[np.ndarray, "c h"]
    intercepts: Float64[np.ndarray, " c"]
    thresholds: Float64[np.ndarray, " c"]
    scaling: Scaling
    classes: tuple[str, ...]
    exclusive: bool
    provenance: Provenance
    facts: Mapping[str, Any]
    hidden: Hidden | None = None

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
        features = self.scaling(vectors)
        features = features if self.hidden is None else self.hidden(features)
        logits = features @ self.coefficients.T + self.intercepts
        return special.softmax(logits, axis=1) if self.exclusive else special.expit(logits)

    def positive(self, probabilities: Float64[np.ndarray, "n c"]) -> Bool[np.ndarray, "n c"]:
        """Which classes reach their thresholds; never those without one."""
        return probabilities >= self.thresholds

    def save(self, path: places.Given) -> None:
        """Writes an .npz without pickle, whose entry "metadata" is JSON; equal probes, equal bytes.

        Raises:
            ValueError: the name does not end in .npz.
        """
        places.check_suffix(path, SUFFIX)
        with storage.new_file(places.at(path)) as partial, open(partial, "wb") as file:
            self._write(file)

    def to_bytes(self) -> bytes:
        """What `save` writes, for a file of something that holds a probe; see `read_probe`."""
        stream = io.BytesIO()
        self._write(stream)
        return stream.getvalue()

    def _write(self, file: Any) -> None:
        metadata = {
            "format": _FORMAT, "classes": self.classes, "exclusive": self.exclusive,
            "unit": self.scaling.unit, "provenance": asdict(self.provenance),
            "facts": dict(self.facts),
        }  # fmt: skip
        arrays = {name: getattr(self, name) for name in _OWN}
        arrays |= {name: getattr(self.scaling, name) for name in _OF_SCALING}
        arrays |= dict(zip(_OF_HIDDEN, self.hidden or (), strict=False))
        np.savez(file, metadata=np.array(json_files.dumps(metadata)), **arrays)


def open_probe(path: places.Given) -> Probe:
    """Reads what `Probe.save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a probe, or one of another version.
    """
    with arrays.opened_file(path, "not a probe that this version can read") as content:
        return read_probe(content)


@dataclass(frozen=True)
class _Metadata:
    """The entry "metadata" of a probe's file."""

    format: Annotated[str, settings.one_of([_FORMAT])]
    classes: tuple[str, ...]
    exclusive: bool
    unit: bool
    provenance: Provenance
    facts: Mapping[str, Any]


def read_probe(file: arrays.Npz) -> Probe:
    """A probe from its open file, for `open_probe`, which explains what is wrong with it."""
    shape = file.headers["metadata"].shape
    if shape:
        raise ValueError(f"its metadata has the shape {shape}; expected one text")
    metadata = settings.build(_Metadata, json_files.parse(str(file.read("metadata"))), "metadata")
    for name, shape in _shapes(file, len(metadata.classes), metadata.provenance.dim).items():
        header = file.headers[name]
        if header.shape != shape or header.dtype.kind != "f":
            raise ValueError(f"{name} is {header.dtype} {header.shape}; expected floats {shape}")
    own, of_scaling = ({name: file.read(name) for name in names} for names in (_OWN, _OF_SCALING))
    hidden = Hidden(*map(file.read, _OF_HIDDEN)) if _has_hidden(file) else None
    probe = Probe(
        **own, scaling=Scaling(**of_scaling, unit=metadata.unit), classes=metadata.classes,
        exclusive=metadata.exclusive, provenance=metadata.provenance, facts=metadata.facts,
        hidden=hidden,
    )  # fmt: skip
    _check_finite(probe)
    return probe


def _has_hidden(file: arrays.Npz) -> bool:
    return any(name in file.headers for name in _OF_HIDDEN)


def _shapes(file: arrays.Npz, c: int, d: int) -> dict[str, tuple[int, ...]]:
    """The shapes that the arrays have to have for c classes and vectors of d numbers."""
    h, of_hidden = d, {}
    if _has_hidden(file):
        h = math.prod(file.headers["hidden_biases"].shape)
        of_hidden = {"hidden_weights": (d, h), "hidden_biases": (h,)}
    own = {"coefficients": (c, h), "intercepts": (c,), "thresholds": (c,)}
    return {**own, "mean": (d,), "deviation": (d,), **of_hidden}


def _check_finite(probe: Probe) -> None:
    """Raises a ValueError for numbers that would make probabilities undefined where they are not
    meant to be."""
    arrays = {"mean": probe.scaling.mean, "deviation": probe.scaling.deviation,
              "coefficients": probe.coefficients[probe.fitted],
              **dict(zip(_OF_HIDDEN, probe.hidden or (), strict=False))}  # fmt: skip
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
    strength: float | None = None,
    hidden: int = 0,
    seed: int = 0,
    rule: str = "youden",
    at_least: float | None = None,
    provenance: Provenance | None = None,
) -> Probe:
    """Fits a probe; the same arguments give the same probe.

    The regularisation strength (or when to stop training the hidden layer) and the thresholds are
    chosen on the validation rows, everything else comes from the training rows. See `logistic.fit`
    and `hidden.fit`.

    Args:
        vectors: training embeddings.
        labels: class numbers [n], -1 unknown; or findings [n, c] of 0, 1 and NaN for unknown.
        validation_vectors: of other patients.
        validation_labels: as `labels`.
        classes: names; default the numbers of the classes.
        scale: of the features; see `scaling.fit_scaling`.
        strength: the inverse strength of regularisation (scikit-learn's C) of the scaled features;
            by default the best of ten on the validation rows.
        hidden: units of a hidden layer; 0 is a linear probe.
        seed: of the hidden layer.
        rule: how thresholds are chosen; see `metrics.choose_threshold`.
        at_least: the sensitivity or specificity that the rule asks for.
        provenance: how the vectors were made; vectors to predict on must agree with it.

    Raises:
        ModuleNotFoundError: a hidden layer needs optax.
        ValueError: shapes disagree, vectors are not finite, all labels are of one class, or an
            option is unknown or out of range.
    """
    check_options(rule, at_least, strength, hidden)
    classes = tuple(classes) or tuple(map(str, range(count_classes(labels, validation_labels))))
    for x, y in ((vectors, labels), (validation_vectors, validation_labels)):
        _check(x, y, classes)
    scaling = fit_scaling(vectors, scale)
    train = logistic.Labelled(scaling(vectors), labels)
    validation = logistic.Labelled(scaling(validation_vectors), validation_labels)
    fitted, layer, choices = _fitted(train, validation, len(classes), scale, strength, hidden, seed)
    facts = {
        "scale": scale, **choices, "rule": rule, "at_least": at_least,
        "rows": len(vectors), "validation_rows": len(validation_vectors), "version": __version__,
    }  # fmt: skip
    probe = Probe(
        fitted.coefficients, fitted.intercepts, np.full(len(classes), np.nan), scaling, classes,
        labels.ndim == 1, provenance or Provenance(vectors.shape[1]), facts, layer,
    )  # fmt: skip
    return _with_thresholds(probe, validation_vectors, validation_labels)


def check_options(
    rule: str, at_least: float | None, strength: float | None = None, hidden: int = 0
) -> None:
    """Raises ValueError unless `fit` accepts these, ModuleNotFoundError without what it needs."""
    metrics.check_rule(rule, at_least)
    if strength is not None and not _STRENGTHS[0] <= strength <= _STRENGTHS[1]:
        raise ValueError(f"strength is {strength}; expected 1e-12 to 1e12")
    if hidden < 0 or (hidden and strength is not None):
        raise ValueError(
            f"hidden is {hidden} and strength {strength}; expected 0 or more units, and "
            "no strength with a hidden layer"
        )
    if hidden:
        hidden_layer.installed()  # fail now, not after the embeddings have been read


def _fitted(
    train: logistic.Labelled, validation: logistic.Labelled, classes: int, scale: str,
    strength: float | None, hidden: int, seed: int,
) -> tuple[Any, Hidden | None, dict[str, Any]]:  # fmt: skip
    """Coefficients and intercepts, the hidden layer if there is one, and facts of the fit."""
    if hidden:
        trained = hidden_layer.fit(train, validation, classes, hidden, seed)
        nothing = [None] * classes
        facts = {"hidden": hidden, "seed": seed, "epochs": trained.epochs, "strengths": nothing}
        return trained, trained.hidden, facts
    # The strengths to choose from are those for features of mean square 1.
    square = 1.0 if scale == "standard" else float((train.vectors**2).mean()) or 1.0
    tried = [c / square for c in logistic.STRENGTHS] if strength is None else [strength]
    fitted = logistic.fit(train, validation, classes, tried)
    return fitted, None, {"strengths": json_files.plain(fitted.strengths)}


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
