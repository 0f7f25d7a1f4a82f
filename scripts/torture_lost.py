"""Runs of two processes over jax.distributed, of which one is lost: killed, or stopped like a host
that hangs. The other has to end within a minute with one line that names it, and the same command
has to end with the files of an undisturbed run.
"""

import collections
import functools
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torture_shards
from torture_process import in_child

SECONDS = 60  # in which the other has to end
_EMBED = ["embed", "--model", torture_shards.MODEL, "images", *torture_shards.FLAGS]
_FINETUNE = [
    "finetune", "--config", "lora", f"--config.init={torture_shards.MODEL}",
    "--config.data.path=rows.csv", "--config.data.text=text", "--config.batch_size=8",
    "--config.mesh.data=2", "--config.total_steps=30", "--config.checkpoint_every=5",
    "--config.log_every=5", "--config.workers=1",
]  # fmt: skip
# Command -> the flag of its folder, and which of the files there do not depend on the time.
COMMANDS = {
    "embed": ([*_EMBED, "--output"], ("*",)),
    "finetune": ([*_FINETUNE, "--workdir"], ("export/*.safetensors", "export/*.json")),
}


def write_inputs() -> None:
    """Those of `torture_shards`, and a table of pairs."""
    torture_shards.write_inputs()
    images = sorted(Path("images").glob("*.png"))[:64]
    rows = [f"{image},{'lung' if i % 2 else 'no finding'}" for i, image in enumerate(images)]
    Path("rows.csv").write_text("\n".join(["image,text", *rows]) + "\n")


class Pair:
    """Both processes of a command; `joined` is set when they watch each other."""

    def __init__(self, command: Sequence[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        common = [sys.executable, "-m", "medsiglip_jax", *command, "--coordinator", address]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.processes = [
            subprocess.Popen([*common, "--processes", "2", "--process-id", str(i)], **pipes,
                             env=environment)
            for i in range(2)
        ]  # fmt: skip
        self.said: list[list[str]] = [[], []]
        self.joined = [threading.Event(), threading.Event()]
        self._readers = [threading.Thread(target=self._read, args=(i,)) for i in range(2)]
        for reader in self._readers:
            reader.start()

    def _read(self, index: int) -> None:
        stdout = self.processes[index].stdout
        assert stdout
        with stdout:
            for line in stdout:
                if line.startswith("[Gloo]"):  # of their first collective
                    self.joined[index].set()
                else:
                    self.said[index].append(line.rstrip("\n"))
        self.joined[index].set()

    def wait_joined(self) -> None:
        for joined in self.joined:
            assert joined.wait(120), self.said

    def wait(self, index: int, seconds: float = 200) -> tuple[int, list[str]]:
        """The exit code and lines of a process."""
        code = self.processes[index].wait(seconds)
        self._readers[index].join()
        return code, self.said[index]


def told(lines: Sequence[str], lost: int, pid: int) -> bool:
    """Whether what was said is that one process was lost and how to go on, on one line."""
    named = [line for line in lines if re.search(r"process \d of 2 .*was lost", line)]
    wanted = f"process {lost} of 2 (host {socket.gethostname()}, pid {pid}) was lost: "
    stack = any("Traceback" in line or "Check failure" in line for line in lines)
    return len(named) == 1 and wanted in named[0] and "same command" in named[0] and not stack


def one(kind: str, number: int, seed: int, seconds: float) -> list[str]:
    """A round: what the fault was, and what came of it."""
    rng = np.random.default_rng([seed, number])
    command = [*COMMANDS[kind][0], f"{kind}-{number}"]
    victim = int(rng.integers(2))
    fault = ("SIGKILL", "SIGSTOP", "SIGSTOP, SIGCONT")[int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
    pair = Pair(command)
    pair.wait_joined()
    time.sleep(rng.uniform(0, seconds))
    process, other = pair.processes[victim], pair.processes[1 - victim]
    if process.poll() is not None or other.poll() is not None:
        fault = "none"
    else:
        process.send_signal(getattr(signal, fault.partition(",")[0]))
    start = time.monotonic()
    code, lines = pair.wait(1 - victim)
    took = time.monotonic() - start
    found = [f"{fault}, process {victim}"]
    if code in (0, 3):
        found.append("too late")
    else:
        found += ["met", "in time" if took < SECONDS else "TOO SLOW"]
        good = code == 1 and told(lines, victim, process.pid)
        found.append("named" if good else "NOT NAMED")
    if fault.endswith("SIGCONT") and process.poll() is None:  # a host that comes back
        process.send_signal(signal.SIGCONT)
        code, more = pair.wait(victim, SECONDS)
        good = code in (0, 3) or (code == 1 and told(more, 1 - victim, other.pid))
        found.append("ended itself" if good else "NOT ENDED")
        lines = [*lines, *more]
    process.kill()
    pair.wait(victim)
    if any(word.isupper() and word[:3] != "SIG" for word in found):
        print(number, found, *lines, sep="\n", file=sys.stderr)
    return [*found, rerun(kind, command)]


def rerun(kind: str, command: Sequence[str]) -> str:
    """Whether the same command ends with the files of the undisturbed run."""
    pair = Pair(command)
    ends = [pair.wait(index) for index in range(2)]
    if any(code not in (0, 3) for code, _ in ends):
        print(*(line for _, lines in ends for line in lines), sep="\n", file=sys.stderr)
        return "RERUN FAILED"
    return (
        "bytes identical" if files(kind, command[-1]) == files(kind, f"{kind}-whole") else "WRONG"
    )


def files(kind: str, folder: str) -> dict[str, str]:
    """Those of a finished run, by their digests."""
    found = {path for pattern in COMMANDS[kind][1] for path in Path(folder).glob(pattern)}
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
        if path.is_file()
    }


def lost(kind: str, times: int, seed: int) -> collections.Counter[str]:
    """Rounds of one command; counts what came of them."""
    pair = Pair([*COMMANDS[kind][0], f"{kind}-whole"])
    pair.wait_joined()
    start = time.monotonic()
    for index in range(2):
        code, lines = pair.wait(index)
        assert code in (0, 3), lines
    seconds, found = time.monotonic() - start, collections.Counter[str]()
    for number in range(times):
        found.update(one(kind, number, seed, seconds))
        print(f"{kind} {number + 1} of {times}: {dict(found)}", file=sys.stderr, flush=True)
    return found


def run(times: int, seed: int, word: str = "") -> int:
    """Prints the counts as JSON; 1 if anything is not as it should be."""
    before = os.getcwd()
    os.environ["PYTHONPATH"] = os.pathsep.join((before, os.environ.get("PYTHONPATH", "")))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            in_child(write_inputs)
            counts = {kind: lost(kind, times, seed) for kind in COMMANDS if word in kind}
        finally:
            os.chdir(before)
    print(json.dumps({kind: dict(sorted(found.items())) for kind, found in counts.items()}))
    words = functools.reduce(set.union, map(set, counts.values()), set())
    return int(bool(words & {"TOO SLOW", "NOT NAMED", "NOT ENDED", "RERUN FAILED", "WRONG"}))
