"""Processes that share a run, of which some are killed: the files are those of an undisturbed run.

* `parts`: three processes with `embed --part` start together, one is ended by SIGTERM or SIGKILL at
  a random moment, and is then started again.
* `ray`: of two actors of `embed --runner ray`, one is ended by SIGKILL at a random moment.
"""

import collections
import functools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torture_writers
from fuzz_files import write_originals
from PIL import Image
from torture_process import Process, in_child
from torture_state import state

MODEL, IMAGES, PARTS = "originals/siglip", 240, 3
FLAGS = ["--shard-size", "8", "--batch-size", "2"]


def write_inputs() -> None:
    """A model and images in the working directory, one of them damaged."""
    write_originals(Path("originals"))
    rng = np.random.default_rng(0)
    Path("images").mkdir()
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (int(rng.integers(200, 900)), 700, 3), np.uint8)
        Image.fromarray(pixels).save(Path("images", f"{i:03d}.png"), compress_level=1)
    Path("images/100.jpg").write_bytes(b"no image")


# ------------------------------------------------------------------------------------------- parts


def part_command(output: str, part: str = "") -> list[str]:
    flags = ["--part", part] if part else []
    return ["embed", "--model", MODEL, "images", "--output", output, *FLAGS, *flags]


def parts_round(rng: np.random.Generator, output: str, seconds: float) -> str:
    """Returns what the fault was."""
    commands = [part_command(output, f"{i}/{PARTS}") for i in range(PARTS)]
    processes = [Process(command) for command in commands]
    victim = int(rng.integers(PARTS))
    number = [signal.SIGTERM, signal.SIGKILL][int(rng.integers(2))]
    time.sleep(rng.uniform(0.05, seconds))
    os.kill(processes[victim].pid, number)
    ends = [process.wait() for process in processes]
    for index, (code, text) in enumerate(ends):
        allowed = (0, 3) if index != victim else (0, 3, -number, 128 + number)
        assert code in allowed and "Traceback" not in text, (index, victim, code, text)
    met = ends[victim][0] not in (0, 3)
    code, text = Process(commands[victim]).wait()
    assert code == 3, (code, text)  # it is the last one now, or was before
    return f"{number.name}: {'met' if met else 'too late'}"


def parts(times: int, seed: int) -> collections.Counter[str]:
    """Rounds of `parts`; counts what came of them."""
    in_child(write_inputs)
    torture_writers.preload()
    start = time.monotonic()
    code, text = Process(part_command("whole")).wait()
    assert code == 3, text
    seconds = time.monotonic() - start

    def one(number: int, rng: np.random.Generator) -> str:
        return parts_round(rng, f"out-{number}", seconds)

    return rounds(one, times, seed)


# --------------------------------------------------------------------------------------------- ray


def actors(title: bytes = b"ray::Actor") -> list[int]:
    """Process ids of the Ray actors below this process whose title begins so; "ray::Actor.embed"
    is one at work."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(stat[1])
            if (folder / "cmdline").read_bytes().startswith(title):
                found.append(int(folder.name))
        except (OSError, IndexError):  # it has just ended
            continue
    return [pid for pid in found if os.getpid() in _ancestors(pid, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    above = []
    while pid := parents.get(pid, 0):
        above.append(pid)
    return above


class Killer:
    """A progress callback that ends an actor once so many batches are done, and a moment later."""

    def __init__(self, batches: int, delay: float, choose: Callable[[Sequence[int]], int]):
        self.batches, self.delay, self.choose = batches, delay, choose
        self.killed = 0

    def __call__(self, progress) -> None:
        self.batches -= 1
        if self.batches == 0:
            threading.Timer(self.delay, self._kill).start()

    def _kill(self) -> None:
        if pids := actors():
            os.kill(self.choose(pids), signal.SIGKILL)
            self.killed += 1


def ray(times: int, seed: int) -> collections.Counter[str]:
    """Rounds of `ray`, on one cluster; counts what came of them."""
    write_inputs()
    import medsiglip_jax
    from medsiglip_jax.data import inputs
    from medsiglip_jax.inference import embed, ray_cluster, ray_runner

    model, rows = medsiglip_jax.load(MODEL), inputs.rows(["images"])
    options = embed.EmbedOptions(shard_size=8, batch_size=2)
    load = functools.partial(medsiglip_jax.load, str(Path(MODEL).absolute()))
    runner = ray_runner.RayRunner(load, actors=2, resources={"CPU": 1}, batch_size=2)
    embed.embed(model, rows, "whole", options)
    ray_cluster.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=128 << 20
    )

    def one(number: int, rng: np.random.Generator) -> str:
        batches = int(rng.integers(1, len(rows) // 3))
        killer = Killer(batches, rng.uniform(0, 0.05), lambda pids: int(rng.choice(pids)))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            embed.embed(model, rows, f"out-{number}", options, killer, runner)
        lost = sum("an actor was lost" in str(warning.message) for warning in told)
        assert lost <= killer.killed <= 1, told  # none is left where the run was faster
        return "SIGKILL: met" if lost else "SIGKILL: too late"

    try:
        return rounds(one, times, seed)
    finally:
        ray_cluster.import_ray().shutdown()


# ------------------------------------------------------------------------------------------- rounds


def rounds(
    one: Callable[[int, np.random.Generator], str], times: int, seed: int
) -> collections.Counter[str]:
    """Holds the folder `out-N` of each round against `whole`."""
    found, whole = collections.Counter[str](), state(Path("whole"))
    for number in range(times):
        found[one(number, np.random.default_rng([seed, number]))] += 1
        same = state(Path(f"out-{number}")) == whole
        found["bytes identical" if same else "WRONG"] += 1
        print(f"{number + 1} of {times}: {dict(found)}", file=sys.stderr, flush=True)
    return found


def run(kind: str, times: int, seed: int) -> int:
    """Prints the counts as JSON; 1 if files differed."""
    work = {"parts": parts, "ray": ray}[kind]
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            found = work(times, seed)
        finally:
            os.chdir(before)
    print(json.dumps({kind: dict(sorted(found.items()))}))
    return int(bool(found["WRONG"]))
