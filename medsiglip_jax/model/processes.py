"""Work that the processes of one run do together (`jax.distributed`)."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
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
        ValueError: `coordinator` is not HOST:PORT, or the environment has no good limit.
        RuntimeError: not all have started within 5 minutes, or JAX has computed already.
    """
    # Not public: how `initialize` finds the launcher, and the store of keys that it makes.
    from jax._src import clusters, distributed

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is not None:
        _address(coordinator)
    coordinator, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, count, index, None, None, _START_SECONDS
    )
    if coordinator is None or count is None or index is None:
        return False
    host, port = _address(coordinator)
    watch = peers.Watch(index, count, say, jax.distributed.shutdown)
    relay = Relay(host, port) if index else None
    with _no_proxy() if relay else contextlib.nullcontext():
        jax.distributed.initialize(
            relay.address if relay else coordinator, count, index,
            initialization_timeout=_START_SECONDS, heartbeat_timeout_seconds=peers.JAX_SECONDS,
        )  # fmt: skip
    client = distributed.global_state.client
    assert client is not None
    if not relay:
        client.key_value_set(_KEY, watch.listen(host, lambda index: _why_absent(client, index)))
    watched = not relay or _connects(watch, index, host, client)
    if watched:
        peers.use(watch)
    if relay and watched:
        relay.holds.set()
    _compile_alike()
    return True


def _compile_alike() -> None:
    """Has all processes of a run on CPUs compile, where only process 0 would read jax's cache.

    The others compile anyway, so that nothing is lost. XLA restores each loop of a program that is
    read by itself, without the order between its collectives and those outside; the processes of
    a run may then meet different ones first, and have been seen to wait for each other for ever.
    """
    if jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"the address of process 0 is {coordinator!r}; expected HOST:PORT")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    """Keeps gRPC from asking a proxy of the site for the relay, which is on this machine."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "no_grpc_proxy")}
    for name, hosts in before.items():
        os.environ[name] = ",".join(filter(None, (hosts, "127.0.0.1")))
    try:
        yield
    finally:
        for name, hosts in before.items():
            os.environ.pop(name) if hosts is None else os.environ.update({name: hosts})


def _connects(watch: peers.Watch, index: int, host: str, client: Any) -> bool:
    """Whether this process has connected with process 0; else both warn, and go on without."""
    said = client.blocking_key_value_get(_KEY, _KEY_SECONDS * 1000)
    try:
        watch.connect(host, said)
    except OSError as error:
        why = (
            f"process {index} cannot reach process 0 at {host}, port {said.split()[0]} "
            f"({error.strerror or error}), and goes on without: that one of them is lost, the "
            f"other notices late, and jax aborts it. Open all ports between the hosts of a run"
        )
        client.key_value_set(f"{_KEY}/{index}", why)
        warnings.warn(why, stacklevel=2)
        return False
    return True


def _why_absent(client: Any, index: int) -> str | None:
    """What a process has said in `_connects` if it could not connect."""
    with contextlib.suppress(Exception):  # there is no such key
        return client.key_value_try_get(f"{_KEY}/{index}")
    return None


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
