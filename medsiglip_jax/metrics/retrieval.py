"""Retrieval both ways: whether an image finds one of its texts, and a text one of its images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int64

# Side of a tile of cosines: 16 MB of float32 at a time.
_TILE = 2048
# Cosines nearer than this are the same: float32 kernels that sum in another order, as those of a
# tile with one row do, differ by some 1e-7.
_SAME = 1e-6


@dataclass(frozen=True, eq=False)
class Ranks:
    """At which place of its list each query finds its best match; 1 is the first, 0 is nowhere.

    Attributes:
      image_to_text: of each image, among the texts.
      text_to_image: of each text, among the images.
    """

    image_to_text: Int64[np.ndarray, " n"]
    text_to_image: Int64[np.ndarray, " m"]


@dataclass(frozen=True)
class Retrieval:
    """Shares of queries that find a match among their first k.

    Attributes:
      image_to_text: k -> recall of images that have a text.
      text_to_image: k -> recall of texts that have an image.
      images: how many images have a text.
      texts: how many texts have an image.
      median_image_to_text: median rank of those images' best match; 1 is the best.
      median_text_to_image: likewise of those texts.
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
    image_ids: Int[np.ndarray, " n"] | None = None,
    text_ids: Int[np.ndarray, " m"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Retrieval:
    """Returns recall@k both ways: at least one match among the k highest cosines.

    Args:
      zimg: image embeddings, of any length but zero.
      ztxt: text embeddings.
      image_ids: of the images, as in `ranks`.
      text_ids: of the texts.
      ks: sizes of the lists.

    Returns:
      Recalls and median ranks; NaN where no query has a match.

    Raises:
      ValueError: as for `ranks`, or k below 1.
    """
    if not all(k >= 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}; expected at least 1")
    found = ranks(zimg, ztxt, image_ids, text_ids)
    images, texts = (r[r > 0] for r in (found.image_to_text, found.text_to_image))
    return Retrieval(
        {k: recall(images, k) for k in ks},
        {k: recall(texts, k) for k in ks},
        len(images),
        len(texts),
        median_rank(images),
        median_rank(texts),
    )


def recall(ranks: Int64[np.ndarray, " n"], k: int) -> float:
    """Share of the queries with a match that find one among their first k; NaN of none."""
    there = ranks[ranks > 0]
    return float((there <= k).mean()) if len(there) else np.nan


def median_rank(ranks: Int64[np.ndarray, " n"]) -> float:
    """Median over the queries with a match; NaN of none."""
    there = ranks[ranks > 0]
    return float(np.median(there)) if len(there) else np.nan


def ranks(
    zimg: Float[np.ndarray, "n d"],
    ztxt: Float[np.ndarray, "m d"],
    image_ids: Int[np.ndarray, " n"] | None = None,
    text_ids: Int[np.ndarray, " m"] | None = None,
) -> Ranks:
    """Returns the rank of the best match of each image among the texts, and the other way round.

    An image matches all texts of its id, and a text all images: five captions of an image are five
    texts of one id. A text that is no match but has the same cosine is counted as ahead, so that a
    model that maps everything to one point finds nothing. Matches are not ahead of one another.

    Args:
      zimg: image embeddings, of any length but zero.
      ztxt: text embeddings.
      image_ids: of the images; default row i of `zimg` belongs to row i of `ztxt`.
      text_ids: of the texts.

    Raises:
      ValueError: a vector is zero or not finite, or ids of one side only.
    """
    if (image_ids is None) != (text_ids is None) or (image_ids is None and len(zimg) != len(ztxt)):
        raise ValueError(f"{len(zimg)} images, {len(ztxt)} texts: give image_ids and text_ids")
    ids = [np.arange(len(zimg)) if x is None else x for x in (image_ids, text_ids)]
    ahead = _ahead(_unit("zimg", zimg), _unit("ztxt", ztxt), *ids)
    there = (np.isin(x, y) for x, y in (ids, ids[::-1]))
    return Ranks(*(np.where(t, a + 1, 0) for a, t in zip(ahead, there, strict=True)))


def _ahead(zimg, ztxt, image_ids, text_ids) -> list[np.ndarray]:
    """Of each image and of each text, how many that do not match are as near as its best match."""
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
