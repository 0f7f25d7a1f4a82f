"""Config files, Python files with `get_config()`: the user's own, and by name those of the package.

The latter are the files of `configs/` beside the package; a wheel has a copy of them inside it.
"""

import ast
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medsiglip_jax.files import storage
from medsiglip_jax.train.recipe import GROUPS, Recipe, from_dict

_IN_A_WHEEL = Path(__file__).parent / "recipes"
_FOLDER = _IN_A_WHEEL if _IN_A_WHEEL.is_dir() else Path(__file__).parents[2] / "configs"


def names() -> list[str]:
    """The recipes of the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.py"))


def copy(name: str, destination: str) -> None:
    """Writes a recipe of the package to a file of the user's, to be edited.

    Raises:
        FileNotFoundError: no recipe of that name.
        FileExistsError: `destination` is there already.
    """
    text = _find(name, only_names=True).read_text(encoding="utf-8")
    try:
        with storage.new_file(Path(destination), exclusive=True) as partial:
            partial.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise FileExistsError(f"{destination}: exists already; choose another name") from None


def read(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Runs a config file and applies overrides.

    Args:
        path: a Python file with `get_config(arg=None)` -> ml_collections.ConfigDict, or the name of
            a recipe of the package; ":arg" after it passes the argument.
        overrides: "--config.key=value", for any key of a recipe, also those that the file leaves
            at their defaults; values are Python literals, or else strings.

    Raises:
        FileNotFoundError: no such file or recipe.
        ValueError: a wrong key or value, or a file that is no config.
    """
    config = _plain(_run(path))
    for override in overrides:
        _apply(config, override)
    return from_dict(config)


def _run(path: str) -> Any:
    drive, path = os.path.splitdrive(path)  # of Windows, whose colon starts no argument
    name, _, argument = path.partition(":")
    file = _find(drive + name)
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: not a Python file; expected one with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(argument) if argument else module.get_config()
    except Exception as error:  # whatever a config file may do wrong
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error


def _find(name: str, only_names: bool = False) -> Path:
    if not only_names and Path(name).is_file():
        return Path(name)
    if name not in names():
        kinds = "no recipe" if only_names else "neither a config file nor a recipe"
        raise FileNotFoundError(f"{name}: {kinds}; the recipes are {', '.join(names())}")
    return _FOLDER / f"{name}.py"


def _apply(config: dict[str, Any], override: str) -> None:
    """Sets one key, in place."""
    path, equals, text = override.removeprefix("--config.").partition("=")
    if not equals:
        raise ValueError(f"{override}: no value; write {override}=VALUE")
    *groups, key = path.split(".")
    for group in groups:
        nested = config.get(group)
        if isinstance(nested, str) and group in GROUPS:
            nested = {"name": nested}  # the short form
        if nested is None:
            nested = {}
        if not isinstance(nested, dict):
            raise ValueError(
                f"{override}: {group} is {nested!r}, not a dict of keys; change the file"
            )
        config[group] = config = nested
    try:
        config[key] = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # it is no literal
        config[key] = text


def _plain(value: Any) -> Any:
    """ConfigDicts, and placeholders in them, as plain Python."""
    from ml_collections import ConfigDict, FieldReference

    if isinstance(value, (ConfigDict, dict)):
        return {key: _plain(value[key]) for key in value}
    if isinstance(value, FieldReference):
        return _plain(value.get())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(x) for x in value)
    return value
