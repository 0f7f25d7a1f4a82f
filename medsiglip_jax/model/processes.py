"""Work that the processes of one run do together (`jax.distributed`)."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from medsiglip_jax.model import peers
from medsiglip_jax.model.relay import Relay

T = TypeVar("T")
_KEY, _KEY_SECONDS = "medsiglip_jax/peers", 60
_START_SECONDS = 300  # for all processes to start


def join(
    coordinator: str | None, count: int | None, index: int | None, say: Callable[[str], None]
) -> bool:
    """Joins the processes of a run by `jax.distributed.initialize`, and watches them.

    Args:
        coordinator: HOST:PORT of process 0; it, `count` and `index` may be None where a launcher
            (Cloud TPU, Slurm, Open MPI, Kubernetes) knows them.
        count: the number of processes.
        index: the number of this one, from 0.
        say: prints the line on a process that is lost.

    Returns:
        False where neither arguments nor a launcher tell who they are.

    Raises:
        RuntimeError: not all have started within 5 minutes, or JAX has computed already.
    """
    # Not public: how `initialize` finds the launcher, and the store of keys that it makes.
    from jax._src import clusters, distributed

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    coordinator, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, count, index, None, None, _START_SECONDS
    )
    if coordinator is None or count is None or index is None:
        return False
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    relay = Relay(host, int(port)) if index else None
    jax.distributed.initialize(
        relay.address if relay else coordinator, count, index,
        initialization_timeout=_START_SECONDS, heartbeat_timeout_seconds=peers.JAX_SECONDS,
    )  # fmt: skip
    watch = peers.Watch(index, count, say, jax.distributed.shutdown)
    client = distributed.global_state.client
    assert client is not None
    if relay:
        relay.holds.set()
        _connect(watch, host, client.blocking_key_value_get(_KEY, _KEY_SECONDS * 1000))
    else:
        client.key_value_set(_KEY, watch.listen(host))
    peers.use(watch)
    return True


def _connect(watch: peers.Watch, host: str, said: str) -> None:
    try:
        watch.connect(host, said)
    except OSError as error:
        raise OSError(
            f"process 0 cannot be reached at {host}, port {said.split()[0]} "
            f"({error.strerror or error}), by which processes notice that others are lost: hosts "
            "of one run have to reach each other at all ports"
        ) from None


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
