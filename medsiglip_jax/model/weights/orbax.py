"""This project's own folders: an orbax tree, and a marker that holds the architecture."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places
from medsiglip_jax.model import tree
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.weights import big_vision
from medsiglip_jax.model.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    Layout,
    Leaf,
    explained,
)

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
    arrays = json_files.parse((folder / _METADATA).read_text())["tree_metadata"].values()
    names = [str(part["key"]) for array in arrays for part in array["key_metadata"]]
    if odd := [name for name in names if not places.stays_below(name)]:
        raise ValueError(f"{_METADATA} names an array {odd[0]!r}; expected names, not paths")


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder that has the marker; arrays are read one by one."""
    with explained(folder / MARKER, "not an architecture"):
        content = json_files.parse((folder / MARKER).read_bytes())
        config = ModelConfig.from_dict(content["config"])
    ocp, metadata = orbax(), folder / _PARAMS / _METADATA
    if not metadata.is_file():
        raise CheckpointError(folder, [f"cannot be opened: {_PARAMS}/{_METADATA} is missing"])
    with explained(folder, f"cannot be opened: {_PARAMS}/{_METADATA} is damaged"):
        if not isinstance(json_files.read(metadata).get("tree_metadata"), dict):
            raise ValueError("no tree_metadata in it")  # of which orbax says 'NoneType' …
        check_names(folder / _PARAMS)
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata((folder / _PARAMS).absolute()).item_metadata.tree
    leaves = {path: _leaf(folder / _PARAMS, path, x) for path, x in tree.items(found)}
    if wrong := big_vision.contradictions(config, {p: leaf.shape for p, leaf in leaves.items()}):
        raise CheckpointError(folder / MARKER, wrong)
    files = tuple(sorted(p for p in (folder / _PARAMS).rglob("*") if p.is_file()))
    return Checkpoint(str(folder), config, leaves, files)


def _leaf(folder: Path, path: str, stored: Any) -> Leaf:
    shape = jax.ShapeDtypeStruct(tuple(stored.shape), np.dtype(stored.dtype))
    return Leaf(shape.shape, shape.dtype, (partial(_read, folder, path, shape),))


def _read(folder: Path, path: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """One array of a tree: all at once would take the memory of a second copy of the tree.

    Every process reads by itself, and waits for no other.
    """
    ocp, here = orbax(), jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"reader_{here}"
    )
    how = ocp.args.PyTreeRestore(
        item=tree.unflatten({path: shape}),
        restore_args=tree.unflatten({path: ocp.RestoreArgs(restore_type=np.ndarray)}),
        partial_restore=True,
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        return tree.flatten(checkpointer.restore(folder.absolute(), how))[path]


def write_folder(folder: Path, params: dict[str, Any], config: ModelConfig) -> None:
    """Writes the tree, then the marker."""
    with orbax().StandardCheckpointer() as checkpointer:  # which returns when it is complete
        checkpointer.save((folder / _PARAMS).absolute(), params)
    json_files.write(folder / MARKER, {"format": "orbax", "config": config.to_dict()})


LAYOUT = Layout("orbax", MARKER, open=open_folder, write=write_folder)
