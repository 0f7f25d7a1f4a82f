"""The reference: images in control, and what new ones are compared with."""

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from medsiglip_jax import __version__
from medsiglip_jax.embeddings import provenance
from medsiglip_jax.embeddings.probe import linear
from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.files import arrays, places, settings, storage
from medsiglip_jax.files import json as json_files
from medsiglip_jax.inference import abstain
from medsiglip_jax.inference.abstain import Gaussian
from medsiglip_jax.inference.classify import encode_texts
from medsiglip_jax.model.api import Model
from medsiglip_jax.trust.monitor import gaussian as gaussians
from medsiglip_jax.trust.monitor import kernel
from medsiglip_jax.trust.monitor.images import Given, Images, Labels, read
from medsiglip_jax.trust.monitor.windows import FEWEST

NEIGHBOUR = 5
MOST_ROWS = 5000  # images that are kept by default: 23 MB at 1,152 numbers
_MOST_VALUES = 50  # of a column; more would be ids or measurements, not categories


@dataclass(frozen=True, eq=False)
class Prompts:
    """Texts that images are scored against, zero-shot.

    Attributes:
        texts: what they are.
        vectors: their unit embeddings.
        t, b: log temperature and bias of the model.
    """

    texts: tuple[str, ...]
    vectors: Float32[np.ndarray, "t d"]
    t: float
    b: float

    def logits(self, vectors: Float32[np.ndarray, "n d"]) -> Float64[np.ndarray, "n t"]:
        """exp(t) * cosine + b of each image and text."""
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = (vectors / np.maximum(lengths, 1e-30)) @ self.vectors.T
        return np.exp(self.t) * cosines.astype(np.float64) + self.b


def encode_prompts(model: Model, texts: Sequence[str]) -> Prompts:
    """Embeds texts with the model that made the embeddings."""
    vectors = np.asarray(encode_texts(model, texts), np.float32)
    t, b = (np.asarray(model.params[name], np.float32).item() for name in "tb")
    return Prompts(tuple(texts), vectors, t, b)


@dataclass(frozen=True, eq=False)
class Reference:
    """Images in control.

    It holds embeddings and the values of the columns that were asked for, and no ids, names of
    files or patients: those are numbered.

    Attributes:
        provenance: how the embeddings were made.
        vectors: the embeddings of the images.
        groups: number of the patient of each.
        gaussian: the Gaussian that was fitted to the vectors.
        bandwidth: that of the kernel, a squared distance; see `kernel.median_bandwidth`.
        mahalanobis: distance of each image by a fit without its patient.
        neighbours: distance of each to the nearest of other patients but four.
        prompts: for zero-shot scores, or None.
        probe: for its scores, or None.
        by: the columns whose values are strata.
        columns: column -> its values.
        codes: number of its value, for each image and column.
        labels: if they are known.
        unreadable: number of inputs that could not be read, and of all.
        facts: what is recorded of the fit, as JSON has it.
    """

    provenance: Provenance
    vectors: Float32[np.ndarray, "n d"]
    groups: Int64[np.ndarray, " n"]
    gaussian: Gaussian
    bandwidth: float
    mahalanobis: Float64[np.ndarray, " n"]
    neighbours: Float64[np.ndarray, " n"]
    prompts: Prompts | None = None
    probe: Probe | None = None
    by: tuple[str, ...] = ()
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    codes: Int64[np.ndarray, "n k"] | None = None
    labels: Labels | None = None
    unreadable: tuple[int, int] = (0, 0)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.vectors)

    @functools.cached_property
    def centred(self) -> Float32[np.ndarray, "n d"]:
        """The vectors from their mean."""
        return kernel.centred(self.vectors, self.gaussian.mean)

    def distance_to_neighbour(
        self, vectors: Float32[np.ndarray, "n d"]
    ) -> Float64[np.ndarray, " n"]:
        """The distance of new vectors to their fifth nearest neighbour."""
        new = kernel.centred(vectors, self.gaussian.mean)
        return kernel.neighbour_distances(new, self.centred, NEIGHBOUR)

    def strata(self) -> Iterator[tuple[str, str, str, Int64[np.ndarray, " n"]]]:
        """Name, column, value and rows of each: all images, and those of each value of `by`."""
        yield "all", "", "", np.arange(len(self))
        for name in self.by:
            assert self.codes is not None
            own = self.codes[:, list(self.columns).index(name)]
            for code, value in enumerate(self.columns[name]):
                yield f"{name}={value}", name, value, np.flatnonzero(own == code)

    def save(self, path: places.Given) -> None:
        """Writes an .npz without pickle, whose entry "metadata" is JSON; equal references, equal
        bytes."""
        places.check_suffix(path, ".npz")
        metadata = {
            "format": abstain.FORMAT, "provenance": asdict(self.provenance),
            "rows": len(self), "shrinkage": self.gaussian.shrinkage, "bandwidth": self.bandwidth,
            "texts": self.prompts.texts if self.prompts else (),
            "scale": (self.prompts.t, self.prompts.b) if self.prompts else (),
            "by": self.by, "columns": self.columns,
            "classes": self.labels.classes if self.labels else (),
            "unreadable": self.unreadable, "facts": self.facts,
        }  # fmt: skip
        content: dict[str, Any] = {
            "vectors": self.vectors, "groups": self.groups, "mean": self.gaussian.mean,
            "axes": self.gaussian.axes, "variances": self.gaussian.variances,
            "mahalanobis": self.mahalanobis, "neighbours": self.neighbours,
        }  # fmt: skip
        if self.codes is not None:
            content["codes"] = self.codes
        if self.prompts:
            content["prompts"] = self.prompts.vectors
        if self.labels:
            content["labels"] = self.labels.values
        if self.probe:
            content["probe"] = np.frombuffer(self.probe.to_bytes(), np.uint8)
        with storage.new_file(places.at(path)) as partial, open(partial, "wb") as file:
            np.savez(file, metadata=np.array(json_files.dumps(metadata)), **content)


def fit(
    embeddings: Embeddings,
    given: Given = Given(),
    *,
    model: Model | None = None,
    texts: Sequence[str] = (),
    probe: Probe | None = None,
    most: int = MOST_ROWS,
    seed: int = 0,
) -> Reference:
    """Makes a reference of an embedding run.

    Its images should be of the time and place that is in control, and none that the model or the
    probe was trained on: those are scored better than new ones.

    Args:
        embeddings: the run, of kind image.
        given: tables about the images.
        model: the one that made the embeddings, to embed `texts`.
        texts: prompts whose scores are watched.
        probe: fitted to such embeddings, whose scores are watched.
        most: keep at most so many images.
        seed: the seed of the draw of those, and of pairs for the bandwidth.

    Raises:
        ValueError: too few images or patients, or a model or probe of other embeddings.
    """
    made, manifest = provenance.of_run(embeddings.manifest), embeddings.manifest
    if probe is not None:
        probe.provenance.check(made, embeddings.folder)
    if texts and model is None:
        raise ValueError(
            f"{len(texts)} texts are given without the model that embeds them (model=, --model)"
        )
    if model is not None:
        provenance.of_model(model).check(made, embeddings.folder)
    prompts = encode_prompts(model, texts) if model is not None and texts else None
    images = read(embeddings, given, most, seed)
    facts = {"embeddings": embeddings.digest, "of": len(embeddings)}
    files = manifest.errors, manifest.errors + len(embeddings)
    return build(
        images, made, by=given.columns.by, prompts=prompts, probe=probe, unreadable=files,
        seed=seed, facts=facts,
    )  # fmt: skip


def build(
    images: Images,
    made: Provenance,
    *,
    by: tuple[str, ...] = (),
    prompts: Prompts | None = None,
    probe: Probe | None = None,
    unreadable: tuple[int, int] = (0, 0),
    seed: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> Reference:
    """Makes a reference of images in memory; see `fit` and `Reference`.

    Raises:
        ValueError: too few images or patients, or columns that are no categories.
    """
    _check_size(images)
    columns, codes = _coded(images.categories)
    fitted = gaussians.fit(images.vectors)
    centred = kernel.centred(images.vectors, fitted.mean)
    groups = np.unique(images.groups, return_inverse=True)[1].astype(np.int64)
    known = {"images": len(images), "patients": int(groups.max()) + 1, "seed": seed}
    return Reference(
        made, images.vectors, groups, fitted, kernel.median_bandwidth(centred, seed),
        gaussians.held_out_distances(fitted, images.vectors, groups),
        kernel.neighbour_distances(centred, centred, NEIGHBOUR, groups), prompts, probe, by,
        columns, codes, images.labels, unreadable,
        {**known, **(facts or {}), "version": __version__},
    )  # fmt: skip


def _check_size(images: Images) -> None:
    sizes = np.unique(images.groups, return_counts=True)[1]
    if len(images) < 2 * FEWEST or len(sizes) < 2 or len(images) - sizes.max() < NEIGHBOUR:
        raise ValueError(
            f"a reference of {len(images):,} images of {len(sizes):,} patients is too small; "
            f"expected at least {2 * FEWEST} images of several patients"
        )


def _coded(
    categories: Mapping[str, Sequence[str]],
) -> tuple[dict[str, tuple[str, ...]], np.ndarray | None]:
    """The values of each column, and their numbers for each image."""
    columns, codes = {}, []
    for name, cells in categories.items():
        values, numbers = np.unique(np.asarray(cells, object), return_inverse=True)
        if len(values) > _MOST_VALUES:
            raise ValueError(
                f"column {name!r} has {len(values):,} values, the first {values[0]!r}; expected "
                f"categories, at most {_MOST_VALUES}"
            )
        columns[name] = tuple(values.tolist())
        codes.append(numbers)
    return columns, np.stack(codes, axis=1).astype(np.int64) if codes else None


# --------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Metadata:
    """The entry "metadata" of a reference's file."""

    format: str
    provenance: Provenance
    rows: int
    shrinkage: float
    bandwidth: float
    texts: tuple[str, ...]
    scale: tuple[float, ...]
    by: tuple[str, ...]
    columns: Mapping[str, Any]
    classes: tuple[str, ...]
    unreadable: tuple[int, int]
    facts: Mapping[str, Any]


def open_reference(path: places.Given) -> Reference:
    """Reads what `Reference.save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a reference, or one of another version.
    """
    with arrays.opened_file(path, *abstain.NO_REFERENCE) as content:
        return _read(content)


def _read(file: arrays.Npz) -> Reference:
    content = abstain.read_metadata(file)
    metadata = settings.build(_Metadata, content, "metadata")
    n, d = metadata.rows, metadata.provenance.dim
    columns = {name: tuple(map(str, values)) for name, values in metadata.columns.items()}
    if not set(metadata.by) <= set(columns) or not metadata.bandwidth > 0:
        raise ValueError(f"by is {metadata.by} and bandwidth {metadata.bandwidth}; fit it again")
    floats = functools.partial(abstain.read_floats, file)
    codes = _integers(file, "codes", (n, len(columns))) if columns else None
    if codes is not None and any(
        not 0 <= column.min(initial=0) <= column.max(initial=0) < len(values)
        for column, values in zip(codes.T, columns.values(), strict=True)
    ):
        raise ValueError("codes has numbers of no value; fit it again")
    prompts = None
    if metadata.texts:
        t, b = metadata.scale
        vectors = floats("prompts", (len(metadata.texts), d)).astype(np.float32)
        prompts = Prompts(metadata.texts, vectors, t, b)
    return Reference(
        metadata.provenance, floats("vectors", (n, d)).astype(np.float32),
        _integers(file, "groups", (n,)), abstain.read_gaussian(file, content, d),
        metadata.bandwidth, floats("mahalanobis", (n,)), floats("neighbours", (n,)), prompts,
        _probe(file), metadata.by, columns, codes, _labels(file, n, metadata.classes),
        metadata.unreadable, metadata.facts,
    )  # fmt: skip


def _integers(file: arrays.Npz, name: str, shape: tuple[int, ...]) -> np.ndarray:
    header = file.headers[name]
    if header.shape != shape or header.dtype != np.int64:
        raise ValueError(f"{name} is {header.dtype} {header.shape}; expected int64 {shape}")
    return file.read(name)


def _probe(file: arrays.Npz) -> Probe | None:
    if (header := file.headers.get("probe")) is None:
        return None
    if header.dtype != np.uint8 or len(header.shape) != 1:
        raise ValueError(f"probe is {header.dtype} {header.shape}; expected bytes")
    with arrays.opened(io.BytesIO(file.read("probe").tobytes())) as inside:
        return linear.read_probe(inside)


def _labels(file: arrays.Npz, n: int, classes: tuple[str, ...]) -> Labels | None:
    if not classes:
        return None
    header = file.headers["labels"]
    if header.shape != (n, len(classes)) or header.dtype != np.float64:
        raise ValueError(f"labels is {header.dtype} {header.shape}; expected {n} rows of classes")
    return Labels(classes, file.read("labels"))
