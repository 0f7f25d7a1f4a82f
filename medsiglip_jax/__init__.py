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

__all__ = [
    "Model",
    "ModelConfig",
    "__version__",
    "encode_files",
    "init",
    "load",
    "losses",
    "make_mesh",
    "metrics",
    "preprocess",
    "save",
]


def lazy(room: str, **names: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The face of a room: names that are imported from its files when they are first asked for.

    Args:
        room: the package, such as "medsiglip_jax.model".
        names: file -> the names that it gives, separated by spaces; none for the file itself.

    Returns:
        `__getattr__` and `__dir__` of the package.
    """
    homes = {name: file for file, given in names.items() for name in given.split() or [file]}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        module = import_module(f"{room}.{homes[name].replace('__', '.')}")
        return module if name == homes[name] else getattr(module, name)

    return get, lambda: sorted({*homes, *vars(sys.modules[room])})


__getattr__, __dir__ = lazy(
    __name__,
    losses="",
    metrics="",
    preprocess="",
    inference__encode="encode_files",
    model__api="Model init load save",
    model__config="ModelConfig",
    model__sharding="make_mesh",
)
