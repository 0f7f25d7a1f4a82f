"""Device meshes, and which axis of which parameter lies on which mesh axis."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medsiglip_jax.model import tree

T = TypeVar("T")

# Below this a parameter is cheaper to keep whole (big_vision sharding.py:105-134).
FSDP_MIN_BYTES = 4 * 2**20


def make_mesh(
    data: int | None = None,
    model: int = 1,
    local: bool = False,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A ("data", "model") mesh over the devices of all processes, or the first of this one's.

    Args:
        data: size of the data axis; default all devices that `model` leaves.
        model: size of the model axis.
        local: only this process's devices, for work that the processes do not share.
        devices: these instead, such as those of a topology that is only compiled for.

    Raises:
        ValueError: there are not as many devices, or several processes would not use all of theirs.
    """
    found = np.asarray(devices or (jax.local_devices() if local else jax.devices()))
    data = data or max(1, found.size // model)
    wanted = data * model
    if wanted > found.size or (wanted < found.size and jax.process_count() > 1 and not local):
        raise ValueError(
            f"mesh data={data} x model={model} wants {wanted} devices; {found.size} are there"
        )
    grid = found[:wanted].reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_processes(value: int) -> np.ndarray:
    """This number of every process, int32 [processes]; all have to ask, and at the same point."""
    if jax.process_count() == 1:
        return np.array([value], np.int32)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(value))


def together(work: Callable[[], T], index: int | None = None) -> T | None:
    """Does `work` in every process, or in that of `index` alone; where one fails, all stop.

    Returns:
        What `work` returned, None in processes that had none to do.

    Raises:
        Exception: what `work` raised; in the others ValueError.
    """
    result, problem = None, None
    if index is None or index == jax.process_index():
        try:
            result = work()
        except Exception as error:
            problem = error
    failed = np.flatnonzero(over_processes(problem is not None))
    if problem is not None:
        raise problem
    if failed.size:
        raise ValueError(f"process {failed[0]} has refused this run; it says why")
    return result


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
