"""Writes the notebooks of scripts/examples from their scripts.

    python scripts/make_notebooks.py           # writes those that differ
    python scripts/make_notebooks.py --check   # only names them; exit code 1 if there are any

The scripts are what people edit; jupytext reads their cells ("py:percent"). The notebooks have no
outputs, and ids of cells that depend on nothing but their place, so that the same script always
gives the same bytes.
"""

import argparse
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent / "examples"
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    found = differing()
    for path, content in found.items():
        print(path)
        if not args.check:
            path.write_text(content, encoding="utf-8", newline="\n")
    return 1 if args.check and found else 0


def differing() -> dict[Path, str]:
    """The notebooks that are not what their scripts give -> what they should be."""
    wanted = {path.with_suffix(".ipynb"): notebook(path) for path in sorted(FOLDER.glob("*.py"))}
    return {path: content for path, content in wanted.items() if _read(path) != content}


def notebook(script: Path) -> str:
    """The notebook of a script, as text."""
    book = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    for number, cell in enumerate(book.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    book.metadata, book.nbformat, book.nbformat_minor = _METADATA, 4, 5
    nbformat.validate(book)
    return nbformat.writes(book, version=nbformat.NO_CONVERT) + "\n"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    raise SystemExit(main())
