"""The formats of vectors that other programs made, a row each, and the one way to open vectors.

A new format is a reader and a row. Its reader offers `read(path) -> Found`, and raises whatever it
meets; the file is named here.
"""

import hashlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from medsiglip_jax.embeddings.elsewhere import json_lines
from medsiglip_jax.embeddings.elsewhere.found import Found
from medsiglip_jax.embeddings.elsewhere.imported import Imported
from medsiglip_jax.embeddings.store import KINDS, Embeddings
from medsiglip_jax.files import places
from medsiglip_jax.files.failures import explained
from medsiglip_jax.inference.manifest import MANIFEST

_UNIT = 1e-3  # how far the length of a vector may be from 1: float16 is 5e-4 off
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        names: what its files are called, a regular expression.
        reader: the module that reads it.
        extra: of pyproject.toml, with what the reader imports.
    """

    names: str
    reader: str
    extra: str = ""

    def read(self, path: places.Place) -> Found:
        """What a file holds.

        Raises:
            ModuleNotFoundError: what its reader imports is not installed.
            ValueError: it is damaged, or holds no vectors with names.
        """
        try:
            with explained(path, "no vectors that can be read"):
                return import_module(f"{__package__}.{self.reader}").read(path)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{path}: needs {error.name}: pip install 'medsiglip-jax[{self.extra}]'"
            ) from None


FORMATS = (
    Format(r".*\.npz", "npz"),
    Format(r".*\.npy", "npy"),
    Format(r".*\.(h5|hdf5|hdf)", "hdf5", extra="evaluate"),
    Format(r".*\.(parquet|pq)", "parquet"),
    Format(r".*\.(csv|tsv)(\.gz)?", "text_tables"),
    # Vertex gives its files no suffix.
    Format(r".*\.(jsonl|ndjson)(\.gz)?|prediction\.results-\d+-of-\d+", "json_lines"),
)
SUFFIXES = ".npz .npy .h5 .parquet .csv .tsv .jsonl"


def open_embeddings(
    path: places.Given, kind: str = "image", on_rows: Callable[[int], Any] = int
) -> Embeddings:
    """Opens the output of `embed`, or a file of vectors that another program made.

    Args:
        path: the folder; the file; or the folder of a batch prediction of Vertex.
        kind, on_rows: as for `Embeddings`.

    Raises:
        FileNotFoundError: there is no such file, or no complete run in the folder.
        ValueError: it is not what its name says, or holds no vectors with names.

    Warns:
        UserWarning: how another program made them is not known.
    """
    place = places.at(path)
    format = _format_of(place)
    if format is None:
        return Embeddings(place, kind, on_rows)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    found = format.read(place)
    unit = _are_units(found.vectors)
    warnings.warn(f"{path}: {_described(found, unit)}", stacklevel=2)
    return Imported(place, found, _digest(place), unit, kind, on_rows)


def _format_of(place: places.Place) -> Format | None:
    """None for a folder of `embed`, and what its reader will say is none."""
    if place.is_file():
        name = place.name.lower()
        if format := next((f for f in FORMATS if re.fullmatch(f.names, name)), None):
            return format
        raise ValueError(
            f"{place}: no vectors; expected a folder that embed wrote, or a file {SUFFIXES}"
        )
    is_run = not place.is_dir() or (place / MANIFEST).is_file()
    return None if is_run or not json_lines.results(place) else FORMATS[-1]


def _are_units(vectors: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    given = lengths[np.isfinite(lengths) & (lengths > 0)]
    return bool(given.size) and bool((np.abs(given - 1) < _UNIT).all())


def _described(found: Found, unit: bool) -> str:
    count, dim = found.vectors.shape
    length = "all of length 1" if unit else "not of length 1"
    lacking = ""
    if found.lacking:
        name, reason = found.lacking[0]
        lacking = f"; {len(found.lacking):,} more have none, the first {name}: {reason}"
    return (
        f"{count:,} vectors of {dim:,} numbers, {length}{lacking}; which model and which "
        "preprocessing made them is not recorded, so nothing but their size is checked"
    )


def _digest(place: places.Place) -> str:
    """SHA-256 of the file, or of the files of a folder."""
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(json_lines.results(place)):
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
