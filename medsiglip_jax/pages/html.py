"""The frame that all pages share: head, style, escaping, colours, tables.

A page is one file that needs nothing else: no script, no style sheet, no picture of another file.
It is dark where the reader's system is. For that, colours on pages are `themed`: variables of CSS
that bring their light value along.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

__all__ = ["escape", "page", "paragraph", "table", "themed", "unthemed"]

# Letters, smaller letters, and lines of axes, which are too faint for letters.
INK, FAINT, GREY = "#1f2933", "#52606d", "#7b8794"
RULE, PAPER = "#e4e7eb", "#eef1f4"  # lines of grids and tables, what stands behind pictures
LINK = "#0072b2"
GROUND, DARK_GROUND = "#ffffff", "#12181f"  # what everything stands on, by day and by night
_DARK = {INK: "#e4e7eb", FAINT: "#9aa5b1", GREY: "#7b8794", RULE: "#323f4b", PAPER: "#1f2933",
         LINK: "#56b4e9"}  # fmt: skip


def themed(colour: str) -> str:
    """A colour of pages as CSS and SVG of a page name it, so that it is another one in the dark."""
    return f"var(--c{colour[1:]},{colour})" if colour in _DARK else colour


def unthemed(svg: str) -> str:
    """The same with its light colours, for a file of its own."""
    return re.sub(r"var\(--c\w+,(#\w+)\)", r"\1", svg)


_NIGHT = "".join(f"--c{light[1:]}:{dark};" for light, dark in _DARK.items())
_STYLE = f""":root{{color-scheme:light dark}}
@media (prefers-color-scheme:dark){{:root{{{_NIGHT}background:{DARK_GROUND}}}}}
body{{font:15px/1.5 system-ui,sans-serif;color:{themed(INK)};margin:32px auto;padding:0 16px}}
h1{{font-size:24px}}h2{{font-size:18px;margin-top:32px}}table{{border-collapse:collapse;
margin:12px 0;font-size:14px}}td,th{{padding:3px 14px 3px 0;text-align:left;vertical-align:top}}
th{{color:{themed(FAINT)};font-weight:500}}tr+tr>*{{border-top:1px solid {themed(RULE)}}}"""


def page(
    title: str,
    style: str,
    body: Iterable[str],
    caution: str,
    generator: str = "medsiglip_jax report",
) -> Iterator[str]:
    """A whole page, in pieces, because pictures inside it may be large.

    Args:
        title: of the page and its heading, as plain text.
        style: CSS beside that of all pages.
        body: HTML, already escaped.
        caution: the last paragraph, as plain text.
        generator: what wrote the page, by which a later run knows that it may replace it.
    """
    yield (
        f'<!doctype html><html lang="en"><meta charset="utf-8">\n'
        f'<meta name="generator" content="{escape(generator)}">\n'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}{style}</style><h1>{escape(title)}</h1>\n"
    )
    yield from body
    yield f"<p>{escape(caution)}</p></html>\n"


def paragraph(text: str) -> str:
    """A paragraph of plain text, or "" if it is empty."""
    return f"<p>{escape(text)}</p>" if text else ""


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), headed: bool = False) -> str:
    """A table of plain text.

    Args:
        rows: cells, from the top down.
        header: of the columns.
        headed: whether the first cell of each row is a heading, too.
    """
    head = [_row(header, "th", "th")] if header else []
    return f"<table>{''.join(head + [_row(row, 'th' if headed else 'td') for row in rows])}</table>"


def _row(cells: Sequence[str], first: str, tag: str = "td") -> str:
    tags = [first, *[tag] * (len(cells) - 1)]
    cells = [f"<{name}>{escape(cell)}" for name, cell in zip(tags, cells, strict=True)]
    return f"<tr>{''.join(cells)}"
