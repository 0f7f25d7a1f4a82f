"""The command line: which commands there are, and what their exit codes mean.

0 done; 1 the machine failed, or a bug; 2 something given is wrong; 3 done, but some inputs were
unreadable and are listed; 4 `monitor check` alarms; 128 + N stopped by signal N, everything saved.
With --json, stdout is one JSON document and nothing else.
"""

import argparse
import atexit
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from medsiglip_jax import __version__
from medsiglip_jax.cli import devices, output, outputs
from medsiglip_jax.cli.parser import Parser, command
from medsiglip_jax.files import limits, threads
from medsiglip_jax.model import exits, peers

# In the order of --help.
_ALL = (
    "quickstart examples info convert classify preview embed search probe evaluate compare explain "
    "monitor finetune plan card serve completion"
)
COMMANDS = tuple(import_module(f"medsiglip_jax.cli.{name}") for name in _ALL.split())
_GIVEN_WRONG = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError,
)  # fmt: skip
_MACHINE_FAILED = (
    OSError, MemoryError, ModuleNotFoundError, FloatingPointError, limits.TooSlow,
)  # fmt: skip
# Packages whose errors are no OSError, though networks and servers are what they are about.
_OF_NETWORKS = ("aiohttp", "gcsfs")


def parser() -> Parser:
    """The parser of the command line, with all commands."""
    top = Parser(
        prog="medsiglip-jax",
        description="MedSigLIP in JAX: medical images and texts in one embedding space.",
        epilog="Start with: medsiglip-jax quickstart. Not a medical device.",
    )
    top.add_argument("--version", action="version", version=f"medsiglip-jax {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        if name in ("probe", "monitor"):  # groups of commands
            module.add(commands)
        else:
            command(commands, getattr(module, name), module.define_flags)
    return top


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; with --config, those of the form --config.KEY=VALUE become `overrides`."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if "overrides" in args:
        args.overrides = [flag for flag in rest if flag.startswith("--config.")]
        rest = [flag for flag in rest if flag not in args.overrides]
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    _open_closed_streams()
    devices.prepare()
    warnings.showwarning = lambda message, *_, **__: output.note(f"warning: {message}")
    sys.excepthook = output.traceback
    output.leave_out_what_is_raised_too()
    try:
        args = _parse(argv)
    except SystemExit as stop:  # --help and wrong flags
        return stop.code if isinstance(stop.code, int) else 2
    try:
        read_timeout = getattr(args, "read_timeout", None)  # of commands that read inputs
        bounds = limits.parse(args.protocols, args.max_bytes, args.timeout, read_timeout)
        reading = threads.use(getattr(args, "workers", None))
        with _signals(), limits.use(bounds), reading, peers.ending():
            outputs.check(args)
            code = args.run(args)
            sys.stdout.flush()
            return _without_waiting(code)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except BaseException as error:
        if peers.is_lost():  # and a line has named the process
            return _without_waiting(1)
        code, line = _explained(error)
        if code is None:
            raise  # a bug: the traceback is what helps
        output.note(f"medsiglip-jax {args.run.__name__.replace('_', ' ')}: {line}")
        return _without_waiting(code)


def _without_waiting(code: int) -> int:
    """The exit code, with which the process is to end even if a thread hangs in a library, or
    other processes of the run go on."""
    if _others_go_on():
        atexit.register(_leave, code)
    return code


def _leave(code: int) -> None:
    if _others_go_on():
        exits.leave(code)


def _others_go_on() -> bool:
    return threads.are_left() or peers.has_ended()


def _open_closed_streams() -> None:
    """Opens what a shell has closed (`>&-`), or the next file that is opened would take its place
    and get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end; temporary files are removed on the way out."""

    def __init__(self, number: int):
        self.number = number
        self.exit_code = 128 + number  # as a shell reports a process that a signal ended
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped; the same command again starts over or resumes")


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end a command as Ctrl-C does; a second signal ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    before = {number: signal.getsignal(number) for number in (getattr(signal, n) for n in names)}
    ours = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup

    def handle(handler: Callable[[int, Any], Any]) -> None:
        for number in ours:
            signal.signal(number, handler)

    def interrupt(number: int, frame: Any) -> None:
        handle(lambda number, frame: os._exit(128 + number))
        caught.append(number)
        raise Interrupted(number)

    def again(unraisable: Any) -> None:
        """Repeats a signal that came in a callback of the garbage collector or in `__del__`, where
        Python drops what is raised."""
        if not isinstance(error := unraisable.exc_value, Interrupted):
            return hook(unraisable)
        handle(interrupt)
        threading.Timer(0.05, os.kill, (os.getpid(), error.number)).start()

    caught: list[int] = []
    hook, sys.unraisablehook = sys.unraisablehook, again
    handle(interrupt)
    try:
        yield
    except KeyboardInterrupt as error:  # of Ray, which raises a new one in place of ours
        if caught and not isinstance(error, Interrupted):
            raise Interrupted(caught[0]) from error
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _explained(error: BaseException) -> tuple[int | None, str]:
    """The exit code of what went wrong, and one line on it; None for a bug."""
    if isinstance(number := getattr(error, "exit_code", None), int):  # a signal; all is saved
        return number, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the same command again starts over or resumes"
    if isinstance(error, _GIVEN_WRONG):
        return 2, _one_line(error)
    if isinstance(error, _MACHINE_FAILED):
        return 1, _one_line(error) or type(error).__name__
    if type(error).__module__.partition(".")[0] in _OF_NETWORKS:
        return 1, f"{type(error).__name__}: {' '.join(str(error).split())}"
    if "RESOURCE_EXHAUSTED" in str(error):
        return 1, "out of device memory; try a smaller batch size"
    return None, ""


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
