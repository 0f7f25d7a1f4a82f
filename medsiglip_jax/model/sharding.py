"""Device meshes, and how batches and parameters are sharded over them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medsiglip_jax.model import tree

# Below this a parameter is cheaper to keep whole (big_vision sharding.py:105-134).
FSDP_MIN_BYTES = 4 * 2**20


def make_mesh(
    data: int | None = None, local: bool = False, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the one axis "data", over the devices of all processes or the first `data`.

    Args:
        data: number of devices; default all.
        local: only this process's devices, for work that the processes do not share.
        devices: use these instead, such as those of a topology to compile for.

    Raises:
        ValueError: there are fewer devices, or some would be left unused though there are several
            processes.
    """
    present = np.asarray(devices or (jax.local_devices() if local else jax.devices()))
    data = data or present.size
    unused = data < present.size and jax.process_count() > 1 and not local
    if data > present.size or unused:
        raise ValueError(f"mesh data={data}: expected {present.size}, the number of devices here")
    return Mesh(present[:data], ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the mesh."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Puts this process's rows of a batch on the device, or on its devices of the mesh."""
    if mesh is None:
        return jax.device_put(batch)
    place = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(place, x) for k, x in batch.items()}


def param_shardings(shapes: dict[str, Any], mesh: Mesh, fsdp: bool = False) -> dict[str, Any]:
    """The sharding of every parameter: replicated, or split over the mesh (FSDP).

    FSDP splits the largest axis that the number of devices divides, but never the layer axis of a
    stack, and replicates parameters smaller than `FSDP_MIN_BYTES`.

    Raises:
        ValueError: FSDP would replicate most of the larger parameters too.
    """
    if not fsdp:
        return tree.map_with_path(lambda path, leaf: replicated(mesh), shapes)
    size = mesh.shape["data"]
    _check_divides(shapes, size)
    return tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _fsdp_spec(path, leaf, size)), shapes
    )


def _check_divides(shapes: dict[str, Any], size: int) -> None:
    flat = tree.flatten(shapes)
    nbytes = {path: x.size * x.dtype.itemsize for path, x in flat.items()}
    large = {path: n for path, n in nbytes.items() if n >= FSDP_MIN_BYTES}
    whole = {p: n for p, n in large.items() if _fsdp_spec(p, flat[p], size) == PartitionSpec()}
    if 2 * sum(whole.values()) > sum(large.values()):
        path = max(whole, key=lambda path: whole[path])
        raise ValueError(
            f"mesh.fsdp over {size} devices: no axis of {path} {list(flat[path].shape)} is "
            f"divisible by {size}, nor are those of most other parameters, so every device would "
            "hold all of them; choose another number of devices, or mesh.fsdp=False"
        )


def _fsdp_spec(path: str, leaf: Any, size: int) -> PartitionSpec:
    if leaf.size * leaf.dtype.itemsize < FSDP_MIN_BYTES:
        return PartitionSpec()
    first = 1 if tree.STACK in path else 0
    axes = [axis for axis in range(first, len(leaf.shape)) if leaf.shape[axis] % size == 0]
    if not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: leaf.shape[axis])
    return PartitionSpec(*("data" if axis == largest else None for axis in range(largest + 1)))
