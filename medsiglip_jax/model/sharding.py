"""Device meshes, and which axis of which parameter lies on which mesh axis."""

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
        devices: these instead, such as those of a topology that is only compiled for.

    Raises:
        ValueError: there are fewer devices, or several processes would not use all of theirs.
    """
    present = np.asarray(devices or (jax.local_devices() if local else jax.devices()))
    data = data or present.size
    unused = data < present.size and jax.process_count() > 1 and not local
    if data > present.size or unused:
        raise ValueError(f"mesh data={data}: expected {present.size}, the number of devices here")
    return Mesh(present[:data], ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Puts this process's rows of a batch where they belong: on one device, or split over "data"
    with those of the other processes."""
    if mesh is None:
        return jax.device_put(batch)
    place = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(place, x) for k, x in batch.items()}


def param_shardings(shapes: dict[str, Any], mesh: Mesh, fsdp: bool = False) -> dict[str, Any]:
    """A sharding for every parameter: replicated, or FSDP over "data".

    FSDP splits the largest axis that the mesh divides, never the layer axis of a stack, and
    leaves parameters under `FSDP_MIN_BYTES` whole.

    Raises:
        ValueError: FSDP would leave most of the larger ones whole, too.
    """
    if fsdp:
        _check_divides(shapes, mesh.shape["data"])

    def one(path: str, leaf: Any) -> NamedSharding:
        spec = _fsdp_spec(path, leaf, mesh.shape["data"]) if fsdp else PartitionSpec()
        return NamedSharding(mesh, spec)

    return tree.map_with_path(one, shapes)


def _check_divides(shapes: dict[str, Any], size: int) -> None:
    flat = tree.flatten(shapes)
    held = {path: x.size * x.dtype.itemsize for path, x in flat.items()}
    large = {path: n for path, n in held.items() if n >= FSDP_MIN_BYTES}
    whole = {p: n for p, n in large.items() if _fsdp_spec(p, flat[p], size) == PartitionSpec()}
    if 2 * sum(whole.values()) > sum(large.values()):
        path = max(whole, key=lambda path: whole[path])
        raise ValueError(
            f"mesh.fsdp over {size} devices: they divide no axis of {path} "
            f"{list(flat[path].shape)}, nor of most other parameters, and each would hold all of "
            "it; choose a number of devices that divides one, or mesh.fsdp=False"
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
