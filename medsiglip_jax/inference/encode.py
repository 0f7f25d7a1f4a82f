"""Embeddings of files in one call, for Python: paths in, one array out."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from jaxtyping import Float32

from medsiglip_jax.data.rows import Rows, from_tuples
from medsiglip_jax.inference.abstain import Judged
from medsiglip_jax.inference.engine import Embedded, Engine
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.load import warn_about_pixels
from medsiglip_jax.preprocess.names import MIDDLE

_NAMED = 20  # unreadable files named in an error, of maybe a million


def encode_files(
    model: Model,
    paths: Sequence[str | os.PathLike],
    preprocess: str = "big_vision",
    *,
    normalize: bool = True,
    batch_size: int = 8,
    dicom: Rules = Rules(),
    unreadable: str = "raise",
    on_batch: Callable[[int], Any] = int,
) -> Float32[np.ndarray, "n d"]:
    """Embeds image files; they are read and decoded while the device computes.

    For more vectors than fit into memory, or a job that survives being killed, use `embed`.

    Args:
        model: with an image tower.
        paths: local paths or URIs, or parts of files such as "ct.nii.gz#frame=3".
        preprocess: pixel preset.
        normalize: divide by the L2 norm.
        batch_size: images per call of the encoder, over all devices of the model.
        dicom: how DICOM files and NIfTI volumes become pixels.
        unreadable: "raise", or "nan" for a row of NaN in place of each unreadable image.
        on_batch: called with the number of images just done, for progress.

    Returns:
        float32 [n, D], in the order of `paths`.

    Raises:
        ValueError: images that cannot be read, with their names and reasons; or an argument that is
            wrong.
        OSError: a disk or a network fails; that is never taken for an unreadable image.

    Warns:
        UserWarning: some images carry an EXIF orientation, which is not applied, declare
            annotation burned into their pixels, or come out dark (`Facts.dark`).
    """
    if unreadable not in ("raise", "nan"):
        raise ValueError(f'unreadable is {unreadable!r}; expected "raise" or "nan"')
    rows = image_rows(paths)
    vectors = np.full((len(rows), model.config.embed_dim), np.nan, np.float32)
    errors, start = [], 0
    for batch in encode_rows(model, rows, preprocess, normalize, batch_size, dicom, on_batch):
        vectors[start : start + len(batch.rows)][batch.readable] = batch.vectors
        start += len(batch.rows)
        errors += batch.errors
    if errors and unreadable == "raise":
        shown = [f"{source}: {reason}" for source, reason in errors[:_NAMED]]
        shown += [f"and {len(errors) - _NAMED} more"] * (len(errors) > _NAMED)
        raise ValueError(f"{len(errors)} of {len(rows)} images cannot be read: {'; '.join(shown)}")
    return vectors


def image_rows(paths: Sequence[str | os.PathLike]) -> Rows:
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

    Batches are of equal size, to pad little: 9 rows in batches of at most 8 become 5 and 4.

    Args:
        model: with the towers that the rows need.
        rows: images, texts or both.
        preprocess, normalize, batch_size, dicom, on_batch: as for `encode_files`.

    Raises:
        ValueError: `batch_size` below 1, an unknown preset, or a tower or tokenizer is missing.
        OSError: a disk or a network fails.
    """
    check_towers(model, rows)
    batches = -(-len(rows) // max(1, batch_size)) or 1
    size = min(batch_size, max(1, -(-len(rows) // batches)))
    engine = Engine(model, preprocess, normalize, size, dicom)
    found = dict.fromkeys(("turned", "burned_in", "unusual", "dark"), 0)
    several = 0
    with closing(engine.run(rows.batches(size))) as results:
        for batch in results:
            found = {name: count + getattr(batch, name) for name, count in found.items()}
            several += batch.multi_frame
            yield batch
            on_batch(len(batch.rows))
    warn_about_pixels(**found, count=len(rows))
    if several and dicom.frame == MIDDLE:
        warnings.warn(
            f"{several} of {len(rows)} files have several frames, slices or pages; one of each was "
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
            found: dict[str, Any] = {"image": name}
            distance, no_answer = next(judged) if judged else (None, None)
            if distance is not None:
                found["distance"] = float(distance)
            if no_answer:
                found["no_assist"] = no_answer
            else:
                found["scores"] = [dict(zip(keys, cell, strict=True)) for cell in cells]
            results.append(found)
    return results


def check_towers(model: Model, rows: Rows) -> None:
    """Raises the error of a missing tower or tokenizer before the first row is embedded."""
    kinds = rows.table.column("kind").unique().to_pylist()
    if "text" in kinds:
        _ = model.processor.tokenizer
    if "image" in kinds:
        model.processor.images([])
