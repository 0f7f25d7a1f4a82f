"""The command `medsiglip-jax`: flags in, library calls, results and exit codes out.

0 done; 1 the machine failed or a bug; 2 something given is wrong; 3 done, but some inputs were
unreadable and are listed; 128 + N stopped by signal N, everything saved. With --json, stdout is one
JSON document and nothing else.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from medsiglip_jax import __version__
from medsiglip_jax.cli import (
    compare,
    embed,
    evaluate,
    finetune,
    models,
    plan,
    preview,
    probe,
    search,
)
from medsiglip_jax.cli.common import Parser

_GIVEN_WRONG = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError,
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="medsiglip-jax",
        description="MedSigLIP in JAX: medical images and texts in one embedding space.",
        epilog="Start with: medsiglip-jax quickstart. Not a medical device.",
    )
    top.add_argument("--version", action="version", version=f"medsiglip-jax {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for room in (models, preview, embed, search, probe, evaluate, compare, finetune, plan):
        room.add(commands)
    return top


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; those of the form --config.KEY=VALUE, of finetune and plan, as `overrides`."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    takes = args.run in (finetune.finetune, plan.plan)
    args.overrides = [flag for flag in rest if takes and flag.startswith("--config.")]
    if unknown := [flag for flag in rest if flag not in args.overrides]:
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        args = _parse(argv)
    except SystemExit as stop:  # --help and wrong flags
        return stop.code if isinstance(stop.code, int) else 2
    name = f"medsiglip-jax {args.run.__name__.replace('_', ' ')}"
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command again starts or resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except _GIVEN_WRONG as error:
        print(f"{name}: {_one_line(error)}", file=sys.stderr)
        return 2
    except (OSError, MemoryError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"{name}: {_one_line(error) or type(error).__name__}", file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(number := getattr(error, "exit_code", None), int):  # a signal, all is saved
            print(f"{name}: {error}", file=sys.stderr)
            return number
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise  # a bug: the traceback is what helps
        print(f"{name}: out of device memory; try a smaller batch size", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
