"""examples: the worked examples, listed or copied.

A wheel has the folder scripts/examples of the repository (pyproject.toml); in a checkout it is read
where it is.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from medsiglip_jax.cli import output
from medsiglip_jax.cli.parser import Parser, add_flags

_IN_A_WHEEL = Path(__file__).parents[1] / "examples"
_FOLDER = _IN_A_WHEEL if _IN_A_WHEEL.is_dir() else Path(__file__).parents[2] / "scripts/examples"
_SUFFIXES = (".py", ".ipynb", ".md")
_FLAGS = {
    "--copy DIR": "write the examples into this folder: scripts, the same as notebooks, and a "
    "README.md",
    "--overwrite": "replace files of DIR that differ",
}


def define_flags(sub: Parser) -> None:
    add_flags(sub, _FLAGS)


def examples(args: argparse.Namespace) -> int:
    """List the worked examples, or copy them. Each is a short script, and the same as a
    notebook, that runs on the small model of quickstart and says what to change for
    the real weights.

    example:
      medsiglip-jax examples --copy examples
      medsiglip-jax quickstart
      python examples/quick_start.py
    """
    if args.overwrite and not args.copy:
        raise ValueError("--overwrite has no effect without --copy DIR")
    listed = [{"name": path.stem, "title": _title(path)} for path in sorted(_FOLDER.glob("*.py"))]
    written = _copy(args.copy, args.overwrite) if args.copy else []
    output.show({"examples": listed, "written": written}, args.json, _text)
    return 0


def _title(path: Path) -> str:
    """The heading of an example's first cell."""
    heading = re.search(r"^# # (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert heading, path
    return heading[1]


def _copy(folder: str, overwrite: bool) -> list[str]:
    """Writes what is not there yet; all is looked at before the first file is written."""
    from medsiglip_jax.files import places, storage

    places.refuse_remote(folder)
    if Path(folder).is_file():
        raise ValueError(f"{folder}: a file; --copy needs the name of a folder")
    files = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir())
             if path.suffix in _SUFFIXES}  # fmt: skip
    present = {name for name in files if (Path(folder) / name).exists()}
    changed = {name for name in present if (Path(folder) / name).read_bytes() != files[name]}
    if changed and not overwrite:
        raise FileExistsError(
            f"{folder}: {', '.join(sorted(changed))} would be replaced; choose another folder, or "
            "replace them with --overwrite"
        )
    new = [name for name in files if name not in present - changed]
    for name in new:
        with storage.new_file(places.at(Path(folder) / name)) as partial:
            partial.write_bytes(files[name])
    return [str(Path(folder) / name) for name in new]


def _text(result: dict[str, Any]) -> str:
    lines = output.table(("example", "what it shows"), (
        (example["name"], example["title"]) for example in result["examples"]
    ))  # fmt: skip
    return "\n".join([*lines, *(f"wrote {path}" for path in result["written"])])
