"""Embeddings of the images of a dataset: computed into a folder once, or found in one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from medsiglip_jax.data import rows
from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.files import places
from medsiglip_jax.inference import embed
from medsiglip_jax.inference.manifest import Manifest
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules

# Of a run that is killed, so much is lost at most.
_SHARD = 512


@dataclass(frozen=True, eq=False)
class Vectors:
    """Embeddings of images of a dataset.

    Attributes:
        images: their numbers in the dataset, ascending.
        array: one row for each of them.
        manifest: of the embedding run.
    """

    images: Int64[np.ndarray, " k"]
    array: Float[np.ndarray, "k d"]
    manifest: Manifest


def compute(
    model: Model,
    found: Dataset,
    folder: places.Given,
    preprocess: str,
    batch_size: int,
    dicom: Rules,
    on_progress: Callable[[embed.EmbedProgress], Any],
) -> None:
    """Embeds the whole pool of a dataset; the same call again goes on with a killed one."""
    cells = found.pool.items()
    table = rows.from_tuples((name, source, "image", None) for name, source in cells)
    options = embed.EmbedOptions(preprocess, shard_size=_SHARD, batch_size=batch_size, dicom=dicom)
    embed.embed(model, rows.Rows(table), folder, options, on_progress)


def read(folder: places.Given, found: Dataset) -> Vectors:
    """Reads the rows of an embedding run that are of the dataset: of the same file, or else of the
    same id.

    Raises:
        ValueError: none is.
    """
    embeddings = Embeddings(folder)
    numbers: dict[str, int] = {}
    for number, row in enumerate(embeddings.ids(range(len(embeddings)))):
        if row["kind"] == "image":
            numbers.setdefault(f"id {row['id']}", number)
            numbers[row["source"]] = number
    of = np.array(
        [
            numbers.get(source, numbers.get(f"id {name}", -1))
            for name, source in zip(found.ids, found.sources, strict=True)
        ]
    )
    images = np.flatnonzero(of >= 0)
    if not len(images):
        raise ValueError(
            f"{embeddings.folder}: none of the {len(found):,} images is among its "
            f"{len(embeddings):,} rows, by path or by id; were they embedded from another folder?"
        )
    return Vectors(images, embeddings.gather(of[images]), embeddings.manifest)
