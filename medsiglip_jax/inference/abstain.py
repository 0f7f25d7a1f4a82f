"""No answer: rows that are too far from what a reference knows, or whose score is unsure.

`monitor fit` writes the reference; this file needs of it only the distances, and nothing but NumPy.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64

from medsiglip_jax.files import arrays, places
from medsiglip_jax.files.documents import parse

FORMAT = "medsiglip_jax reference 1"
# What is wrong with a file that is none, and what to do.
NO_REFERENCE = ("not a reference that this version can read", "monitor fit writes one")


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The mean and the covariance of vectors, by its principal axes.

    The covariance is shrunk towards a multiple of the identity, not cut to its leading components:
    noise in images shows along axes of small variance, which a cut would drop. Shrinkage also makes
    it invertible where there are fewer vectors than numbers in each.

    Attributes:
        mean: of the vectors.
        axes: orthonormal, one per column.
        variances: of the vectors along each axis, not shrunk.
        shrinkage: 0 keeps the variances, 1 makes them all equal.
        rows: number of vectors.
    """

    mean: Float64[np.ndarray, " d"]
    axes: Float32[np.ndarray, "d d"]
    variances: Float64[np.ndarray, " d"]
    shrinkage: float
    rows: int

    def shrunk(self, left_out: int = 0) -> Float64[np.ndarray, " d"]:
        """The variances after shrinking; without some rows those of the others count more."""
        factor = self.rows / (self.rows - left_out)
        own = (1 - self.shrinkage) * factor * self.variances
        return own + self.shrinkage * float(self.variances.mean())

    def project(self, x: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
        """Vectors along the axes, from the mean."""
        return ((x - self.mean).astype(np.float32) @ self.axes).astype(np.float64)

    def distances(self, x: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, " n"]:
        """Mahalanobis distances from the mean."""
        return np.sqrt((self.project(x) ** 2 / self.shrunk()).sum(axis=1))


def conformal_quantile(held_out: Float64[np.ndarray, " n"], at: float) -> float:
    """The distance that new images in control exceed with a probability of at most 1 - at.

    The ceil((n + 1) at)-th smallest of n distances, which holds for any distribution if a new
    distance is as likely to have any place among them.

    Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (2005), 2.2.

    Raises:
        ValueError: `at` is not between 0 and 1, or there are too few distances.
    """
    if not 0 < at < 1:
        raise ValueError(f"abstain-at is {at}; expected more than 0 and less than 1, such as 0.99")
    rank = int(np.ceil((len(held_out) + 1) * at - 1e-9))
    if rank > len(held_out):
        needed = int(np.ceil(at / (1 - at) - 1e-9))
        raise ValueError(
            f"abstain-at is {at}: a reference of {len(held_out):,} images cannot tell; expected at "
            f"least {needed:,} images, or a lower share"
        )
    return float(np.sort(held_out)[rank - 1])


class Judged(NamedTuple):
    """How far rows are from the reference, and why there is no answer for each, or None."""

    distances: Float64[np.ndarray, " n"]
    reasons: list[str | None]


@dataclass(frozen=True, eq=False)
class Abstention:
    """When no answer is given.

    Attributes:
        gaussian: what the reference knows.
        limit: the distance beyond which an image is not known.
        at: the share of images in control that are within the limit.
        reference: SHA-256 of the file.
        unsure: calibrated scores between these two are no answer, and of exclusive classes a
            highest one below the second; None for any answer.
    """

    gaussian: Gaussian
    limit: float
    at: float
    reference: str
    unsure: tuple[float, float] | None = None

    def __post_init__(self):
        if self.unsure and not 0 <= self.unsure[0] < self.unsure[1] <= 1:
            low, high = self.unsure
            raise ValueError(f"unsure is {low} to {high}; expected LOW below HIGH, both in [0, 1]")

    def judge(
        self,
        vectors: Float[np.ndarray, "n d"],
        probabilities: Float[np.ndarray, "n c"] | None = None,
        classes: Sequence[str] = (),
        exclusive: bool = False,
    ) -> Judged:
        """Says of each row whether there is an answer.

        Args:
            vectors: embeddings, made as those of the reference.
            probabilities: calibrated scores of classes, where there are any.
            classes: their names.
            exclusive: whether a row has exactly one class, so that only its highest score counts.
        """
        distances = self.gaussian.distances(vectors)
        reasons = [self._far(distance) for distance in distances.tolist()]
        if self.unsure is not None and probabilities is not None:
            rows = zip(reasons, probabilities, strict=True)
            reasons = [far or self._unsure(row, classes, exclusive) for far, row in rows]
        return Judged(distances, reasons)

    def _far(self, distance: float) -> str | None:
        if distance <= self.limit:  # false for NaN, too
            return None
        return (
            f"unlike the reference: its distance {distance:.4g} is above {self.limit:.4g}, which "
            f"{self.at:.4g} of known images do not exceed"
        )

    def _unsure(self, row: np.ndarray, classes: Sequence[str], exclusive: bool) -> str | None:
        assert self.unsure is not None
        low, high = self.unsure
        if exclusive:  # a highest probability of at most LOW is less sure still
            k = int(np.nanargmax(row))
            named = f"unsure: {classes[k]} {row[k]:.3g}, the likeliest, is below {high:g}"
            return named if row[k] < high else None
        between = [k for k, p in enumerate(row) if low < p < high]
        if not between:
            return None
        named = ", ".join(f"{classes[k]} {row[k]:.3g}" for k in between)
        return f"unsure: {named} lies between {low:g} and {high:g}"


@dataclass(frozen=True, eq=False)
class KnownImages:
    """What a reference file says of images in control.

    Attributes:
        gaussian: of their embeddings.
        held_out: the distance of each by a fit without its patient.
        provenance: how the embeddings were made, as JSON has it.
        sha256: of the file.
    """

    gaussian: Gaussian
    held_out: Float64[np.ndarray, " n"]
    provenance: Mapping[str, Any]
    sha256: str

    def abstention(self, at: float, unsure: tuple[float, float] | None = None) -> Abstention:
        """Abstains on a share of 1 - at of images in control, and on unsure scores."""
        limit = conformal_quantile(self.held_out, at)
        return Abstention(self.gaussian, limit, at, self.sha256, unsure)


def open_reference(path: places.Given) -> KnownImages:
    """Reads what is needed of the file that `monitor fit` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a reference, or one of another version.
    """
    with arrays.opened_file(path, *NO_REFERENCE) as content:
        metadata = read_metadata(content)
        made = metadata["provenance"]
        gaussian = read_gaussian(content, metadata, int(made["dim"]))
        held_out = read_floats(content, "mahalanobis", (gaussian.rows,))
    sha256 = hashlib.sha256(places.at(path).read_bytes()).hexdigest()
    return KnownImages(gaussian, held_out, made, sha256)


def read_metadata(file: arrays.Npz) -> dict[str, Any]:
    """The entry "metadata" of a reference, which is one JSON text."""
    shape = file.headers["metadata"].shape
    if shape:
        raise ValueError(f"its metadata has the shape {shape}; expected one text")
    metadata = parse(str(file.read("metadata")))
    if metadata["format"] != FORMAT:
        raise ValueError(f"its format is {metadata['format']!r}; expected {FORMAT!r}")
    return metadata


def read_gaussian(file: arrays.Npz, metadata: Mapping[str, Any], d: int) -> Gaussian:
    """The Gaussian of a reference whose embeddings have d numbers."""
    shrinkage, rows = float(metadata["shrinkage"]), int(metadata["rows"])
    if not 0 <= shrinkage <= 1 or rows < 2:
        raise ValueError(f"shrinkage {shrinkage} of {rows} rows; expected 0 to 1 of at least 2")
    mean, variances = (read_floats(file, name, (d,)) for name in ("mean", "variances"))
    axes = read_floats(file, "axes", (d, d)).astype(np.float32)
    gaussian = Gaussian(mean, axes, variances, shrinkage, rows)
    if not (gaussian.shrunk() > 0).all():
        raise ValueError("variances has values that are not positive; fit it again")
    return gaussian


def read_floats(file: arrays.Npz, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of finite numbers of this shape; the header is looked at before it is read."""
    header = file.headers[name]
    if header.shape != shape or header.dtype.kind != "f":
        raise ValueError(f"{name} is {header.dtype} {header.shape}; expected floats {shape}")
    values = file.read(name)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has values that are NaN or infinite; fit it again")
    return values.astype(np.float64)
