"""What every benchmark needs: turns, medians, and the machine beside the figures."""

import contextlib
import datetime
import faulthandler
import importlib.metadata
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SIDES = ("ours", "torch")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "safetensors")


def interleaved(calls: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each in turn, after one turn of warming up."""
    times: dict[str, list[float]] = {side: [] for side in calls}
    for turn in range(repeats + 1):
        for side, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[side].append(time.perf_counter() - start)
    return times


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Ends the process with a traceback when the block takes more CPU time, of all its threads.

    On a busy machine that is no sooner than on an idle one. What waits takes no CPU time: the block
    hangs if it is not done after 20 times as long by the clock.
    """
    faulthandler.register(signal.SIGPROF, chain=True)  # by default the signal ends a process
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(20 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)


def environment() -> dict:
    """What every figure needs beside it: machine, versions, date."""
    import jax

    versions = {"python": platform.python_version()}
    for package in ("medsiglip-jax", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "cores": cores(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": versions,
    }


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = [f for f in ("avx2", "avx512f", "amx_bf16") if f in fields.get("flags", "").split()]
    return " ".join([fields.get("model name", platform.machine()), *flags])


def cores() -> int:
    from medsiglip_jax.files import threads

    return threads.processors()


def summary(values: list[float]) -> dict:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def ratios(times: dict[str, list[float]]) -> dict:
    """How many times as long PyTorch takes, by medians and by minima."""
    ours, theirs = times["ours"], times["torch"]
    return {
        "ratio_of_medians": round(statistics.median(theirs) / statistics.median(ours), 3),
        "ratio_of_minima": round(min(theirs) / min(ours), 3),
    }


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
