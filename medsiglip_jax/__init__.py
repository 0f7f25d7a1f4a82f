"""MedSigLIP in JAX: medical images and texts in one embedding space.

Importing this package imports neither jax nor tensorflow; the names below load on first use.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from medsiglip_jax import losses, metrics, preprocess
    from medsiglip_jax.inference.encode import encode_files
    from medsiglip_jax.model.api import Model, init, load, save
    from medsiglip_jax.model.config import ModelConfig
    from medsiglip_jax.model.sharding import make_mesh
    from medsiglip_jax.trust.explanation import explain

__all__ = ["Model", "ModelConfig", "encode_files", "explain", "init", "load", "make_mesh", "save"]
__all__ += ["__version__", "losses", "metrics", "preprocess"]


def lazy(room: str, **names: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The face of a room: its files and their main names, imported when they are first used.

    Args:
        room: the package, such as "medsiglip_jax.model".
        names: file (`__` for a dot) -> the names that it contributes, separated by spaces. None of
            them may be called as a file of the room: importing the file would replace it.

    Returns:
        `__getattr__` and `__dir__` of the package.
    """
    files = {name: file for file, given in names.items() for name in given.split()}

    def get(name: str) -> Any:
        if name in files:
            return getattr(import_module(f"{room}.{files[name].replace('__', '.')}"), name)
        if name in names:
            return import_module(f"{room}.{name}")
        raise AttributeError(f"module {room!r} has no attribute {name!r}")

    listed = {*files, *(file for file in names if "__" not in file)}
    return get, lambda: sorted({*listed, *vars(sys.modules[room])})


__getattr__, __dir__ = lazy(
    __name__,
    losses="",
    metrics="",
    preprocess="",
    inference__encode="encode_files",
    model__api="Model init load save",
    model__config="ModelConfig",
    model__sharding="make_mesh",
    trust__explanation="explain",
)
