"""What the commands print: results on stdout, notes and progress on stderr."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def show(result: Any, as_json: bool, to_text: Callable[[Any], str]) -> None:
    """Prints a result as text, or as JSON, where a number that is not finite is null."""
    if as_json:
        from medsiglip_jax.files.json_text import dumps

        print(dumps(result, ensure_ascii=False, indent=2))
    else:
        print(to_text(result))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def scored(results: Iterable[dict[str, Any]], to_lines: Callable[[Any], Iterable[str]]) -> str:
    """Each image with the lines that are made of its scores, or why it is unreadable."""
    lines = []
    for result in results:
        unreadable = [f"  unreadable: {result['error']}"] if "error" in result else []
        lines += [result["image"], *(unreadable or to_lines(result["scores"]))]
    return "\n".join(lines)


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def progress_bar(unit: str, total: int | float | None = None, delay: float = 0):
    """A bar on stderr if that is a terminal, shown once the work has taken `delay` seconds."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, unit_scale=True, disable=None, delay=delay)
