"""Text, lines and legends of figures as SVG inside a page, in its colours."""

from collections.abc import Sequence
from dataclasses import dataclass

from medsiglip_jax.pages import html
from medsiglip_jax.pages.html import escape, themed

Real = int | float  # beartype does not accept an int as a float

INK, FAINT, GREY, RULE = map(themed, (html.INK, html.FAINT, html.GREY, html.RULE))
# Those of Okabe and Ito, which colour-blind people can tell apart, in another order.
COLOURS = (themed("#0072b2"), "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
LINE = 17  # pixels, from one line of text to the next
_EM = 0.58  # mean width of a character, as a share of the font size


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    colour: str
    dash: str = ""
    mark: bool = False


def legend(keys: Sequence[Key], width: Real, y: Real) -> tuple[str, int]:
    """The entries with a name, side by side, and the number of rows that they take."""
    parts, at, row = [], 0.0, 0
    keys = [key for key in keys if key.name]
    for key in keys:
        name = fitted(key.name, width - 24)
        taken = 24 + wide(name) + 14
        if at and at + taken - 14 > width:
            at, row = 0.0, row + 1
        line = y + LINE * row
        swatch = f"M{at + 9:.1f} {line - 10}v12" if key.mark else f"M{at:.1f} {line - 4}h18"
        parts.append(path(swatch, key.colour, 2.5, dash(key.dash)))
        parts.append(text(at + 24, line, name, full=key.name))
        at += taken
    return "".join(parts), row + bool(keys)


def title(title: str, width: Real) -> str:
    """The title of a figure of this width, on its first line."""
    shown = fitted(title, width, 15)  # bold text is wider
    return text(0, 14, shown, full=title, strong=' font-size="14" font-weight="600"')


def text(
    x: Real, y: Real, text: str, anchor: str = "", *, full: str = "", strong: str | None = None,
    attributes: str = "",
) -> str:  # fmt: skip
    """Text; the tooltip is `full`, where that is longer. `strong`: attributes of darker text."""
    colour, extra = (FAINT, attributes) if strong is None else (INK, strong)
    extra = f' text-anchor="{anchor}"{extra}' if anchor else extra
    hint = f"<title>{escape(full)}</title>" if full and full != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{extra}>{escape(text)}{hint}</text>'


def wide(text: str, size: Real = 12) -> float:
    """About how wide a text of this font size is, in pixels."""
    return len(text) * size * _EM


def fitted(text: str, width: Real, size: Real = 12) -> str:
    """As much of the text as there is room for."""
    room = int(width / (size * _EM))
    return text if len(text) <= room else f"{text[: max(1, room - 1)].rstrip()}…"


def figure(description: str, width: Real, height: Real, parts: Sequence[str]) -> str:
    """A figure of these parts; `description` is for screen readers."""
    return (
        f'<figure><svg width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}" '
        # The last tick may reach into the margin.
        'style="max-width:100%;height:auto;overflow:visible" '
        'font-family="system-ui,sans-serif" font-size="12" '
        f'role="img" aria-label="{escape(description)}">\n{"".join(parts)}</svg></figure>\n'
    )


def path(d: str, stroke: str, width: Real = 0, extra: str = "") -> str:
    """A line along a path as SVG writes it; a width of 0 is that of SVG, 1."""
    size = f' stroke-width="{width}"' if width else ""
    return f'<path d="{d}" stroke="{stroke}"{size}{extra}/>'


def dash(pattern: str) -> str:
    """The attribute of a line that is dashed so; "" is a whole line."""
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def tidy(value: Real) -> str:
    """A number of four digits: 0.8123, 12,340, 2e-05, 1.5M."""
    if 1e6 <= abs(value) < 1e12:
        return f"{value / 1e6:,.4g}M"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
