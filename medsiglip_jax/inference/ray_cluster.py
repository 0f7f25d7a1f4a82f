"""A Ray cluster: starting or joining one, and how many actors it has room for."""

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from medsiglip_jax.data.rows import Rows

_OBJECT_STORE = 128 << 20  # bytes, beside the rows; progress is all that it holds
# Ray's name of a resource -> how much of it.
Resources = Mapping[str, float | int]


def import_ray() -> Any:
    """The package, set not to report to its makers.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # warns if it is not set
    try:
        import ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "--runner ray needs Ray: pip install 'medsiglip-jax[ray]'"
        ) from None
    return ray


def init(**options: Any) -> None:
    """`ray.init`, which leaves logs and signals as they are."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():  # jax warns of forks; those of Ray start other programs
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        import_ray().init(**options, log_to_driver=False, logging_level="ERROR")
    if main:
        signal.signal(signal.SIGTERM, before)  # Ray's own ends the process


@contextlib.contextmanager
def connected(address: str | None, rows: Rows) -> Iterator[None]:
    """Joins a cluster, or starts one here for as long as the run takes; one that this process has
    joined already is used as it is."""
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address}
    if address is None:
        store = _OBJECT_STORE + 2 * rows.table.nbytes
        options = {"address": "local", "include_dashboard": False, "object_store_memory": store}
    try:
        init(**options)
    except (ConnectionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--address {address}: no Ray cluster answers there: {reason}") from None
    try:
        # A thread of Ray prints what has become of lost workers, at length.
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            yield
    finally:
        ray.shutdown()


def _hosts() -> list[dict[str, float]]:
    """The resources of the hosts of the cluster."""
    return [node["Resources"] for node in import_ray().nodes() if node["Alive"]]


def default_resources() -> dict[str, float]:
    """One GPU with its share of the CPUs; else a whole host, of which the smallest decides."""
    hosts = [host for host in _hosts() if host.get("CPU", 0) >= 1]
    for name in ("GPU", "TPU"):
        if having := [host for host in hosts if host.get(name, 0) >= 1]:
            share = 1.0 if name == "GPU" else min(host[name] for host in having)
            cpus = min(host["CPU"] * share // host[name] for host in having)
            return {name: share, "CPU": max(1.0, cpus)}
    return {"CPU": min((host["CPU"] for host in hosts), default=1.0)}


def room(resources: Resources) -> int:
    """How many actors the cluster has room for, if nothing else runs there."""
    asked = {name: number for name, number in resources.items() if number}
    return sum(
        int(min(host.get(name, 0) // number for name, number in asked.items())) for host in _hosts()
    )


def check_room(resources: Resources, address: str | None) -> None:
    """Raises ValueError if this machine, which is the whole cluster without an address, has no room
    for an actor; other clusters may grow."""
    if not address and not room(resources):
        asked, there = (
            ", ".join(f"{name}={number:g}" for name, number in some.items() if name in resources)
            for some in (resources, *_hosts()[:1])
        )
        raise ValueError(f"--actor-resources {asked}: this machine has {there or 'none of them'}")
