"""`medsiglip-jax serve` in a process of its own, for scripts that ask it.

With the standard library alone: clients of the contracts have environments without our packages.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """Of processes that run this checkout, whatever is installed."""
    return {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "PYTHONPATH": str(ROOT)}


class Served:
    """The command on a free port, ready; it gets SIGTERM at the end of the block.

    Attributes:
        process: that of the command.
        port: where it listens.
    """

    def __init__(
        self,
        model: Path,
        *flags: str,
        python: str = sys.executable,
        address_space: int | None = None,
    ):
        """Starts it and waits until it is ready.

        Args:
            model: a checkpoint.
            flags: of the command.
            python: that runs it.
            address_space: bytes that it may have.
        """
        command = [python, "-m", "medsiglip_jax", "serve", "--model", str(model), "--port", "0"]
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment(),
        )  # fmt: skip
        if address_space:
            import resource  # which Windows lacks

            limits = (address_space, address_space)
            resource.prlimit(self.process.pid, resource.RLIMIT_AS, limits)
        assert self.process.stdout
        ready = self.process.stdout.readline()
        if "://" not in ready:
            raise SystemExit(f"the server has ended before it was ready: {self.log()[-2000:]}")
        self.port = int(ready.rpartition(":")[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(120)

    def log(self) -> str:
        """What it has written on stderr so far."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def status(self, name: str) -> int:
        """A number of /proc/PID/status, such as Threads, or VmRSS in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"\n{name}:")[2].split()[0])
