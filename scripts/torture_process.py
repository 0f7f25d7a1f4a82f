"""Commands in forked processes, and where those are ended."""

import contextlib
import functools
import hashlib
import mmap
import os
import pickle
import resource
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any


class Process:
    """A command in a forked process of this one, in which `first` is called before it."""

    def __init__(self, command: Sequence[str], first: Callable[[], object] = lambda: None):
        self.said, write_end = os.pipe()  # to which a limit on files does not apply
        self.pid = os.fork()
        if not self.pid:
            self._run(command, write_end, first)
        os.close(write_end)

    def _run(self, command: Sequence[str], write_end: int, first: Callable[[], object]) -> None:
        code = 1
        try:
            for descriptor in (1, 2):
                os.dup2(write_end, descriptor)
            os.close(write_end)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            first()
            from medsiglip_jax.cli import main

            code = main(command)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:  # whatever happens: only the process that forks may go on
                os._exit(code)

    def wait(self) -> tuple[int, str]:
        """The exit code, negative for a signal that ended it, and what it said."""
        with open(self.said, encoding="utf-8", errors="replace") as file:
            text = file.read()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), text


def limit_files(size: int, ends: bool = False) -> None:
    """Lets no file of this process grow beyond so many bytes; then writing fails, or `ends` the
    process there by SIGXFSZ."""
    sys.dont_write_bytecode = True  # Python would keep the first bytes as a whole file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if ends else signal.SIG_IGN)


def preload() -> None:
    """Imports what commands import, without starting JAX: a process that forks must not."""
    import importlib

    names = "jax flax optax orbax.checkpoint sklearn.datasets pyarrow.parquet scipy.stats"
    ours = (
        "cli evaluate.run evaluate.recompute evaluate.ensemble evaluate.report.export "
        "train.finetune train.quickstart embeddings.probe.fitting embeddings.index "
        "embeddings.search trust.explanation_run trust.monitor.check trust.monitor.report "
        "inference.classify inference.heatmap inference.preview model.weights.orbax "
        "data.tf.kernels serve.run"
    )
    for name in (*names.split(), *(f"medsiglip_jax.{name}" for name in ours.split())):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from medsiglip_jax.evaluate.data import digits
    from medsiglip_jax.train import quickstart

    # Few steps and images are enough: how the files are written does not depend on them.
    few = replace(quickstart.QuickstartSettings(), total_steps=4, warmup_steps=2)
    quickstart.run = functools.partial(quickstart.run, settings=few)
    arrays = digits._arrays
    digits._arrays = lambda: {name: array[::8] for name, array in arrays().items()}


def remember_shapes(folder: Path) -> None:
    """Keeps the shapes of the parameters of each model in a folder: to trace them takes half of the
    time of a command that loads a small one."""
    from medsiglip_jax.model import towers

    trace = towers._float32_shapes

    def shapes(config: Any) -> Any:
        file = folder / hashlib.sha256(repr(config).encode()).hexdigest()
        if not file.exists():
            folder.mkdir(exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_bytes(pickle.dumps(trace(config)))
            os.replace(partial, file)
        return pickle.loads(file.read_bytes())

    towers._float32_shapes = functools.lru_cache(shapes)


def in_child(work: Callable[[], None], quiet: bool = False) -> None:
    """Runs a function in a forked process, so that JAX is not started in this one.

    Args:
        work: what to do.
        quiet: it may fail.
    """
    if not (pid := os.fork()):
        code = 1
        try:
            if quiet:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert quiet or code == 0


# ---------------------------------------------------------------------------------- writing calls

# Audit events of Python -> where their arguments have a folder's descriptor.
_EVENTS = {"os.rename": 2, "os.link": 2, "os.symlink": 2, "os.remove": 1, "os.rmdir": 1,
           "os.mkdir": 2, "os.chmod": 2, "os.truncate": 9}  # fmt: skip
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_LAYOUT = "qdd"


class Writes:
    """Counts the calls by which a forked process changes files below a folder, and kills it before
    the N-th.

    Call it in that process. What it counts is read in the one that forks.
    """

    def __init__(self, folder: Path, kill_at: int = 0):
        self._folder, self._kill_at = str(folder.absolute()), kill_at
        self._shared, self._lock = mmap.mmap(-1, struct.calcsize(_LAYOUT)), threading.Lock()
        self._forked = time.monotonic()

    def __call__(self) -> None:
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            self._count()
            sync(descriptor)

        os.fsync = fsync  # has no audit event
        sys.addaudithook(self._hear)

    @property
    def told(self) -> tuple[int, float, float]:
        """The number of calls, and seconds after the fork of the first and the last."""
        return struct.unpack(_LAYOUT, self._shared[:])

    def _hear(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes | os.PathLike) and flags & _TO_WRITE:
                self._count_below(path)
        elif event in _EVENTS:
            descriptor = _EVENTS[event]
            if len(args) > descriptor and args[descriptor] >= 0:  # of rmtree
                self._count()
            else:
                self._count_below(args[0])

    def _count_below(self, path: Any) -> None:
        if os.path.abspath(os.fsdecode(path)).startswith(self._folder):
            self._count()

    def _count(self) -> None:
        with self._lock:
            now, (count, first, _) = time.monotonic() - self._forked, self.told
            self._shared[:] = struct.pack(_LAYOUT, count + 1, first or now, now)
            if count + 1 == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
