"""Reads the parameters of an opened checkpoint into device arrays, and checks their values."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from medsiglip_jax.files import threads
from medsiglip_jax.model import tree
from medsiglip_jax.model.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    Leaf,
    dtype_of,
    explained,
)
from medsiglip_jax.model.weights.copies import aligned_empty, copy, not_finite, release
from medsiglip_jax.model.weights.layouts import check

Index = tuple[slice, ...]

# Parameters that are begun before the one that is waited for: no core waits for the others at the
# end of a parameter.
_AHEAD = 1


def load_params(
    checkpoint: Checkpoint, dtype: str = "float32", shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reads a checkpoint into device arrays.

    Peak host memory is two parameters; on a CPU, where the result lies in host memory too, the
    result and little more. Of parameters that are split over processes each reads its own shards.

    Args:
        checkpoint: from `open_checkpoint`.
        dtype: storage type of the result, a key of `DTYPES`.
        shardings: tree of `jax.sharding.Sharding`, one per parameter; default: one device.

    Raises:
        CheckpointError: anything missing, unexpected, misshapen or unreadable, before or while
            reading; nothing is returned then.
    """
    target = dtype_of(dtype)
    check(checkpoint)
    flat_shardings = tree.flatten(shardings or {})
    params, begun = {}, deque()
    with ThreadPoolExecutor(max_workers=min(8, threads.processors())) as pool:
        for path, leaf in sorted(checkpoint.leaves.items(), key=_size, reverse=True):
            sharding = flat_shardings.get(path)
            begun.append((path, _begin(checkpoint, path, leaf, target, sharding, pool)))
            if len(begun) > _AHEAD:
                path, finish = begun.popleft()
                params[path] = finish()
        params |= {path: finish() for path, finish in begun}
    return tree.unflatten({path: params[path] for path in checkpoint.leaves})


def _size(item: tuple[str, Leaf]) -> int:
    """By which the largest come first, of which a layout may need a second copy for a moment: the
    memory of the result is not taken yet."""
    return math.prod(item[1].shape)


def _begin(
    checkpoint: Checkpoint,
    path: str,
    leaf: Leaf,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    pool: ThreadPoolExecutor,
) -> Callable[[], jax.Array]:
    """Begins to read a parameter; returns a function that waits for it and puts it on devices."""
    indices = {_key(index, leaf.shape): index for index in _shards(leaf.shape, sharding)}
    shards = {
        key: aligned_empty(tuple(len(range(*bounds)) for bounds in key), dtype) for key in indices
    }
    futures = [
        pool.submit(_fill, read, shape, targets)
        for read, shape, targets in _parts(leaf, [(indices[key], shards[key]) for key in indices])
    ]

    def finish() -> jax.Array:
        with explained(checkpoint.source, f"{path} cannot be read"):
            wrong = sum(future.result() for future in futures)
        _check_finite(checkpoint, path, wrong)
        if sharding is None:
            return jax.device_put(*shards.values())
        callback = lambda index: shards[_key(index, leaf.shape)]  # noqa: E731
        return jax.make_array_from_callback(leaf.shape, sharding, callback)

    return finish


def _shards(shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> list[Index]:
    """The pieces of a parameter that lie on devices of this process."""
    whole = tuple(slice(None) for _ in shape)
    if sharding is None:
        return [whole]
    return [index or whole for index in sharding.addressable_devices_indices_map(shape).values()]


def _key(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple(part.indices(size) for part, size in zip(index, shape, strict=True))


Targets = list[tuple[Index, np.ndarray]]


def _parts(leaf: Leaf, shards: Targets) -> list[tuple[Callable, tuple[int, ...], Targets]]:
    """Of each part that is needed: how it is read, its shape, and what of it goes where."""
    if len(leaf.parts) == 1:
        return [(leaf.parts[0], leaf.shape, shards)]
    needed = []
    for layer, read in enumerate(leaf.parts):
        targets = []
        for (layers, *index), array in shards:
            start, stop, _ = layers.indices(len(leaf.parts))
            if start <= layer < stop:
                targets.append((tuple(index), array[layer - start]))
        needed += [(read, leaf.shape[1:], targets)] if targets else []
    return needed


def _fill(read: Callable[[], np.ndarray], shape: tuple[int, ...], targets: Targets) -> int:
    """Copies a part, or slices of it; returns how many values are not finite."""
    values = read()
    whole = values.reshape(shape)  # a stack of one layer may lack its axis
    with np.errstate(over="ignore"):  # what does not fit is infinite, and counted
        wrong = sum(copy(target, whole[index]) for index, target in targets)
    release(values)
    return wrong


def check_values(checkpoint: Checkpoint) -> None:
    """Reads all parameters as they are stored, and keeps none.

    Args:
        checkpoint: from `open_checkpoint`; `check` has passed it.

    Raises:
        CheckpointError: one cannot be read, or has values that are NaN or infinite.
    """
    for path, leaf in checkpoint.leaves.items():
        with explained(checkpoint.source, f"{path} cannot be read"):
            wrong = sum(_count_not_finite(read()) for read in leaf.parts)
        _check_finite(checkpoint, path, wrong)


def _count_not_finite(values: np.ndarray) -> int:
    wrong = not_finite(values)
    release(values)
    return wrong


def _check_finite(checkpoint: Checkpoint, path: str, wrong: int) -> None:
    if wrong:
        problem = (
            f"{path} has {wrong:,} values that are NaN or infinite: the training that made it has "
            "diverged, the file is damaged, or the dtype asked for cannot hold them"
        )
        raise CheckpointError(checkpoint.source, [problem])
