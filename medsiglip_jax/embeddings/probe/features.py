"""Embeddings joined with labels by id, and how they were made."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from medsiglip_jax.data import examples
from medsiglip_jax.data.examples import Examples
from medsiglip_jax.data.tables import Table, read_table
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.files import places
from medsiglip_jax.inference import pseudonyms
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules, treatment
from medsiglip_jax.preprocess.names import Frame, Tile, parse

# Names of the split on which choices are made, the first that there is.
VALIDATION = ("val", "valid", "validation", "dev")
SCALES = ("standard", "unit", "raw")
_BLOCK = 65536  # ids that are Python objects at a time
# The identity of weights that were made here, and have no files: another than that of any files.
_UNSAVED = "weights never saved"
_BINARY = frozenset(("0", "0.0", "False", "1", "1.0", "True", ""))


@dataclass(frozen=True)
class Provenance:
    """How vectors were made; None is not known, and demands nothing.

    Attributes:
        dim: numbers per vector.
        model: sha256 of the weights.
        preprocess: pixel preset.
        normalized: unit vectors, or the raw pooled output.
        source: where the model came from, for messages only.
        dicom: `Rules.to_dict` of the rules by which DICOM files became pixels; of these, only what
            `treatment` has, and `volume`, is compared.
        mpp: micrometres per pixel of tiles of slides.
    """

    dim: int
    model: str | None = None
    preprocess: str | None = None
    normalized: bool | None = None
    source: str | None = None
    dicom: Mapping[str, Any] | None = None
    mpp: float | None = None

    def check(self, made: "Provenance", what: object = "these vectors") -> None:
        """Raises ValueError, naming both, if vectors `made` so are not as they are wanted here.

        Args:
            made: how they were made.
            what: they are, for the message.
        """
        theirs = made._compared()
        differ = [
            f"{name} is {theirs[name]!r}, wanted {mine!r}"
            for name, mine in self._compared().items()
            if None not in (mine, theirs[name]) and mine != theirs[name]
        ]
        if differ:
            raise ValueError(
                f"{what}: made with {made.source or 'arrays'}, wanted as with "
                f"{self.source or 'arrays'}: {'; '.join(differ)}; what is made differently cannot "
                "be compared: embed again, or give the model or probe that goes with them"
            )

    def _compared(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "sha256 of the model": self.model,
            "preprocess": self.preprocess,
            "normalized": self.normalized,
            "dicom": treatment(self.dicom),
            "volume": (self.dicom or {}).get("volume"),
            "mpp": self.mpp,
        }


def wanted(
    model: Model,
    preprocess: str | None = None,
    normalized: bool | None = None,
    dicom: Rules | None = None,
) -> Provenance:
    """That of vectors that can be compared with those of a model."""
    sha256, source = model.sha256 or _UNSAVED, model.source or _UNSAVED
    rules = dicom and dicom.to_dict()
    return Provenance(model.config.embed_dim, sha256, preprocess, normalized, source, rules)


def provenance(manifest: Mapping[str, Any]) -> Provenance:
    """That of what `embed` wrote, from its manifest."""
    return Provenance(
        manifest["dim"], manifest["model"]["sha256"] or _UNSAVED, manifest["preprocess"],
        manifest["normalized"], manifest["model"]["source"] or _UNSAVED, manifest.get("dicom"),
        manifest.get("expansion", {}).get("mpp"),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scaling:
    """Vectors -> features of mean square about 1, for which strengths of regularisation are alike.

    Attributes:
        mean: subtracted.
        deviation: what is then divided by.
        unit: whether vectors are divided by their lengths first.
    """

    mean: Float64[np.ndarray, " d"]
    deviation: Float64[np.ndarray, " d"]
    unit: bool

    def __call__(self, vectors: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
        """Features of vectors.

        Raises:
            ValueError: vectors that are not finite, or of length 0 where they are made unit ones.
        """
        x = unit(vectors) if self.unit else finite(vectors)
        return (x - self.mean) / self.deviation


def fit_scaling(vectors: Float[np.ndarray, "n d"], scale: str) -> Scaling:
    """The scaling of that name, of training vectors.

    Args:
        vectors: at least one.
        scale: "standard": each number to mean 0 and variance 1 over these vectors (0 where it does
            not vary); "unit": vectors of one length; "raw": as they are. The last two are then
            multiplied by one number, which changes nothing but what a strength means.

    Raises:
        ValueError: an unknown scale, no vectors, or vectors that are not finite.
    """
    if scale not in SCALES or not len(vectors):
        raise ValueError(f"scale {scale!r} of {len(vectors)} vectors; it is {', '.join(SCALES)}")
    x = unit(vectors) if scale == "unit" else finite(vectors)
    mean, deviation = np.zeros(x.shape[1]), np.full(x.shape[1], np.sqrt((x * x).mean()))
    if scale == "standard":
        mean, deviation = x.mean(axis=0), x.std(axis=0)
    return Scaling(mean, np.where(deviation > 0, deviation, 1), scale == "unit")


def unit(vectors: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    """Vectors divided by their lengths, which must not be 0."""
    x = finite(vectors)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if bad := np.flatnonzero(length == 0).tolist():
        raise ValueError(f"vectors {bad[:8]} ({len(bad)} in all) are zero")
    return x / length


def finite(vectors: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "n d"]:
    """Vectors in float64; raises ValueError if any is not finite."""
    if bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
        raise ValueError(f"vectors {bad[:8]} ({len(bad)} in all) are not finite")
    return vectors.astype(np.float64)


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors with their labels.

    Attributes:
        vectors: of each row of `examples`.
        examples: `images` are ids; labels, classes, groups and splits as `examples.read` has them.
        provenance: of the vectors.
        missing: rows left out because embed could not read their image.
    """

    vectors: Float[np.ndarray, "n d"]
    examples: Examples
    provenance: Provenance
    missing: int = 0

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def labels(self) -> np.ndarray:
        """As `Examples` has them, where there must be some."""
        if self.examples.labels is None:
            raise ValueError("these rows have no labels; name their columns (--label COLUMN)")
        return self.examples.labels

    def of(self, rows: Examples) -> "Features":
        """These rows of it, which are known by their ids."""
        index = {id: i for i, id in enumerate(self.examples.images)}
        return replace(self, vectors=self.vectors[[index[id] for id in rows.images]], examples=rows)


class Parts(NamedTuple):
    """What to learn from, what to choose by, and if there is any, what to judge by."""

    train: Features
    validation: Features
    test: Features | None


def read(
    data: places.Given,
    embeddings: Embeddings,
    *,
    label: str | Sequence[str] = (),
    group: str | None = None,
    split: str | None = None,
    id: str | None = None,
) -> Features:
    """Joins labels with the embeddings of their ids.

    Args:
        data: a manifest (.csv, .tsv, .parquet, .jsonl), or the folder of class folders that was
            embedded.
        embeddings: the `--output` of `embed`; rows without a label are ignored.
        label: one column of class names; or columns of 0, 1 or nothing, a finding each (also one
            alone, if it holds nothing else). Default: what the format has, or "label".
        group: column of patients, cases or studies; default "group", if there is one. If the table
            has none of that name, `patient`, `study` and `series` are those of the embeddings, if
            they were made with such columns; what has none is grouped by file, with a warning.
        split: column of split names; default "split", if there is one.
        id: column of ids; default "id", or where there is none "image": `embed` names an image of
            a manifest without ids by its path as it stands there.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: what is wrong with the table; labels without an embedding, how many and the
            first, where there are more than the images that embed could not read; or no embedding
            has the group.
    """
    table, label = read_table(str(data)), (label,) if isinstance(label, str) else label
    key = id or ("id" if "id" in table.columns else "image")
    of_run = group in pseudonyms.COLUMNS and group not in table.columns
    of_run = group if of_run and embeddings.manifest.get("identifiers") else None
    # Paths would be joined with a root. "./" marks those that were.
    rows = examples.read(
        str(data), root=".", image=key, text=None, label=_label(table, label),
        group=None if of_run else group or "group", split=split or "split",
    )  # fmt: skip
    for name in filter(None, (None if of_run else group, split)):
        table.has(name)
    table.raise_problems()
    rows = replace(rows, images=[i.removeprefix("./") for i in rows.images])
    return join(rows, embeddings, of_run)


def _label(table: Table, names: Sequence[str]) -> str | Sequence[str] | None:
    if not names:
        return table.label or "label"
    if len(names) == 1 and not set(table.strings(names[0]).to_pylist()) <= _BINARY:
        return names[0]
    return tuple(names)


def join(rows: Examples, embeddings: Embeddings, group: str | None = None) -> Features:
    """The vectors of rows whose `images` are ids; see `read` for those that are not there.

    Args:
        rows: with labels.
        embeddings: with vectors.
        group: column of the embeddings that has the groups.
    """
    numbers = _numbers(rows.images, embeddings)
    there = [i for i, id in enumerate(rows.images) if id in numbers]
    missing = [id for id in rows.images if id not in numbers]
    unreadable = embeddings.manifest.get("errors", 0)
    if not there or len(missing) > unreadable:
        raise ValueError(
            f"{len(missing)} of {len(rows)} labels have no embedding in {embeddings.folder}, the "
            f"first {missing[0]!r}; {unreadable} of its inputs could not be read, and its ids are "
            f"like {_first_id(embeddings)!r}. Labels are joined by id (--id COLUMN)"
        )
    kept = rows.select(there)
    wanted = np.array([numbers[id] for id in kept.images])
    if group is not None:
        kept = replace(kept, groups=_groups(embeddings, wanted.tolist(), group))
    vectors = embeddings.gather(wanted)
    return Features(vectors, kept, provenance(embeddings.manifest), len(missing))


def _groups(embeddings: Embeddings, rows: Sequence[int], column: str) -> list[str]:
    """Of each row; tiles of a slide and slices of a volume, which name nobody, are of one."""
    cells = embeddings.ids(rows, ["source", column])
    lacking = sum(not cell[column] for cell in cells)
    if lacking == len(cells):
        raise ValueError(
            f"{embeddings.folder}: none of {lacking} rows has a {column}, as slides and NIfTI "
            "volumes have none; put a column of groups into the table of labels"
        )
    if lacking:
        warnings.warn(
            f"{lacking} of {len(cells)} rows have no {column} and are grouped by file", stacklevel=2
        )
    return [cell[column] or f"file {_file(cell['source'])}" for cell in cells]


def _file(source: str) -> str:
    file, part = parse(source)
    return file if isinstance(part, (Frame, Tile)) else source


def _numbers(ids: Sequence[str], embeddings: Embeddings) -> dict[str, int]:
    """The row of each id that is there."""
    wanted, found = set(ids), {}
    for start in range(0, len(embeddings), _BLOCK):
        numbers = range(start, min(start + _BLOCK, len(embeddings)))
        for number, row in zip(numbers, embeddings.ids(numbers), strict=True):
            if row["kind"] == "image" and row["id"] in wanted:
                found[row["id"]] = number
    return found


def _first_id(embeddings: Embeddings) -> str | None:
    return embeddings.ids([0])[0]["id"] if len(embeddings) else None


def split(features: Features, validation: float = 0.2, seed: int = 0) -> Parts:
    """Splits by the split column, or where it does not say, whole groups by chance.

    Args:
        features: rows of split "train", "test" and one of `VALIDATION`; without a validation split
            a share of the training rows is held out, without splits of all.
        validation: that share.
        seed: of that draw.

    Raises:
        ValueError: a group or an id lies in two parts, a part would be empty, or labels are none.
    """
    rows = features.examples
    names = set(rows.splits or ())
    train = rows.of_split("train") if names else rows
    if held_out := [name for name in VALIDATION if name in names]:
        chosen = rows.of_split(held_out[0])
    else:
        train, chosen = examples.split_by_group(train, validation, seed)
    test = rows.of_split("test") if "test" in names else None
    parts = [train, chosen] + ([] if test is None else [test])
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            examples.check_disjoint(one, other)
    return Parts(
        features.of(train), features.of(chosen), None if test is None else features.of(test)
    )
