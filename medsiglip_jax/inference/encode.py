"""Embeddings of files in one call, for Python: paths in, vectors and errors out."""

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int64

from medsiglip_jax.data.rows import Rows, from_tuples
from medsiglip_jax.inference.abstain import Judged
from medsiglip_jax.inference.engine import Embedded, Engine
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.load import warn_about_pixels
from medsiglip_jax.preprocess.names import MIDDLE

T = TypeVar("T")
_NAMED = 20  # unreadable files named in an error, of maybe a million


class Encoded(NamedTuple):
    """What `encode_files` gives.

    Attributes:
        vectors: float32 [k, D], of the k files that can be read, in the order they were given.
        indices: int64 [k], which of the files these are, from 0.
        errors: (path, reason) of every other file, in order; an address is without credentials.
    """

    vectors: Float32[np.ndarray, "k d"]
    indices: Int64[np.ndarray, " k"]
    errors: list[tuple[str, str]]

    def complete(self) -> Float32[np.ndarray, "k d"]:
        """The vectors, where every file was readable.

        Raises:
            ValueError: some were not; it names up to 20 of them and why.
        """
        if not self.errors:
            return self.vectors
        shown = [f"{source}: {reason}" for source, reason in self.errors[:_NAMED]]
        shown += [f"and {len(self.errors) - _NAMED} more"] * (len(self.errors) > _NAMED)
        count = len(self.errors) + len(self.vectors)
        raise ValueError(f"{len(self.errors)} of {count} images cannot be read: {'; '.join(shown)}")


def encode_files(
    model: Model,
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    preprocess: str | None = None,
    *,
    normalize: bool = True,
    batch_size: int = 8,
    dicom: Rules | None = None,
    on_batch: Callable[[int], Any] = int,
) -> Encoded:
    """Embeds image files; they are read and decoded while the device computes.

    Only a few batches of pixels and paths are in memory at a time, so that `paths` may be a
    generator of any length; the vectors are. For more vectors than fit, or a job that survives
    being killed, use `embed`.

    Args:
        model: with an image tower.
        paths: local paths or URIs, or parts of files such as "ct.nii.gz#frame=3"; or one of them.
        preprocess: pixel preset; by default that of the model's training where its export
            remembers one, else "big_vision".
        normalize: divide by the L2 norm.
        batch_size: images per call of the encoder, over all devices of the model.
        dicom: how DICOM files and NIfTI volumes become pixels; default likewise.
        on_batch: called with the number of images just done, for progress.

    Returns:
        The vectors of the readable files, which files these are, and why the others have none.

    Raises:
        ValueError: an argument is wrong.
        OSError: a disk or a network fails; that is never taken for an unreadable image.

    Warns:
        UserWarning: some images carry an EXIF orientation, which is not applied, declare
            annotation burned into their pixels, or come out dark (`Facts.dark`).
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    size = _batch_size(len(paths), batch_size) if isinstance(paths, Sized) else batch_size
    model.processor.images([])  # or the error of a model without an image tower
    preparation = model.config.prepared(preprocess, dicom)
    engine = Engine(model, preparation.preprocess, normalize, size, preparation.dicom)
    vectors = [np.zeros((0, model.config.embed_dim), np.float32)]
    readable: list[np.ndarray] = [np.zeros(0, bool)]
    errors: list[tuple[str, str]] = []
    batches = (image_rows(batch) for batch in _batched(paths, size))
    for batch in _run(engine, batches, preparation.dicom, on_batch):
        vectors.append(batch.vectors)
        readable.append(batch.readable)
        errors += batch.errors
    return Encoded(np.concatenate(vectors), np.flatnonzero(np.concatenate(readable)), errors)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def image_rows(paths: Iterable[str | os.PathLike]) -> Rows:
    """Image files as rows, each with its path as its id."""
    names = [os.fspath(path) for path in paths]
    return Rows(from_tuples((name, name, "image", None) for name in names))


def encode_rows(
    model: Model,
    rows: Rows,
    preprocess: str,
    normalize: bool = True,
    batch_size: int = 8,
    dicom: Rules = Rules(),
    on_batch: Callable[[int], Any] = int,
) -> Iterator[Embedded]:
    """Embeds rows through an `Engine`, in order; warns once about pixels that need a look.

    Args:
        model: with the towers that the rows need.
        rows: images, texts or both.
        preprocess: pixel preset.
        dicom: how DICOM files and volumes become pixels.
        normalize, batch_size, on_batch: as for `encode_files`.

    Raises:
        ValueError: `batch_size` below 1, an unknown preset, or a tower or tokenizer is missing.
        OSError: a disk or a network fails.
    """
    check_towers(model, rows)
    size = _batch_size(len(rows), batch_size)
    engine = Engine(model, preprocess, normalize, size, dicom)
    yield from _run(engine, rows.batches(size), dicom, on_batch)


def _batch_size(rows: int, most: int) -> int:
    """Batches are of equal size, to pad little: 9 rows in batches of at most 8 become 5 and 4."""
    batches = -(-rows // max(1, most)) or 1
    return min(most, max(1, -(-rows // batches)))


def _run(
    engine: Engine, batches: Iterable[Rows], dicom: Rules, on_batch: Callable[[int], Any]
) -> Iterator[Embedded]:
    """The batches with their embeddings; warns once, at the end, about what their pixels need."""
    counts = dict.fromkeys(("turned", "burned_in", "unusual", "dark"), 0)
    several = count = 0
    with closing(engine.run(batches)) as results:
        for batch in results:
            counts = {name: n + getattr(batch, name) for name, n in counts.items()}
            several, count = several + batch.multi_frame, count + len(batch.rows)
            yield batch
            on_batch(len(batch.rows))
    warn_about_pixels(**counts, count=count)
    if several and dicom.frame == MIDDLE:
        warnings.warn(
            f"{several} of {count} files have several frames, slices or pages; one of each was "
            "taken, the middle one, or of pictures the first (--frame)",
            stacklevel=2,
        )


def score_rows(
    batches: Iterable[Embedded],
    score: Callable[[np.ndarray], Iterable[np.ndarray]],
    keys: Sequence[str],
    names: Sequence[str],
    judge: Callable[[np.ndarray, Sequence[np.ndarray]], Judged] | None = None,
) -> list[dict[str, Any]]:
    """Lists the scores of rows, or why a row is unreadable or gets no answer.

    Args:
        batches: from `encode_rows`.
        score: vectors [n, d] -> arrays [n, names], one for each key but the first.
        keys: of a name and its scores.
        names: of what is scored.
        judge: vectors and their scores -> how far they are from what is known.

    Returns:
        For each row `{"image": source, "scores": [{key: name or score, …}, …]}`, or
        `{"image": source, "error": reason}`. With `judge` also "distance"; and "no_assist" with the
        reason, in place of "scores", where there is no answer.
    """
    results: list[dict[str, Any]] = []
    for batch in batches:
        arrays = list(score(batch.vectors))
        scored = zip(*(array.tolist() for array in arrays), strict=True)
        judged = iter(zip(*judge(batch.vectors, arrays), strict=True)) if judge else None
        for name, reason in zip(batch.rows.shown.to_pylist(), batch.reasons, strict=True):
            if reason:
                results.append({"image": name, "error": reason})
                continue
            cells = zip(names, *next(scored), strict=True)
            result: dict[str, Any] = {"image": name}
            distance, no_answer = next(judged) if judged else (None, None)
            if distance is not None:
                result["distance"] = float(distance)
            if no_answer:
                result["no_assist"] = no_answer
            else:
                result["scores"] = [dict(zip(keys, cell, strict=True)) for cell in cells]
            results.append(result)
    return results


def check_towers(model: Model, rows: Rows) -> None:
    """Raises the error of a missing tower or tokenizer before the first row is embedded."""
    kinds = rows.table.column("kind").unique().to_pylist()
    if "text" in kinds:
        _ = model.processor.tokenizer
    if "image" in kinds:
        model.processor.images([])
