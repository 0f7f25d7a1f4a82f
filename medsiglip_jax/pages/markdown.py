"""Markdown in which plain text stays plain: names come from anybody's tables and folders."""

import html
import re
from collections.abc import Iterable, Sequence

# Markup within a line, where "_" is none between letters, nor "*" between spaces, and "#" at the
# end of a heading is some; and at the start of a line, mostly before a space.
_INLINE = re.compile(r"[\\`\[\]|~]|(?<!\s)\*|\*(?!\s|$)|(?<![^\W_])_|_(?![^\W_])|(?<=\s)#(?=#*$)")
_START = re.compile(r"^(#+|[-+]|\d+[.)])(?=\s|$)|^-(?=[-\s]*$)")


def escape(text: str) -> str:
    """Text on one line that is shown as it is: no HTML, link, picture, heading or cell of its own.

    Characters that cannot be seen, such as those that steer terminals, are spelled.
    """
    line = _INLINE.sub(r"\\\g<0>", html.escape(_one_line(text), quote=False))
    return _START.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", line)


def code(text: str) -> str:
    """Text as code, whatever backticks it holds."""
    line = _one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text."""
    lines = [map(escape, header), ["---"] * len(header), *(map(escape, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bullets(lines: Iterable[str]) -> str:
    """A list of lines of Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
