"""Copies of images that only embeddings give away, and pixels confirm.

An image saved again, perhaps in another format or size, has nearly the vector of the first. Vectors
alone prove nothing, because those of a model that was trained badly, or not at all, are all alike.
"""

import functools
import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from PIL import Image

from medsiglip_jax.embeddings.near_duplicates import near_duplicates
from medsiglip_jax.embeddings.store import ArrayVectors
from medsiglip_jax.evaluate import task_parts
from medsiglip_jax.evaluate.data import copies
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.evaluate.data.leaks import Leak
from medsiglip_jax.evaluate.image_embeddings import ImageEmbeddings
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.names import Frame, Tile, parse

COSINE = 0.9999  # above which images may be copies of each other
_MOST = 1000  # pairs that are decoded of two parts, the nearest first
_SIDE = 32  # pixels; pictures are compared at this size, whatever their own
_ALIKE = 0.995  # least correlation of copies
PIXELS, AGAIN = "images with the same pixels", "images that were saved again"


class _Picture(NamedTuple):
    """What is kept of a decoded image: a digest of its pixels, and how it looks from afar."""

    digest: str
    small: Float64[np.ndarray, " n"]


def find(parts: Mapping[str, ImageEmbeddings]) -> list[Leak]:
    """Copies across parts, and images with the same pixels within the test.

    Images of one patient, and parts of one volume or slide, are not compared. Files with the same
    bytes are told by `splits`, before anything is embedded.

    Args:
        parts: name -> images and their vectors; "test" is one of them.
    """
    decode = functools.lru_cache(2 * _MOST)(_decoded)
    names = sorted(parts, key=(*task_parts.PARTS, "test").index)
    pairs = [*itertools.combinations(names, 2), ("test", "test")]
    leaks = [leak for two in pairs for leak in _of(two, parts, decode)]
    return [leak for leak in leaks if leak.refused or leak.what == PIXELS]


def _of(
    two: tuple[str, str],
    parts: Mapping[str, ImageEmbeddings],
    decode: Callable[[str, Rules], _Picture | None],
) -> Iterator[Leak]:
    """What is the same in two parts, or within one."""
    left, right = (parts[name] for name in two)
    other = None if two[0] == two[1] else ArrayVectors(right.vectors)
    near = near_duplicates(ArrayVectors(left.vectors), COSINE, other, limit=_MOST)
    if near.cut:
        warnings.warn(
            f"{' and '.join(dict.fromkeys(two))}: more than {_MOST:,} pairs of images have cosines "
            f"above {COSINE}; only the nearest {_MOST:,} were compared",
            stacklevel=2,
        )
    pairs: dict[str | None, list[tuple[str, str]]] = {PIXELS: [], AGAIN: [], None: []}
    rows: list[list[int]] = near.rows.tolist()
    for i, j in rows:
        pair = left.dataset.ids[i], right.dataset.ids[j]
        pairs[_what(left, i, right, j, decode)].append(pair)
    for what in (PIXELS, AGAIN):
        if pairs[what]:
            yield Leak(what, two, pairs[what], at_least=near.cut)


def _what(
    left: ImageEmbeddings,
    i: int,
    right: ImageEmbeddings,
    j: int,
    decode: Callable[[str, Rules], _Picture | None],
) -> str | None:
    """In what two images are the same, as far as it is not said elsewhere."""
    if _related(left.dataset, i, right.dataset, j):
        return None
    one, other = left.dataset.sources[i], right.dataset.sources[j]
    first = decode(one, left.manifest.dicom_rules)
    second = decode(other, right.manifest.dicom_rules)
    if first is None or second is None:
        return None
    if first.digest == second.digest:
        return None if copies.identical((one, other)) else PIXELS
    return AGAIN if _correlation(first.small, second.small) >= _ALIKE else None


def _related(one: Dataset, i: int, other: Dataset, j: int) -> bool:
    """Whether images are of one patient, of one volume or slide, or the same image."""
    (file, part), (other_file, _) = parse(one.sources[i]), parse(other.sources[j])
    if file == other_file and isinstance(part, (Frame, Tile)):
        return True
    if one.sources[i] == other.sources[j]:
        return True
    patient = one.groups[i] if one.groups else ""
    return bool(patient) and patient == (other.groups[j] if other.groups else "")


def _decoded(source: str, rules: Rules) -> _Picture | None:
    try:
        pixels = np.ascontiguousarray(sources.read(source, rules=rules)[0])
    except UnreadableImage:  # of embeddings that were given, the files may be gone
        return None
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(pixels.data)
    small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return _Picture(digest.hexdigest(), np.asarray(small, np.float64).reshape(-1))


def _correlation(first: Float64[np.ndarray, " n"], second: Float64[np.ndarray, " n"]) -> float:
    """Pearson's; 0 where an image is of one colour."""
    first, second = first - first.mean(), second - second.mean()
    scale = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / scale) if scale else 0.0
