"""Retrieval both ways: whether an image finds one of its texts, and a text one of its images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# Side of a tile of cosines: 16 MB of float32 at a time.
_TILE = 2048


@dataclass(frozen=True)
class Retrieval:
    """Shares of queries that find a match among their first k.

    Attributes:
      image_to_text: k -> recall of images that have a text.
      text_to_image: k -> recall of texts that have an image.
      images: how many images have a text.
      texts: how many texts have an image.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    images: int
    texts: int


def recall_at_k(
    zimg: Float[np.ndarray, "n d"],
    ztxt: Float[np.ndarray, "m d"],
    image_ids: Int[np.ndarray, " n"] | None = None,
    text_ids: Int[np.ndarray, " m"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Retrieval:
    """Returns recall@k both ways: at least one match among the k highest cosines.

    An image matches all texts of its id, and a text all images: five captions of an image are five
    texts of one id. A text that is no match but has the same cosine is counted as ahead, so that a
    model that maps everything to one point finds nothing.

    Args:
      zimg: image embeddings, of any length but zero.
      ztxt: text embeddings.
      image_ids: of the images; default row i of `zimg` belongs to row i of `ztxt`.
      text_ids: of the texts.
      ks: sizes of the lists.

    Returns:
      Recalls; NaN where no query has a match.

    Raises:
      ValueError: a vector is zero or not finite, ids of one side only, or k below 1.
    """
    if (image_ids is None) != (text_ids is None) or (image_ids is None and len(zimg) != len(ztxt)):
        raise ValueError(f"{len(zimg)} images, {len(ztxt)} texts: give image_ids and text_ids")
    if not all(k >= 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}; expected at least 1")
    ids = [np.arange(len(zimg)) if x is None else x for x in (image_ids, text_ids)]
    ahead = _ahead(_unit("zimg", zimg), _unit("ztxt", ztxt), *ids)
    images, texts = (a[np.isin(x, y)] for a, x, y in zip(ahead, ids, ids[::-1], strict=True))
    return Retrieval(_recalls(images, ks), _recalls(texts, ks), len(images), len(texts))


def _recalls(ahead: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    return {k: float((ahead < k).mean()) if len(ahead) else np.nan for k in ks}


def _ahead(zimg, ztxt, image_ids, text_ids) -> list[np.ndarray]:
    """Of each image and of each text, how many that do not match are as near as its best match."""
    best = [np.full(len(x), -np.inf, np.float32) for x in (zimg, ztxt)]
    for i, j, cosines, same in _tiles(zimg, ztxt, image_ids, text_ids):
        mine = np.where(same, cosines, -np.inf)
        best[0][i] = np.maximum(best[0][i], mine.max(axis=1))
        best[1][j] = np.maximum(best[1][j], mine.max(axis=0))
    ahead = [np.zeros(len(x), np.int64) for x in (zimg, ztxt)]
    for i, j, cosines, same in _tiles(zimg, ztxt, image_ids, text_ids):
        ahead[0][i] += (~same & (cosines >= best[0][i][:, None])).sum(axis=1)
        ahead[1][j] += (~same & (cosines >= best[1][j])).sum(axis=0)
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
