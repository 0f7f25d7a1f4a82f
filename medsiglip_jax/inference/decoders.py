"""The versions of the packages that make pixels and vectors, which are part of a run's identity.

Every run uses jax and Pillow, and is another one with other versions of them. Which further
decoders it uses is known when its files are read, for DICOM files need no suffix: their versions
are noted with the rows that they were asked for, readable or not. A run goes on as long as those
are installed; what no row has used so far may come, go and change.
"""

import importlib.metadata
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from medsiglip_jax import __version__
from medsiglip_jax.preprocess import formats

_LIBRARY = "libopenslide"
_ORDER = ("medsiglip_jax", "jax", *formats.PACKAGES, _LIBRARY)

Versions = Mapping[str, str | None]


def of_every_run() -> Versions:
    """Package -> version, of those that are in use whatever the files are."""
    return {
        "medsiglip_jax": __version__,
        **{name: _version(name) for name in ("jax", *formats.PICTURES.packages)},
    }


def of_formats(names: Collection[str]) -> Versions:
    """Package -> version, of what reads the formats of these names; None where it is missing."""
    used = [format for format in formats.FORMATS if format.name in names]
    versions = {package: _version(package) for format in used for package in format.packages}
    return versions | ({_LIBRARY: formats.libopenslide()} if formats.SLIDES in used else {})


def together(*versions: Versions) -> Versions:
    """All of them, in the order in which records have them."""
    merged = {name: version for some in versions for name, version in some.items()}
    return {name: merged[name] for name in sorted(merged, key=_place)}


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER)), name


def check(versions: Versions, file: Any, aim: str = "to finish the run") -> None:
    """Raises FileExistsError if rows in `file` were made with other versions than are installed;
    `aim` is what the right ones are wanted for."""
    installed = {"medsiglip_jax": __version__, _LIBRARY: formats.libopenslide()}
    for name, before in versions.items():
        now = installed[name] if name in installed else _version(name)
        if now != before:
            raise FileExistsError(
                f"{file}: holds rows of another run (versions differ: {name} {before or 'missing'} "
                f"there, {now or 'missing'} here); install that version {aim}, or choose a new "
                "folder"
            )


def _version(package: str) -> str | None:
    """Without importing it; None where it is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
