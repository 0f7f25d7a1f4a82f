"""This project's own folders: an orbax tree, and a marker that holds the architecture."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places
from medsiglip_jax.model import tree
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.weights.checkpoint import Checkpoint, CheckpointError, Layout, Leaf

# Written last, read first.
MARKER = "medsiglip_jax.json"
_PARAMS = "params"
_METADATA = "_METADATA"  # orbax's own: the names and types of the arrays


def orbax() -> Any:
    """The module `orbax.checkpoint`; where it is missing, an error that says how to install it."""
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ModuleNotFoundError(
            "orbax-checkpoint is not installed; it comes with `pip install 'medsiglip-jax[train]'`"
        ) from None
    return ocp


def check_names(folder: Any) -> None:
    """Raises a ValueError for names of arrays by which orbax would leave their folder.

    Args:
        folder: of a tree, local or as `etils.epath` reaches it.
    """
    arrays = json.loads((folder / _METADATA).read_text())["tree_metadata"].values()
    names = [str(part["key"]) for array in arrays for part in array["key_metadata"]]
    if odd := [name for name in names if not places.stays_below(name)]:
        raise ValueError(f"{_METADATA} names an array {odd[0]!r}; expected names, not paths")


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder that has the marker; arrays are read by `restore`."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        config = ModelConfig.from_dict(content["config"])
        check_names(folder / _PARAMS)
        with orbax().StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata((folder / _PARAMS).absolute()).item_metadata.tree
    except ModuleNotFoundError:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged folder
        raise CheckpointError(folder, [f"cannot be opened: {error}"]) from error
    leaves = {p: Leaf(tuple(x.shape), np.dtype(x.dtype), ()) for p, x in tree.items(metadata)}
    files = tuple(sorted(p for p in (folder / _PARAMS).rglob("*") if p.is_file()))

    def restore(shapes: dict[str, Any]) -> dict[str, Any]:
        try:
            with orbax().StandardCheckpointer() as checkpointer:
                return checkpointer.restore((folder / _PARAMS).absolute(), shapes)
        except Exception as error:  # as above
            raise CheckpointError(folder, [f"cannot be read: {error}"]) from error

    return Checkpoint(str(folder), config, leaves, files, restore=restore)


def write_folder(folder: Path, params: dict[str, Any], config: ModelConfig) -> None:
    """Writes the tree, then the marker."""
    with orbax().StandardCheckpointer() as checkpointer:  # which returns when it is complete
        checkpointer.save((folder / _PARAMS).absolute(), params)
    json_files.write(folder / MARKER, {"format": "orbax", "config": config.to_dict()})


LAYOUT = Layout("orbax", MARKER, open=open_folder, write=write_folder)
