"""Copies of parameters into another order of axes and another element type, and their checks."""

import itertools
import mmap
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np


def copy(target: np.ndarray, source: np.ndarray) -> int:
    """target[...] = source, in tiles that stay in cache.

    A transposing copy goes through a buffer, into which whole cache lines are read and out of which
    they are written. Loading So400m/448 in float32, 3.5 GB of which nearly all is transposed, takes
    2.0 s of user time so on an Intel Xeon with AMX (2026-11-30), and 2.4 to 2.6 without the buffer,
    in slabs of 113 rows. In one piece such a copy runs at 0.2 to 0.5 GB/s.

    Args:
        target: of any strides, but those of a broadcast array.
        source: of the same shape; any float type.

    Returns:
        How many of the values are NaN or infinite in the target.
    """
    if not source.size:
        return 0
    source, target = _in_order_of_memory(source, target)
    steps, wrong = _steps(source.shape), 0
    # No two rows of a tile begin in the same set of the cache, as 4 KiB apart they would.
    padded = (*steps[:-1], steps[-1] + 64 // target.itemsize)
    buffer = np.empty(padded, target.dtype) if source.ndim > 1 else None
    for at in _tiles(source.shape, steps):
        values = source[at]
        tile = target[at] if buffer is None else buffer[tuple(map(slice, values.shape))]
        tile[...] = values
        wrong += not_finite(tile)  # while it is in cache
        if buffer is not None:
            target[at] = tile
    return wrong


def _in_order_of_memory(source: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
    """Both with the axes as the source lies in memory; those that are adjacent in both are one."""
    source, target = source.squeeze(), target.squeeze()
    order = np.argsort(source.strides)[::-1]
    both, shape = [x.transpose(order) for x in (source, target)], []
    for axis, size in enumerate(both[0].shape):
        if axis and all(x.strides[axis - 1] == x.strides[axis] * size for x in both):
            shape[-1] *= size
        else:
            shape.append(size)
    return [x.reshape(shape or 1) for x in both]


# Rows and columns of a tile, of 256 KiB in float32, and how much is copied at once as it lies.
_ROWS, _COLUMNS, _SLAB = 512, 128, 1 << 17


def _steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tile: rows of the first axis and columns of the last, all of those between."""
    if len(shape) == 1:
        return (min(_SLAB, *shape),)
    rows, *between, columns = shape
    wanted = max(1, _ROWS // int(np.prod(between)))
    return min(rows, wanted), *between, min(columns, _COLUMNS)


def _tiles(shape: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    ranges = (range(0, n, step) for n, step in zip(shape, steps, strict=True))
    for corner in itertools.product(*ranges):
        yield tuple(slice(at, at + step) for at, step in zip(corner, steps, strict=True))


def not_finite(values: np.ndarray) -> int:
    """How many of the values are NaN or infinite."""
    if values.dtype == np.dtype(ml_dtypes.bfloat16):  # by its exponent: numpy has no fast way
        return int(np.count_nonzero((values.view(np.uint16) & 0x7F80) == 0x7F80))
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a 64-byte boundary: XLA's CPU client adopts such memory without a
    copy, which is what keeps the peak at one times the result."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def release(values: np.ndarray) -> None:
    """Gives back the pages of a mapped file that an array is a view of; they can be read again.

    Otherwise a file that was read once stays in the memory of the process.
    """
    if not values.size:
        return
    low, high = np.lib.array_utils.byte_bounds(values)
    base: Any = values
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        origin = np.frombuffer(base, np.uint8).ctypes.data
        start = (low - origin) // mmap.PAGESIZE * mmap.PAGESIZE
        base.madvise(mmap.MADV_DONTNEED, start, high - origin - start)
