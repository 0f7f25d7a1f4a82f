"""The form of every command: a name, what it does, an example, and mistakes on one line."""

import argparse
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from medsiglip_jax.cli import output
from medsiglip_jax.files.limits import Limits

# Values of `add_flags`.
REQUIRED = {"required": True}
REPEATED = {"action": "append"}
# The help of --uncertain, of --embeddings and of --label-separator.
UNCERTAIN = (
    "what the label -1 (uncertain) means: ignore (default), positive or negative; or by finding, "
    "such as Edema=positive,Fracture=negative"
)
VECTORS = (
    "folder that embed wrote; or vectors of another program: .npz, .npy, .h5, .parquet, .csv or "
    "JSON lines, such as a batch prediction of Vertex AI"
)
SEPARATOR = (
    "what stands between the classes in a cell of --label, such as | in Edema|Effusion; none if "
    "each cell is one class; lists need none"
)
_REMOTE = {
    "--protocols NAMES": "also read and write over these protocols, such as s3 or s3,ftp; the "
    "default is gs, https, http and hf",
    "--max-bytes N": "most bytes of an object that is read into memory as a whole, such as an "
    f"image; default {Limits().max_bytes}",
    "--timeout SECONDS": "time that a server has to begin to answer, and to go on; default "
    f"{Limits().timeout:g}",
}
_READING = {
    "--read-timeout SECONDS": "time in which one input has to be read and decoded, wherever it is; "
    "after that its disk or mount is taken to be gone, and the command stops. 0 waits for ever; "
    f"default {Limits().read_timeout:g}",
}
# The functions of the commands that read inputs in the threads that --read-timeout is about
# (`files.threads`); to the others it means nothing.
_READERS = frozenset(
    "classify preview embed search probe_predict evaluate explain finetune".split()
)


class Parser(argparse.ArgumentParser):
    """Reports wrong flags on one line, as every other mistake, and accepts no abbreviations.

    Flags are added when the command is parsed: their help names the presets, layouts and data
    types that there are, and importing those tables takes a second for each `--help`.
    """

    def __init__(self, *args, add_flags: Callable[["Parser"], None] | None = None, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._add_flags = add_flags
        self._given: list[str] = []

    def complete(self) -> None:
        """Adds its flags, if they are not there yet."""
        add_flags, self._add_flags = self._add_flags, None
        if add_flags:
            add_flags(self)

    def commands(self) -> dict[str, "Parser"]:
        """The parsers of its commands, or of the actions of a group, by name."""
        self.complete()
        groups = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return {name: sub for choices in groups for name, sub in choices.items()}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore
        self.complete()
        self._given = list(sys.argv[1:] if args is None else args)
        namespace, rest = super().parse_known_args(self._given, namespace)
        if "--" in rest and (name := self._list_of_names()):  # after others, before flags
            end = rest.index("--")
            getattr(namespace, name).extend(rest[end + 1 :])
            rest = rest[:end]
        return namespace, rest

    def _list_of_names(self) -> str | None:
        lists = (
            action.dest for action in self._get_positional_actions() if action.nargs in ("+", "*")
        )
        return next(lists, None)

    def error(self, message: str):
        """Says what is wrong with the flags on one line, and ends with exit code 2."""
        output.note(f"{self.prog}: {message}{self._hint()} (see {self.prog} --help)")
        self.exit(2)

    def _hint(self) -> str:
        """What to do about the first word that begins with a hyphen and so was read as a flag; no
        flag of ours but -h has a single one."""
        before = itertools.takewhile(lambda word: word != "--", self._given)
        for flag, word in itertools.pairwise(("", *before)):
            single = re.match(r"-[^-]", word) and word != "-h"
            if single or (word.startswith("--") and os.path.lexists(word)):
                action = self._option_string_actions.get(flag)
                is_value = action is not None and action.nargs is None
                write = f"{flag}={word}" if is_value else f"./{word}, or -- before the last names"
                return f"; {word} begins with a hyphen and is read as a flag: write {write}"
        return ""


def command(
    commands,
    function: Callable[[argparse.Namespace], int],
    add_own_flags: Callable[[Parser], None],
) -> None:
    """Adds a command.

    Args:
        commands: what `add_subparsers` returned.
        function: takes the flags and returns the exit code; named as the command, or, in a group
            of commands, GROUP_NAME. Its docstring is the text of --help, with "example:" and
            command lines that work at its end. The first sentence, on one line, is that of the
            list of commands.
        add_own_flags: adds the command's flags to its parser.
    """

    def add_all_flags(sub: Parser) -> None:
        add_own_flags(sub)
        remote = sub.add_argument_group("files on other machines")
        add_flags(remote, _REMOTE, max_bytes=int, timeout=float)
        if function.__name__ in _READERS:
            add_flags(remote, _READING, read_timeout=float)
        add_flags(sub, {"--json": "print the result as one JSON document on stdout"})

    name = function.__name__.rpartition("_")[2]
    sub = _add(commands, name, inspect.getdoc(function) or "", add_all_flags)
    sub.set_defaults(run=function, default_of=sub.get_default)


def group(
    commands,
    name: str,
    text: str,
    actions: Mapping[Callable[[argparse.Namespace], int], Callable[[Parser], None]],
) -> None:
    """Adds a group of commands, such as `probe`.

    Args:
        commands: what `add_subparsers` returned.
        name: of the group.
        text: of --help, in the form of a command's docstring.
        actions: what `command` takes for each of its commands.
    """

    def add_actions(sub: Parser) -> None:
        subs = sub.add_subparsers(title="actions", metavar="ACTION", required=True)
        for function, add_own_flags in actions.items():
            command(subs, function, add_own_flags)

    _add(commands, name, inspect.cleandoc(text), add_actions)


def _add(commands, name: str, text: str, add_flags: Callable[[Parser], None]) -> Parser:
    description, _, example = text.partition("\n\nexample:\n")
    summary = description.partition(".")[0]  # in the list without its capital, but for "AUC"
    return commands.add_parser(
        name,
        help=summary if summary[:2].isupper() else summary[:1].lower() + summary[1:],
        description=description,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_flags=add_flags,
    )


def add_flags(sub: argparse._ActionsContainer, flags: Mapping[str, str], /, **values: Any) -> None:
    """Adds flags, each in the form in which --help lists it.

    Args:
        sub: the parser of a command, or a group of its flags.
        flags: "--name" (a switch), "--name METAVAR", "--name METAVAR..." (one or more), or the same
            of a positional argument, "name METAVAR" -> the help.
        values: of a flag by its name, if it does not take any text: its type, its default, or
            options of `add_argument`.
    """
    for form, help in flags.items():
        flag, _, metavar = form.partition(" ")
        options: dict[str, Any] = {"metavar": metavar.removesuffix("...")} if metavar else {}
        if metavar.endswith("..."):
            options["nargs"] = "+"
        name = flag.removeprefix("--").replace("-", "_")
        value = values.pop(name, {} if metavar else {"action": "store_true"})
        if isinstance(value, dict):
            options |= value
        elif isinstance(value, type):
            options["type"] = value
        else:
            options |= {"type": type(value), "default": value}
        sub.add_argument(flag, help=help, **options)
    assert not values, f"no flags of these names: {', '.join(values)}"


def refuse_unused(args: argparse.Namespace, where: str, names: Sequence[str]) -> None:
    """Raises ValueError if flags are given that have no effect on what is asked for.

    Args:
        args: of a `command`.
        where: they have none, such as "with --build-index".
        names: of the flags without effect, as in `args`.
    """
    if flags := given(args, names):
        raise ValueError(f"{where} these flags have no effect: {', '.join(flags)}")


def given(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The flags among `names` that are not at their defaults, as they are written."""
    changed = [name for name in names if getattr(args, name) != args.default_of(name)]
    return [f"--{name.replace('_', '-')}" for name in changed]


def add_config(sub: Parser, required: bool = True) -> None:
    """The flag of `train.configs.read`; `cli.app` puts --config.KEY=VALUE into `overrides`."""
    sub.set_defaults(overrides=[])
    config = {
        "--config NAME|FILE[:ARG]": "recipe, by name (such as lora), or a Python file with "
        "get_config(); ARG is passed to it"
    }
    add_flags(sub, config, config={"required": required})
