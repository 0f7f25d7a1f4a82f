"""completion: what a shell completes, made of the parsers of all commands."""

import argparse
from typing import Any

from medsiglip_jax.cli import output
from medsiglip_jax.cli.parser import Parser, add_flags

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")


def define_flags(sub: Parser) -> None:
    add_flags(sub, {"shell SHELL": f"one of {', '.join(SHELLS)}"}, shell={"choices": SHELLS})


def completion(args: argparse.Namespace) -> int:
    """Print a script that completes commands, flags and files in your shell. Needs shtab:
    pip install 'medsiglip-jax[completion]'.

    example:
      medsiglip-jax completion bash > ~/.local/share/bash-completion/completions/medsiglip-jax
      medsiglip-jax completion zsh > ~/.zfunc/_medsiglip-jax
      medsiglip-jax completion fish > ~/.config/fish/completions/medsiglip-jax.fish
    """
    from medsiglip_jax.cli import app

    result = {"shell": args.shell, "script": script(app.parser(), args.shell)}
    output.show(result, args.json, lambda result: result["script"].rstrip("\n"))
    return 0


def script(parser: Parser, shell: str) -> str:
    """What a shell reads.

    Raises:
        ModuleNotFoundError: shtab is not installed.
    """
    try:
        import shtab  # pyright: ignore[reportMissingImports]  of an extra
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "completion needs shtab: pip install 'medsiglip-jax[completion]'"
        ) from None
    _complete_files(parser, shtab.FILE)
    return shtab.complete(parser, shell)


def _complete_files(parser: Parser, file: Any) -> None:
    """Has files completed wherever any text may stand, as shells do by default."""
    for command in parser.commands().values():
        _complete_files(command, file)
    for action in parser._actions:
        if action.nargs != 0 and action.choices is None and action.type is None:
            action.complete = file  # pyright: ignore[reportAttributeAccessIssue]  shtab's attribute
