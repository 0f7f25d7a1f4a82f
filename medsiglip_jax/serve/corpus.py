"""An embedding run that the server searches, and the pictures of its rows."""

import io
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float32

from medsiglip_jax.embeddings import index, nearest, search, store
from medsiglip_jax.files import places
from medsiglip_jax.model.api import Model
from medsiglip_jax.pages import contact_sheet


class Corpus:
    """The images of a run.

    Attributes:
        embeddings: the run.
        preset, rules: how its images became pixels, as those are read that are compared with it.
    """

    def __init__(self, folder: places.Given):
        """Opens the output of `embed`.

        Raises:
            FileNotFoundError: there is no complete run.
            ValueError: it is damaged, or has no rows.

        Warns:
            UserWarning: its index cannot be used; all vectors are searched instead.
        """
        self.embeddings = store.Embeddings(folder)
        if not len(self.embeddings):
            raise ValueError(f"{folder}: no rows")
        manifest = self.embeddings.manifest
        self.preset, self.rules = manifest.preprocess, manifest.dicom_rules
        self._top_k = index.top_k if _is_indexed(self.embeddings) else nearest.top_k

    def check(self, model: Model) -> None:
        """Raises ValueError if another model made the run."""
        search.check_model(self.embeddings, model)

    def find(self, vector: Float32[np.ndarray, " d"], k: int) -> list[dict[str, Any]]:
        """The rows of images with the highest cosines, through the index if there is one."""
        k = min(k, len(self.embeddings))
        scores, rows = self._top_k(vector[None], self.embeddings, k)
        numbers = rows[0].tolist()
        hits = search.named_hits(self.embeddings.ids(numbers), scores[0].tolist())
        return [{"row": row, **hit} for row, hit in zip(numbers, hits, strict=False)]

    def vector(self, row: int) -> Float32[np.ndarray, " d"]:
        """The vector of a row, to search for what is similar.

        Raises:
            IndexError: there is no such row.
        """
        self._check(row)
        return self.embeddings.gather(np.array([row]))[0]

    def thumbnail(self, row: int) -> bytes | None:
        """A small PNG of what a row was made of; None if that cannot be read any more.

        Raises:
            IndexError: there is no such row.
            OSError: its disk or network fails.
        """
        self._check(row)
        [named] = self.embeddings.ids([row])
        picture = contact_sheet.thumbnail(named["source"], self.rules)
        if isinstance(picture, str):
            return None
        written = io.BytesIO()
        picture.save(written, "png")
        return written.getvalue()

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self.embeddings):
            raise IndexError(row)


def _is_indexed(embeddings: store.Embeddings) -> bool:
    """Whether there is an index that can be used; in a bucket there is none."""
    if places.is_remote(embeddings.folder) or not (embeddings.folder / index.FACTS).is_file():
        return False
    try:
        index.check(embeddings)
    except (ValueError, ModuleNotFoundError) as error:
        warnings.warn(f"{error}; until then all vectors are searched", stacklevel=3)
        return False
    return True
