"""MedSigLIP in JAX: medical images and texts in one embedding space.

Importing this package imports neither jax nor tensorflow; the names below load on first use.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from medsiglip_jax.inference.encode import encode_files
    from medsiglip_jax.model.api import Model, init, load, save
    from medsiglip_jax.model.config import ModelConfig

__all__ = ["Model", "ModelConfig", "__version__", "encode_files", "init", "load", "save"]

_HOME = {
    "Model": "model.api",
    "init": "model.api",
    "load": "model.api",
    "save": "model.api",
    "ModelConfig": "model.config",
    "encode_files": "inference.encode",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted(__all__)
