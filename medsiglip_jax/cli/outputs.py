"""What a command would replace is neither what it reads nor somebody's own file."""

import argparse
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from medsiglip_jax.cli.parser import Parser, add_flags

# Flags of what commands write.
_OUTPUTS = ("output", "sheet", "heatmap", "destination", "workdir")
# Whether a file, which is not empty, is one that the command wrote before.
_IsOwn = Callable[[str], bool]


def add_overwrite(sub: Parser, **own: _IsOwn) -> None:
    """The flag --overwrite of a command that writes files.

    Args:
        sub: the parser of the command.
        own: flag of an output -> what tells the files that the command writes there from others.
    """
    flag = {"--overwrite": "replace a file that this command did not write, too"}
    add_flags(sub, flag)
    sub.set_defaults(own=own)


def check(args: argparse.Namespace) -> None:
    """Refuses what an output would replace, before anything is done.

    Raises:
        ValueError: an output is an input too, or a file in a folder that is read. Links are
            resolved, so that another name of the same file is found, too.
        FileExistsError: an output exists, and is not a file that this command wrote.
    """
    _check_inputs(args)
    for name, is_own in getattr(args, "own", {}).items():
        given = getattr(args, name)
        for path in _written(name, given) if given and not args.overwrite else ():
            if os.path.isfile(path) and os.path.getsize(path) and not is_own(path):
                raise FileExistsError(
                    f"{path} exists, and is not a file that this command wrote; choose another "
                    "name, or replace it with --overwrite"
                )


def _written(name: str, path: str) -> Iterator[str]:
    yield path
    if name == "heatmap":
        yield os.path.splitext(path)[0] + ".parquet"


def _check_inputs(args: argparse.Namespace) -> None:
    outputs = [
        path for name in _OUTPUTS if isinstance(value := getattr(args, name, None), str)
        for path in _written(name, value)
    ]  # fmt: skip
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


# --------------------------------------------------------------- which files a command wrote before


def is_picture(path: str) -> bool:
    """Whether a file is a contact sheet, an HTML page or a PNG, or the picture of a heatmap."""
    from medsiglip_jax.pages import contact_sheet

    with open(path, "rb") as file:
        return contact_sheet.MARK.encode() in file.read(1024)


def is_heatmap(path: str) -> bool:
    """Whether a file is the picture of a heatmap, or its table."""
    if path.lower().endswith(".png"):
        return is_picture(path)
    return is_table_of("id,x,y,level,size,mpp,score,logits")(path)


def is_table_of(*headers: str) -> _IsOwn:
    """Tells tables, .csv or .parquet, by regular expressions of their columns, with commas."""

    def is_own(path: str) -> bool:
        from medsiglip_jax.embeddings.output import column_names

        columns = ",".join(column_names(path))
        return any(re.fullmatch(header, columns, re.DOTALL) for header in headers)

    return is_own


def is_probe(path: str) -> bool:
    """Whether a file is a probe, of whatever version."""
    return _holds(path, "metadata", "coefficients")


def is_reference(path: str) -> bool:
    """Whether a file is a reference of the monitor, of whatever version."""
    return _holds(path, "metadata", "vectors", "mahalanobis")


def _holds(path: str, *names: str) -> bool:
    """Whether a file is an .npz with arrays of these names."""
    try:
        with zipfile.ZipFile(path) as file:
            return {f"{name}.npy" for name in names} <= set(file.namelist())
    except zipfile.BadZipFile:
        return False


def begins_with(start: str) -> _IsOwn:
    """Tells texts by their first words."""

    def is_own(path: str) -> bool:
        with open(path, "rb") as file:
            return file.read(len(start.encode())) == start.encode()

    return is_own
