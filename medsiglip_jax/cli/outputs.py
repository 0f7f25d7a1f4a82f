"""Outputs are never inputs: what a command would replace must not be what it reads."""

import argparse
import os
from collections.abc import Iterator
from typing import Any

# Flags of what commands write.
_OUTPUTS = ("output", "heatmap", "destination", "workdir")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError if an output is an input too, or a file in a folder that is read.

    Links are resolved, so that another name of the same file is found, too.
    """
    outputs = [value for name in _OUTPUTS if isinstance(value := getattr(args, name, None), str)]
    inputs = [value for name, given in vars(args).items() if name not in _OUTPUTS
              for value in _strings(given) if os.path.exists(value)]  # fmt: skip
    for output in outputs:
        real = os.path.realpath(output)
        for given in inputs:
            read = os.path.realpath(given)
            if real == read or (os.path.exists(real) and os.path.samefile(real, read)):
                raise ValueError(
                    f"{output} is read by this command and would be replaced by what it writes; "
                    "choose another name for the output"
                )
            if _may_be_read(real) and real.startswith(os.path.join(read, "")):
                raise ValueError(
                    f"{output} lies in {given}, which this command reads, and would be replaced; "
                    "choose another name for the output"
                )


def _may_be_read(path: str) -> bool:
    """Whether a file is there that may be more than the page that this command wrote before."""
    return os.path.isfile(path) and not path.lower().endswith((".html", ".md"))


def _strings(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, list | tuple):
        yield from (value for value in given if isinstance(value, str))
