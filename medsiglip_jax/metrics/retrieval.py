"""Retrieval both ways: the rank at which images find their texts, and texts their images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike

# Side of a tile of cosines: 16 MB of float32 at a time.
_TILE = 2048
# Cosines closer than this count as equal: float32 kernels that sum in another order, such as those
# of a tile with one row, differ by about 1e-7.
_SAME = 1e-6


@dataclass(frozen=True, eq=False)
class Ranks:
    """The rank of the best match of each query; 1 is the first, 0 means that it has no match.

    Attributes:
      image_to_text: for each image, among the texts.
      text_to_image: for each text, among the images.
    """

    image_to_text: Int64[np.ndarray, " n"]
    text_to_image: Int64[np.ndarray, " m"]


@dataclass(frozen=True)
class Retrieval:
    """Fractions of the queries that find a match among their first k.

    Attributes:
      image_to_text: k -> recall of images that have a text.
      text_to_image: k -> recall of texts that have an image.
      images: number of images that have a text.
      texts: number of texts that have an image.
      median_image_to_text: median rank of the best match of these images; 1 is the best.
      median_text_to_image: likewise for these texts.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    images: int
    texts: int
    median_image_to_text: float
    median_text_to_image: float


def recall_at_k(
    zimg: Float[np.ndarray, "n d"],
    ztxt: Float[np.ndarray, "m d"],
    image_ids: ArrayLike | None = None,
    text_ids: ArrayLike | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Retrieval:
    """Returns recall@k both ways: at least one match among the k highest cosines.

    Args:
      zimg: image embeddings, of any length but zero.
      ztxt: text embeddings, likewise.
      image_ids: [n] ids of the images, as in `ranks`.
      text_ids: [m] ids of the texts.
      ks: lengths of the lists of hits.

    Returns:
      Recalls and median ranks; NaN where no query has a match.

    Raises:
      ValueError: as for `ranks`, or k below 1.
    """
    if not all(k >= 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}; expected numbers >= 1")
    best = ranks(zimg, ztxt, image_ids, text_ids)
    images, texts = (r[r > 0] for r in (best.image_to_text, best.text_to_image))
    of_images, of_texts = ({k: recall(side, k) for k in ks} for side in (images, texts))
    medians = median_rank(images), median_rank(texts)
    return Retrieval(of_images, of_texts, len(images), len(texts), *medians)


def recall(ranks: Int64[np.ndarray, " n"], k: int) -> float:
    """Fraction of the queries with a match that find one in their first k; NaN without queries."""
    matched = ranks[ranks > 0]
    return float((matched <= k).mean()) if len(matched) else np.nan


def median_rank(ranks: Int64[np.ndarray, " n"]) -> float:
    """Median rank of the queries with a match; NaN without any."""
    matched = ranks[ranks > 0]
    return float(np.median(matched)) if len(matched) else np.nan


def ranks(
    zimg: Float[np.ndarray, "n d"],
    ztxt: Float[np.ndarray, "m d"],
    image_ids: ArrayLike | None = None,
    text_ids: ArrayLike | None = None,
) -> Ranks:
    """Returns the rank of the best match of each image among the texts, and vice versa.

    An image matches all texts with its id, and a text all images: five captions of an image are
    five texts with one id. A text that is no match but has the same cosine counts as ahead, so that
    a model that maps everything to one point finds nothing. Matches do not count as ahead of each
    other.

    Args:
      zimg: image embeddings, of any length but zero.
      ztxt: text embeddings.
      image_ids: [n] ids of the images; by default row i of `zimg` belongs to row i of `ztxt`.
      text_ids: [m] ids of the texts.

    Raises:
      ValueError: a vector is zero or not finite, only one side has ids, or these are not one for
        each row.
    """
    if (image_ids is None) != (text_ids is None) or (image_ids is None and len(zimg) != len(ztxt)):
        raise ValueError(
            f"{len(zimg)} images and {len(ztxt)} texts; expected equally many, row i of one "
            "belonging to row i of the other; or give image_ids and text_ids"
        )
    ids = [
        np.arange(len(z)) if x is None else _ids(name, x, len(z))
        for name, x, z in (("image_ids", image_ids, zimg), ("text_ids", text_ids, ztxt))
    ]
    ahead = _ahead(_unit("zimg", zimg), _unit("ztxt", ztxt), *ids)
    has_match = (np.isin(x, y) for x, y in (ids, ids[::-1]))
    return Ranks(*(np.where(m, a + 1, 0) for a, m in zip(ahead, has_match, strict=True)))


def _ids(name: str, values: ArrayLike, n: int) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (n,):
        raise ValueError(f"{name} has shape {values.shape}; expected ({n},), one id for each row")
    return values


def _ahead(zimg, ztxt, image_ids, text_ids) -> list[np.ndarray]:
    """For each image and each text, how many non-matches are at least as near as its best match."""
    best = [np.full(len(x), -np.inf, np.float32) for x in (zimg, ztxt)]
    for i, j, cosines, same in _tiles(zimg, ztxt, image_ids, text_ids):
        mine = np.where(same, cosines, -np.inf)
        best[0][i] = np.maximum(best[0][i], mine.max(axis=1))
        best[1][j] = np.maximum(best[1][j], mine.max(axis=0))
    ahead = [np.zeros(len(x), np.int64) for x in (zimg, ztxt)]
    for i, j, cosines, same in _tiles(zimg, ztxt, image_ids, text_ids):
        ahead[0][i] += (~same & (cosines >= best[0][i][:, None] - _SAME)).sum(axis=1)
        ahead[1][j] += (~same & (cosines >= best[1][j] - _SAME)).sum(axis=0)
    return ahead


def _tiles(
    zimg, ztxt, image_ids, text_ids
) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    for first in range(0, len(zimg), _TILE):
        i = slice(first, first + _TILE)
        for second in range(0, len(ztxt), _TILE):
            j = slice(second, second + _TILE)
            yield i, j, zimg[i] @ ztxt[j].T, image_ids[i, None] == text_ids[j]


def _unit(name: str, z: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(z.astype(np.float64), axis=1)
    if bad := np.flatnonzero(~((length > 0) & (length < np.inf))).tolist():
        raise ValueError(f"{name}: rows {bad[:8]} ({len(bad)} in all) are zero or not finite")
    return (z / length[:, None]).astype(np.float32)
