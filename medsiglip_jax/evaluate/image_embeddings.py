"""Embeddings of the images of a data set, read from a folder."""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from medsiglip_jax.embeddings import joining
from medsiglip_jax.embeddings.elsewhere.formats import open_embeddings
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.files import places
from medsiglip_jax.inference.manifest import Manifest


@dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """Embeddings of images of a data set.

    Attributes:
        whole: the data set.
        images: their numbers in the data set, ascending; unreadable images have none.
        vectors: one row for each of them.
        manifest: the record of the embedding run.
    """

    whole: Dataset
    images: Int64[np.ndarray, " k"]
    vectors: Float[np.ndarray, "k d"]
    manifest: Manifest

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The images that have an embedding."""
        return self.whole.select(self.images)

    @property
    def lost(self) -> int:
        """How many images have none."""
        return len(self.whole) - len(self.images)


def read(folder: places.Given, dataset: Dataset) -> ImageEmbeddings:
    """Reads the embeddings of the images of a data set: those of the same file, or else id, or
    where there are none, as of vectors made elsewhere, those of a path with the same end.

    Raises:
        ValueError: the folder has no embedding of any image.
    """
    embeddings = open_embeddings(folder)
    numbers: dict[str, int] = {}
    for number, row in enumerate(embeddings.ids(range(len(embeddings)))):
        if row["kind"] == "image":
            numbers.setdefault(f"id {row['id']}", number)
            numbers[row["source"]] = number
    pairs = zip(dataset.ids, dataset.sources, strict=True)
    matches = np.array([numbers.get(path, numbers.get(f"id {id}", -1)) for id, path in pairs])
    for names in (dataset.sources, dataset.ids):
        if (matches < 0).all():
            matches = np.array(joining.join(names, embeddings).rows)
    images = np.flatnonzero(matches >= 0)
    if not len(images):
        raise ValueError(
            f"{embeddings.folder}: none of the {len(dataset):,} images is among its "
            f"{len(embeddings):,} rows, by path or by id; were they embedded from another folder?"
        )
    vectors = embeddings.gather(matches[images])
    return ImageEmbeddings(dataset, images, vectors, embeddings.manifest)
