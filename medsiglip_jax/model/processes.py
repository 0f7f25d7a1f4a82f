"""Work that the processes of one run do together (`jax.distributed`)."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")


def allgather_int(value: int) -> np.ndarray:
    """Gathers one number from every process; all have to call this, and at the same point.

    Returns:
        int32 [processes], by process index.
    """
    if jax.process_count() == 1:
        return np.array([value], np.int32)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(value))


def gathered(params: Any) -> Any:
    """A tree of arrays that every process then has in full; all have to call this."""
    if jax.process_count() == 1:
        return params
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(params, tiled=True)


def run_on(work: Callable[[], T], index: int | None = None) -> T | None:
    """Runs `work` in every process, or only in process `index`; if one fails, all raise.

    Every process has to call this, and at the same point.

    Returns:
        The result of `work`; None in processes that did not run it.

    Raises:
        Exception: the error of `work`, or a ValueError if it failed in another process.
    """
    result, problem = None, None
    if index is None or index == jax.process_index():
        try:
            result = work()
        except Exception as error:
            problem = error
    failed = np.flatnonzero(allgather_int(problem is not None))
    if problem is not None:
        raise problem
    if failed.size:
        raise ValueError(f"process {failed[0]} refused this run; its own message says why")
    return result
