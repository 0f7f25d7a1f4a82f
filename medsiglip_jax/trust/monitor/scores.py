"""Embeddings as the numbers and categories that are compared: distances, scores, metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from medsiglip_jax.trust.monitor.images import Images, Labels
from medsiglip_jax.trust.monitor.reference import Reference

_UNSEEN = -1  # the category of a value that the reference lacks


@dataclass(frozen=True, eq=False)
class Scored:
    """Images by what is compared of them.

    Attributes:
        distances: name of a test -> the distance of each image from the reference.
        scores: name of a test -> columns of scores.
        categories: name of a test -> number of the category of each image.
        labels: 0, 1 and NaN by class, if they are known.
        predicted: scores by class, if labels are known.
        calibrated: whether those are probabilities, which can be compared with labels.
    """

    distances: Mapping[str, Float64[np.ndarray, " n"]]
    scores: Mapping[str, Float64[np.ndarray, "n c"]]
    categories: Mapping[str, Int64[np.ndarray, " n"]]
    labels: Float64[np.ndarray, "n c"] | None = None
    predicted: Float64[np.ndarray, "n c"] | None = None
    calibrated: bool = False

    def take(self, rows: Int64[np.ndarray, " k"]) -> "Scored":
        """Some of the images."""

        def taken(named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: x[rows] for name, x in named.items()}

        return Scored(
            taken(self.distances), taken(self.scores), taken(self.categories),
            None if self.labels is None else self.labels[rows],
            None if self.predicted is None else self.predicted[rows], self.calibrated,
        )  # fmt: skip


def join(first: Scored, second: Scored) -> Scored:
    """Images of both, by what both have."""

    def joined(a: Mapping, b: Mapping) -> dict:
        return {name: np.concatenate([a[name], b[name]]) for name in a if name in b}

    rest = ((first.labels, second.labels), (first.predicted, second.predicted))
    return Scored(
        joined(first.distances, second.distances), joined(first.scores, second.scores),
        joined(first.categories, second.categories),
        *(None if a is None or b is None else np.concatenate([a, b]) for a, b in rest),
        calibrated=second.calibrated,
    )  # fmt: skip


def of_reference(reference: Reference) -> Scored:
    """The images of a reference, each as if it were new."""
    distances = {"mahalanobis": reference.mahalanobis, "knn": reference.neighbours}
    codes = {f"metadata:{name}": reference.codes[:, i] for i, name in enumerate(reference.columns)
             if reference.codes is not None}  # fmt: skip
    return _scored(reference, reference.vectors, distances, codes, reference.labels)


def of_images(reference: Reference, images: Images) -> Scored:
    """New images, whose embeddings were made as those of the reference.

    Raises:
        ValueError: they lack a column of the reference, or have labels of other classes.
    """
    distances = {
        "mahalanobis": reference.gaussian.distances(images.vectors),
        "knn": reference.distance_to_neighbour(images.vectors),
    }
    if lacking := [name for name in reference.columns if name not in images.categories]:
        raise ValueError(
            f"the reference compares {', '.join(reference.columns)}; give a table with "
            f"{', '.join(lacking)} (--metadata TABLE)"
        )
    codes = {
        f"metadata:{name}": _numbers(images.categories[name], values)
        for name, values in reference.columns.items()
    }
    return _scored(reference, images.vectors, distances, codes, images.labels)


def _numbers(cells: Sequence[str], values: Sequence[str]) -> Int64[np.ndarray, " n"]:
    known = {value: number for number, value in enumerate(values)}
    return np.array([known.get(cell, _UNSEEN) for cell in cells], np.int64)


def _scored(
    reference: Reference,
    vectors: Float32[np.ndarray, "n d"],
    distances: Mapping[str, np.ndarray],
    codes: Mapping[str, np.ndarray],
    labels: Labels | None,
) -> Scored:
    scores, categories = {}, dict(codes)
    prompts, probe = reference.prompts, reference.probe
    if prompts is not None:
        scores["zero_shot"] = prompts.logits(vectors)
        if len(prompts.texts) > 1:
            categories["zero_shot_label"] = scores["zero_shot"].argmax(axis=1)
    if probe is not None:
        every = probe.predict(vectors)
        scores["probe"] = every[:, probe.fitted]
        if probe.exclusive:
            categories["probe_label"] = every.argmax(axis=1)
    if (differ := _disagreement(reference, scores)) is not None:
        categories["disagreement"] = differ
    if labels is None:
        return Scored(distances, scores, categories)
    if reference.labels is not None and labels.classes != reference.labels.classes:
        raise ValueError(
            f"labels of {', '.join(labels.classes)}, and the reference has those of "
            f"{', '.join(reference.labels.classes)}; expected the same (--label)"
        )
    predicted = _of_classes(reference, scores, labels.classes)
    calibrated = _are_probabilities(reference, labels.classes)
    return Scored(distances, scores, categories, labels.values, predicted, calibrated)


def _disagreement(
    reference: Reference, scores: Mapping[str, np.ndarray]
) -> Int64[np.ndarray, " n"] | None:
    """1 where probe and zero-shot scores name different labels; None where they cannot be compared.

    They can if there is a text for each class of the probe, in the same order; or of a probe for
    one finding, two texts: with the finding, and without.
    """
    prompts, probe = reference.prompts, reference.probe
    if prompts is None or probe is None or not probe.fitted.all():
        return None
    texts, classes = len(prompts.texts), len(probe.classes)
    by_text, by_probe = scores["zero_shot"].argmax(axis=1), scores["probe"]
    if probe.exclusive and texts == classes:
        return (by_text != by_probe.argmax(axis=1)).astype(np.int64)
    if not probe.exclusive and classes == 1 and texts == 2:
        return ((by_text == 0) != probe.positive(by_probe)[:, 0]).astype(np.int64)
    return None


def _of_classes(
    reference: Reference, scores: Mapping[str, np.ndarray], classes: Sequence[str]
) -> Float64[np.ndarray, "n c"]:
    """The scores of classes: the probe's of that name, or those of the one text that names it."""
    prompts = reference.prompts
    if _are_probabilities(reference, classes):
        named = _fitted_classes(reference)
        return scores["probe"][:, [named.index(name) for name in classes]]
    texts = [text.casefold() for text in prompts.texts] if prompts else []
    matches = [[i for i, text in enumerate(texts) if _plain(c) in text] for c in classes]
    if all(len(places) == 1 for places in matches):
        return scores["zero_shot"][:, [places[0] for places in matches]]
    raise ValueError(
        f"labels of {', '.join(classes)}: the reference has no scores of them; fit it with a probe "
        "of these classes (--probe), or with one text that names each of them (--text)"
    )


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").strip()


def _fitted_classes(reference: Reference) -> list[str]:
    probe = reference.probe
    if probe is None:
        return []
    return [name for name, fitted in zip(probe.classes, probe.fitted, strict=True) if fitted]


def _are_probabilities(reference: Reference, classes: Sequence[str]) -> bool:
    """Whether the scores of classes are the probe's, so that their calibration means something."""
    return set(classes) <= set(_fitted_classes(reference))
