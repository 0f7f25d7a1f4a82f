"""Orbax: trees of arrays in a folder; the only file that imports it."""

from pathlib import Path
from typing import Any


def _orbax():
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ModuleNotFoundError(
            "orbax-checkpoint is not installed; it comes with `pip install 'medsiglip-jax[train]'`"
        ) from None
    return ocp


def save_tree(folder: Path, tree: dict[str, Any]) -> None:
    """Writes a tree of arrays to a folder that does not exist yet, and waits until it is there."""
    with _orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)


def tree_metadata(folder: Path) -> dict[str, Any]:
    """The tree's shapes and dtypes, without reading the arrays."""
    with _orbax().StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(folder.absolute()).item_metadata.tree


def restore_tree(folder: Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """Reads a tree into the shapes, dtypes and shardings of `jax.ShapeDtypeStruct` leaves."""
    with _orbax().StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), shapes)
