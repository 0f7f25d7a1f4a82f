"""Line charts, forest plots and matrices as SVG inside a page, without any other file.

Figures are at most 460 pixels wide, so that text is readable on a phone, and are never scaled up.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medsiglip_jax.pages import html
from medsiglip_jax.pages.html import escape, themed

Real = int | float  # beartype does not accept an int as a float

INK, FAINT, GREY, RULE = map(themed, (html.INK, html.FAINT, html.GREY, html.RULE))
# Those of Okabe and Ito, which colour-blind people can tell apart, in another order.
COLOURS = (themed("#0072b2"), "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("6 3", "2 3", "8 3 2 3")
_WIDTH, _HEIGHT, _SIDE = 400, 180, 190  # width of a chart, height of its plot, side of a square
_LEFT, _RIGHT, _LINE = 46, 14, 17
_POINTS = 300  # about so many per line, as a plot is wide in pixels
_LEAST = 0.002  # minimum span of an axis, as a share of its largest value
_EM = 0.58  # mean width of a character, as a share of the font size


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: in the legend; "" is left out of it.
        points: (x, y); points with None, NaN or infinity are left out.
        whiskers: (x, low, high).
        weights: area of the dot of each point; the line is then thin.
        dots: whether points are marked.
        rings: (x, y) of points to mark beside the line.
    """

    name: str
    points: Sequence[tuple[Real, Real | None]]
    whiskers: Sequence[tuple[Real, Real, Real]] = ()
    weights: Sequence[Real] = ()
    dots: bool = False
    rings: Sequence[tuple[Real, Real]] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Attributes:
        label: below the x axis, above the y axis; it says, too, where values are logarithmic, or
            begin above 0.
        limits: its ends; None is the range of the data, for y with a margin.
        log: logarithmic; values up to 0 are left out.
    """

    label: str = ""
    limits: tuple[Real, Real] | None = None
    log: bool = False


@dataclass(frozen=True)
class Estimate:
    """One row of a forest plot.

    Attributes:
        name: left of it.
        value: None where it is undefined.
        low, high: the interval, or None.
        mark: a figure to compare with, or None.
        summary: drawn as a diamond, below a rule.
        faint: drawn in a lighter colour, because it is uncertain.
    """

    name: str
    value: Real | None
    low: Real | None = None
    high: Real | None = None
    mark: Real | None = None
    summary: bool = False
    faint: bool = False


# ------------------------------------------------------------------------------------ line charts


def lines(
    title: str,
    series: Sequence[Series],
    x: Axis = Axis(),
    y: Axis = Axis(),
    *,
    levels: Mapping[str, Real] | None = None,
    square: bool = False,
    diagonal: bool = False,
) -> str:
    """A figure of lines, or "" where there is nothing to draw.

    Args:
        title: above it.
        series: those without a point that can be drawn are left out.
        x, y: the axes.
        levels: name -> y of horizontal lines.
        square: small, and as high as wide, for ROC curves.
        diagonal: draw the line where x equals y.
    """
    drawn = [(s, points) for s in series if (points := _finite(s, x.log, y.log))]
    if not drawn:
        return ""
    levels = levels or {}
    width = _LEFT + _SIDE + _RIGHT if square else _WIDTH
    keys = [_Key(s.name, COLOURS[i % len(COLOURS)]) for i, (s, _) in enumerate(drawn)]
    keys += [_Key(name, GREY, _DASHES[i % len(_DASHES)]) for i, name in enumerate(levels)]
    legend, rows = _legend(keys, width, 36)
    top = 28 + _LINE * rows + (_LINE + 3 if y.label else 0)
    bottom = top + (_SIDE if square else _HEIGHT)
    xs = [p[0] for _, points in drawn for p in points]
    ys = [p[1] for _, points in drawn for p in points] + list(levels.values())
    ys += [end for s, _ in drawn for _, *ends in s.whiskers for end in ends]
    across = _Scale.of(x, xs, _LEFT, width - _RIGHT)
    down = _Scale.of(y, ys, bottom, top, room=0.05)
    parts = [_title(title, width), legend, _frame(across, down, x, y)]
    if diagonal:
        ends = [(across.low, across.low), (across.high, across.high)]
        parts.append(_polyline(ends, across, down, GREY, _dash("3 3")))
    for key, level in zip(keys[len(drawn) :], levels.values(), strict=True):
        line = f"M{_LEFT} {down(level):.1f}H{width - _RIGHT}"
        parts.append(_path(line, key.colour, 1.5, _dash(key.dash)))
    for key, (s, points) in zip(keys, drawn, strict=False):
        parts.append(_line(s, points, key.colour, across, down))
    height = bottom + 22 + (_LINE if x.label else 0)
    return _figure(_description(title, drawn, levels), width, height, parts)


def _finite(series: Series, log_x: bool, log_y: bool) -> list[tuple[float, float, float]]:
    """(x, y, weight) of points that can be drawn."""
    weights = series.weights or [1.0] * len(series.points)
    return [
        (float(x), float(y), float(weight))
        for (x, y), weight in zip(series.points, weights, strict=True)
        if y is not None and math.isfinite(x) and math.isfinite(y)
        if (x > 0 or not log_x) and (y > 0 or not log_y)
    ]


def _line(series: Series, points, colour: str, across: "_Scale", down: "_Scale") -> str:
    thin = bool(series.weights)
    style = f' stroke-width="{1 if thin else 1.8}" stroke-linejoin="round"'
    parts = [_polyline(_thinned(points), across, down, colour, style)]
    for x, low, high in series.whiskers:
        at, first, last = across(x), down(low), down(high)
        ends = f"M{at - 3:.1f} {first:.1f}h6M{at - 3:.1f} {last:.1f}h6"
        parts.append(_path(f"M{at:.1f} {first:.1f}V{last:.1f}{ends}", colour))
    for x, y in series.rings:
        parts.append(
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="5" fill="none" stroke="{colour}" '
            f'stroke-width="2"><title>{_tidy(x)}: {_tidy(y)}</title></circle>'
        )
    if series.dots or thin or len(points) == 1:
        most, fade = max(weight for *_, weight in points) or 1, ' opacity="0.7"' if thin else ""
        for x, y, weight in points:
            radius = max(1.5, 7 * math.sqrt(weight / most)) if thin else 3
            hint = f"{_tidy(x)}: {_tidy(y)}" + (f", {weight:,.0f} rows" if thin else "")
            parts.append(
                f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="{radius:.1f}" fill="{colour}"'
                f"{fade}><title>{hint}</title></circle>"
            )
    return "".join(parts)


def _thinned(points):
    """About `_POINTS` of them: the lowest and the highest of each stretch, so that peaks stay."""
    if len(points) <= _POINTS:
        return points
    stretch = math.ceil(2 * len(points) / _POINTS)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _polyline(points, across: "_Scale", down: "_Scale", stroke: str, extra: str) -> str:
    ends = " ".join(f"{across(p[0]):.1f},{down(p[1]):.1f}" for p in points)
    return f'<polyline points="{ends}" fill="none" stroke="{stroke}"{extra}/>'


def _description(title: str, drawn, levels: Mapping[str, Real]) -> str:
    """The figure in words, for screen readers."""
    ends = [f"{s.name} {_tidy(p[0][1])} to {_tidy(p[-1][1])}".strip() for s, p in drawn]
    return "; ".join([title, *ends, *(f"{name} at {_tidy(y)}" for name, y in levels.items())])


# ------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True)
class _Scale:
    """Values -> pixels; `low` and `high` lie at `start` and `end`."""

    low: Real
    high: Real
    start: Real
    end: Real
    log: bool

    @classmethod
    def of(cls, axis: Axis, values, start: Real, end: Real, room: Real = 0.0) -> "_Scale":
        if axis.limits is not None:
            return cls(*axis.limits, start, end, axis.log)
        low, high = min(values), max(values)
        if axis.log:
            wide = (high / low) ** room if high > low else 2.0
            return cls(low / wide, high * wide, start, end, True)
        wide = (high - low) * room if high > low else abs(high) / 2 or 1.0
        # Ticks have four digits: values that agree in them must not look far apart.
        least = (_LEAST * max(abs(low), abs(high)) - (high - low)) / 2
        wide = max(wide, least)
        return cls(low - wide, high + wide, start, end, False)

    def __call__(self, value: Real) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Position and name of each tick."""
        values = (log_ticks if self.log else ticks)(self.low, self.high)
        return [(self(v), name) for v, name in zip(values, _names(values, self.log), strict=True)]


def ticks(low: Real, high: Real, most: int = 7) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], at most `most`."""
    least = (high - low) / (most - 1) * (1 - 1e-9)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: Real, high: Real, most: int = 7) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high].

    Where these are more than `most`, powers of ten alone; or else every second, third and so on.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        every = [f * 10.0**p for p in powers for f in factors]
        inside = [v for v in every if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(inside) <= most:
            return inside if len(inside) > 1 else ticks(low, high)
    return inside[:: math.ceil(len(inside) / most)]


def _frame(across: _Scale, down: _Scale, x: Axis, y: Axis) -> str:
    """Grid, ticks and labels of both axes."""
    left, right, bottom, top = across.start, across.end, down.start, down.end
    rungs, marks = down.ticks(), across.ticks()
    grid = "".join(f"M{left} {at:.1f}H{right}" for at, _ in rungs)
    stubs = "".join(f"M{at:.1f} {bottom}v4" for at, _ in marks)
    axis = f'<path d="M{left} {bottom}H{right}{stubs}" fill="none" stroke="{GREY}"/>'
    parts = [_path(grid, RULE), axis]
    parts += [_text(left - 6, at + 4, name, "end") for at, name in rungs]
    parts += [_text(at, bottom + 16, name, "middle") for at, name in _apart(marks)]
    if y.label:
        parts.append(_text(left, top - 8, _labelled(y.label, down)))
    if x.label:
        log = across.log  # an x axis that begins elsewhere misleads nobody
        label = _labelled(x.label, across) if log else x.label
        parts.append(_text(right, bottom + 16 + _LINE, label, "end"))
    return "".join(parts)


def _labelled(label: str, scale: _Scale) -> str:
    """What an axis shows, and how, where that is not in proportion."""
    if scale.log:
        return f"{label} (log scale)"
    return f"{label} (axis cut)" if scale.low > 0 else label


def _apart(marks: Sequence[tuple[float, str]]) -> Sequence[tuple[float, str]]:
    """As many names of ticks, side by side, as have room."""
    for every in range(1, len(marks)):
        kept = marks[::every]
        pairs = itertools.pairwise(kept)
        if all(b - a >= (_wide(m) + _wide(n)) / 2 + 4 for (a, m), (b, n) in pairs):
            return kept
    return marks[:1]


def _names(values: Sequence[float], log: bool) -> list[str]:
    """Ticks as text, all with the same number of decimals."""
    if not log and len(values) > 1 and max(map(abs, values)) < 1e6:
        decimals = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
        if decimals <= 4:
            return [f"{v:,.{decimals}f}" for v in values]
        if max(map(abs, values)) < 1e-3:
            return [_scientific(v) for v in values]
    return [_tidy(v) for v in values]


def _scientific(value: Real) -> str:
    """2e-5, 1e-4."""
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if value else "0"


def _tidy(value: Real) -> str:
    """A number of four digits: 0.8123, 12,340, 2e-05, 1.5M."""
    if 1e6 <= abs(value) < 1e12:
        return f"{value / 1e6:,.4g}M"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


# ----------------------------------------------------------------------------------- forest plots


_FOREST, _ROW, _NUMBER, _NAME = 460, 20, 54, 185


def forest(title: str, estimates: Sequence[Estimate], x: Axis, mark: str = "") -> str:
    """A figure of estimates with their intervals, one to a row, or "" of none.

    Args:
        title: above it.
        estimates: from the top down; summaries last.
        x: the axis; it shows its limits at least, and a line at the first of them, such as chance.
        mark: what marks are, for the legend.
    """
    values = [v for e in estimates for v in (e.value, e.low, e.high, e.mark) if v is not None]
    if not values:
        return ""
    left = 12 + min(_NAME, max(_wide(e.name) for e in estimates))
    keys = [_Key("this run, 95 % interval", COLOURS[0])]
    if any(e.mark is not None for e in estimates):
        keys.append(_Key(mark, COLOURS[1], mark=True))
    legend, rows = _legend(keys, _FOREST, 36)
    top = 30 + _LINE * rows
    bottom = top + _ROW * len(estimates) + 6
    across = _Scale.of(Axis(), [*values, *(x.limits or ())], left, _FOREST - _NUMBER, room=0.02)
    marks = across.ticks()
    grid = "".join(f"M{at:.1f} {top}V{bottom}" for at, _ in marks)
    parts = [_title(title, _FOREST), legend, _path(grid, RULE)]
    parts.append(_path(f"M{left:.1f} {bottom}H{across.end}", GREY))
    parts.append(_text(across.end, bottom + 16 + _LINE, _labelled(x.label, across), "end"))
    parts += [_text(at, bottom + 16, name, "middle") for at, name in _apart(marks)]
    if x.limits is not None:
        parts.append(_path(f"M{across(x.limits[0]):.1f} {top}V{bottom}", GREY, extra=_dash("3 3")))
    first = next((i for i, e in enumerate(estimates) if e.summary), 0)
    if first:
        parts.append(_path(f"M0 {top + _ROW * first}H{_FOREST}", GREY))
    parts += [_estimate(e, top + _ROW * (i + 0.5), left, across) for i, e in enumerate(estimates)]
    values = [f"{e.name} {'undefined' if e.value is None else _tidy(e.value)}" for e in estimates]
    return _figure("; ".join([title, *values]), _FOREST, bottom + 22 + _LINE, parts)


def _estimate(e: Estimate, y: Real, left: Real, across: _Scale) -> str:
    weight = ' font-weight="600"' if e.summary else ""
    value = "–" if e.value is None else f"{e.value:.3f}"
    parts = [
        _text(0, y + 4, _fitted(e.name, left - 12), full=e.name, strong=weight),
        _text(_FOREST, y + 4, value, "end", strong=weight),
    ]
    colour, fade = COLOURS[0], ' opacity="0.45"' if e.faint else ""
    if e.low is not None and e.high is not None:
        parts.append(_path(f"M{across(e.low):.1f} {y}H{across(e.high):.1f}", colour, 2, fade))
    if e.value is not None:
        x = across(e.value)
        shape = f'circle cx="{x:.1f}" cy="{y}" r="4"'
        if e.summary:
            shape = f'path d="M{x - 6:.1f} {y}l6 -6l6 6l-6 6z"'
        parts.append(f'<{shape} fill="{colour}"{fade}/>')
    if e.mark is not None:
        parts.append(_path(f"M{across(e.mark):.1f} {y - 7}v14", COLOURS[1], 2.5))
    hint = f"{e.name}: {value}"
    hint += "" if e.low is None or e.high is None else f" ({e.low:.3f} to {e.high:.3f})"
    hint += "" if e.mark is None else f"; {e.mark:.3f} to compare"
    return f"<g><title>{escape(hint)}</title>{''.join(parts)}</g>"


# -------------------------------------------------------------------------------------- matrices


_CELL, _MOST_CELLS, _NUMBERED = 46, 460, 12
_DEEPEST = 0.5  # opacity of a cell; numbers are readable over it by day and by night


def matrix(title: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A figure of a confusion matrix, or "" of no classes: rows are labels, columns are called.

    A cell is as deep as its share of its row. Of more than twelve classes counts are tooltips.
    """
    if not names:
        return ""
    size = min(_CELL, _MOST_CELLS // len(names))
    named = size >= 10
    left = 12 + min(130.0, max(map(_wide, names))) if named else 12.0
    room = min(90.0, max(map(_wide, names))) if named else 0.0
    top = 48 + room
    width, height = left + size * len(names), top + size * len(names) + 8
    parts = [_title(title, max(width, 240)), _text(0, 34, "rows: label; columns: called")]
    for i, name in enumerate(names if named else ()):
        at = size * (i + 0.5)
        parts.append(_text(left - 6, top + at + 4, _fitted(name, left - 12), "end", full=name))
        turned = f' transform="rotate(-90 {left + at + 4:.1f} {top - 6:.1f})"'
        short = _fitted(name, room + 6)
        parts.append(_text(left + at + 4, top - 6, short, full=name, attributes=turned))
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            hint = f"{names[i]} called {names[j]}: {count:,} of {sum(row):,}"
            at = left + size * j, top + size * i
            number = f"{count:,}" if len(names) <= _NUMBERED else ""
            parts.append(_cell(at, size, count / max(1, sum(row)), number, hint))
    right = sum(row[i] for i, row in enumerate(counts))
    told = f"{title}; {right:,} of {sum(map(sum, counts)):,} on the diagonal"
    return _figure(told, max(width, 240), height, parts)


def _cell(at: tuple[Real, Real], size: Real, share: float, number: str, hint: str) -> str:
    x, y = at
    box = f'x="{x:.1f}" y="{y:.1f}" width="{size}" height="{size}"'
    letters = (
        f'<text x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}" text-anchor="middle" '
        f'fill="{INK}">{number}</text>'
    )
    return (
        f'<g><title>{escape(hint)}</title><rect {box} fill="{COLOURS[0]}" '
        f'fill-opacity="{_DEEPEST * share:.3f}" stroke="{RULE}"/>{letters if number else ""}</g>'
    )


# ----------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class _Key:
    """An entry of a legend."""

    name: str
    colour: str
    dash: str = ""
    mark: bool = False


def _legend(keys: Sequence[_Key], width: Real, y: Real) -> tuple[str, int]:
    """The entries with a name, side by side, and the number of rows that they take."""
    parts, at, row = [], 0.0, 0
    keys = [key for key in keys if key.name]
    for key in keys:
        name = _fitted(key.name, width - 24)
        taken = 24 + _wide(name) + 14
        if at and at + taken - 14 > width:
            at, row = 0.0, row + 1
        line = y + _LINE * row
        swatch = f"M{at + 9:.1f} {line - 10}v12" if key.mark else f"M{at:.1f} {line - 4}h18"
        parts.append(_path(swatch, key.colour, 2.5, _dash(key.dash)))
        parts.append(_text(at + 24, line, name, full=key.name))
        at += taken
    return "".join(parts), row + bool(keys)


def _title(title: str, width: Real) -> str:
    shown = _fitted(title, width, 15)  # bold text is wider
    return _text(0, 14, shown, full=title, strong=' font-size="14" font-weight="600"')


def _text(
    x: Real, y: Real, text: str, anchor: str = "", *, full: str = "", strong: str | None = None,
    attributes: str = "",
) -> str:  # fmt: skip
    """Text; the tooltip is `full`, where that is longer. `strong`: attributes of darker text."""
    colour, extra = (FAINT, attributes) if strong is None else (INK, strong)
    extra = f' text-anchor="{anchor}"{extra}' if anchor else extra
    hint = f"<title>{escape(full)}</title>" if full and full != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{extra}>{escape(text)}{hint}</text>'


def _wide(text: str, size: Real = 12) -> float:
    return len(text) * size * _EM


def _fitted(text: str, width: Real, size: Real = 12) -> str:
    """As much of the text as there is room for."""
    room = int(width / (size * _EM))
    return text if len(text) <= room else f"{text[: max(1, room - 1)].rstrip()}…"


def _figure(description: str, width: Real, height: Real, parts: Sequence[str]) -> str:
    return (
        f'<figure><svg width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}" '
        # The last tick may reach into the margin.
        'style="max-width:100%;height:auto;overflow:visible" '
        'font-family="system-ui,sans-serif" font-size="12" '
        f'role="img" aria-label="{escape(description)}">\n{"".join(parts)}</svg></figure>\n'
    )


def _path(d: str, stroke: str, width: Real = 0, extra: str = "") -> str:
    size = f' stroke-width="{width}"' if width else ""
    return f'<path d="{d}" stroke="{stroke}"{size}{extra}/>'


def _dash(pattern: str) -> str:
    return f' stroke-dasharray="{pattern}"' if pattern else ""
