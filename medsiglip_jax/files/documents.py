"""The one way in which this project reads JSON and TOML, which others may have changed."""

import json
import tomllib
from typing import Any

# Levels of lists and tables; no file of ours has more than 8. What is deeper is of no use, and ends
# many a function that looks through it with a RecursionError.
_DEEPEST = 50


def parse(text: str | bytes) -> dict[str, Any]:
    """The object that a JSON text holds; a ValueError for anything else."""
    return _table(loads(text))


def parse_toml(text: str) -> dict[str, Any]:
    """The table that a TOML text holds; a ValueError for anything else."""
    try:
        return _table(tomllib.loads(text))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def loads(text: str | bytes, strict: bool = False) -> Any:
    """What a JSON text holds, of any kind and depth; a ValueError if it is none.

    NaN and Infinity are no JSON, but old files of ours have them; `strict` refuses them.
    """
    try:
        return json.loads(text, parse_constant=_refuse if strict else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _table(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        kind = "null" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"it holds {kind}, expected an object of named values")
    if _deeper(content, _DEEPEST):
        raise ValueError(f"nested more than {_DEEPEST} levels deep")
    return content


def _deeper(content: Any, levels: int) -> bool:
    if not isinstance(content, dict | list):
        return False
    items = content.values() if isinstance(content, dict) else content
    return levels == 0 or any(_deeper(item, levels - 1) for item in items)
