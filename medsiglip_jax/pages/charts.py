"""Line charts, forest plots and matrices as SVG inside a page, without any other file.

Figures are at most 460 pixels wide, so that text is readable on a phone, and are never scaled up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medsiglip_jax.pages import svg
from medsiglip_jax.pages.axes import Axis, Scale, apart, frame, labelled
from medsiglip_jax.pages.html import escape
from medsiglip_jax.pages.svg import COLOURS, GREY, INK, LINE, RULE, Key, Real

_DASHES = ("6 3", "2 3", "8 3 2 3")
_WIDTH, _HEIGHT, _SIDE = 400, 180, 190  # width of a chart, height of its plot, side of a square
_LEFT, _RIGHT = 46, 14
_POINTS = 300  # about so many per line, as a plot is wide in pixels


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
    keys = [Key(s.name, COLOURS[i % len(COLOURS)]) for i, (s, _) in enumerate(drawn)]
    keys += [Key(name, GREY, _DASHES[i % len(_DASHES)]) for i, name in enumerate(levels)]
    legend, rows = svg.legend(keys, width, 36)
    top = 28 + LINE * rows + (LINE + 3 if y.label else 0)
    bottom = top + (_SIDE if square else _HEIGHT)
    xs = [p[0] for _, points in drawn for p in points]
    ys = [p[1] for _, points in drawn for p in points] + list(levels.values())
    ys += [end for s, _ in drawn for _, *ends in s.whiskers for end in ends]
    across = Scale.of(x, xs, _LEFT, width - _RIGHT)
    down = Scale.of(y, ys, bottom, top, room=0.05)
    parts = [svg.title(title, width), legend, frame(across, down, x, y)]
    if diagonal:
        ends = [(across.low, across.low), (across.high, across.high)]
        parts.append(_polyline(ends, across, down, GREY, svg.dash("3 3")))
    for key, level in zip(keys[len(drawn) :], levels.values(), strict=True):
        line = f"M{_LEFT} {down(level):.1f}H{width - _RIGHT}"
        parts.append(svg.path(line, key.colour, 1.5, svg.dash(key.dash)))
    for key, (s, points) in zip(keys, drawn, strict=False):
        parts.append(_line(s, points, key.colour, across, down))
    height = bottom + 22 + (LINE if x.label else 0)
    return svg.figure(_description(title, drawn, levels), width, height, parts)


def _finite(series: Series, log_x: bool, log_y: bool) -> list[tuple[float, float, float]]:
    """(x, y, weight) of points that can be drawn."""
    weights = series.weights or [1.0] * len(series.points)
    return [
        (float(x), float(y), float(weight))
        for (x, y), weight in zip(series.points, weights, strict=True)
        if y is not None and math.isfinite(x) and math.isfinite(y)
        if (x > 0 or not log_x) and (y > 0 or not log_y)
    ]


def _line(series: Series, points, colour: str, across: Scale, down: Scale) -> str:
    thin = bool(series.weights)
    style = f' stroke-width="{1 if thin else 1.8}" stroke-linejoin="round"'
    parts = [_polyline(_thinned(points), across, down, colour, style)]
    for x, low, high in series.whiskers:
        at, first, last = across(x), down(low), down(high)
        ends = f"M{at - 3:.1f} {first:.1f}h6M{at - 3:.1f} {last:.1f}h6"
        parts.append(svg.path(f"M{at:.1f} {first:.1f}V{last:.1f}{ends}", colour))
    for x, y in series.rings:
        parts.append(
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="5" fill="none" stroke="{colour}" '
            f'stroke-width="2"><title>{svg.tidy(x)}: {svg.tidy(y)}</title></circle>'
        )
    if series.dots or thin or len(points) == 1:
        most, fade = max(weight for *_, weight in points) or 1, ' opacity="0.7"' if thin else ""
        for x, y, weight in points:
            radius = max(1.5, 7 * math.sqrt(weight / most)) if thin else 3
            hint = f"{svg.tidy(x)}: {svg.tidy(y)}" + (f", {weight:,.0f} rows" if thin else "")
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


def _polyline(points, across: Scale, down: Scale, stroke: str, extra: str) -> str:
    ends = " ".join(f"{across(p[0]):.1f},{down(p[1]):.1f}" for p in points)
    return f'<polyline points="{ends}" fill="none" stroke="{stroke}"{extra}/>'


def _description(title: str, drawn, levels: Mapping[str, Real]) -> str:
    """The figure in words, for screen readers."""
    ends = [f"{s.name} {svg.tidy(p[0][1])} to {svg.tidy(p[-1][1])}".strip() for s, p in drawn]
    return "; ".join([title, *ends, *(f"{name} at {svg.tidy(y)}" for name, y in levels.items())])


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
    left = 12 + min(_NAME, max(svg.wide(e.name) for e in estimates))
    keys = [Key("this run, 95 % interval", COLOURS[0])]
    if any(e.mark is not None for e in estimates):
        keys.append(Key(mark, COLOURS[1], mark=True))
    legend, rows = svg.legend(keys, _FOREST, 36)
    top = 30 + LINE * rows
    bottom = top + _ROW * len(estimates) + 6
    across = Scale.of(Axis(), [*values, *(x.limits or ())], left, _FOREST - _NUMBER, room=0.02)
    marks = across.ticks()
    grid = "".join(f"M{at:.1f} {top}V{bottom}" for at, _ in marks)
    parts = [svg.title(title, _FOREST), legend, svg.path(grid, RULE)]
    parts.append(svg.path(f"M{left:.1f} {bottom}H{across.end}", GREY))
    parts.append(svg.text(across.end, bottom + 16 + LINE, labelled(x.label, across), "end"))
    parts += [svg.text(at, bottom + 16, name, "middle") for at, name in apart(marks)]
    if x.limits is not None:
        parts.append(
            svg.path(f"M{across(x.limits[0]):.1f} {top}V{bottom}", GREY, extra=svg.dash("3 3"))
        )
    first = next((i for i, e in enumerate(estimates) if e.summary), 0)
    if first:
        parts.append(svg.path(f"M0 {top + _ROW * first}H{_FOREST}", GREY))
    parts += [_estimate(e, top + _ROW * (i + 0.5), left, across) for i, e in enumerate(estimates)]
    values = [
        f"{e.name} {'undefined' if e.value is None else svg.tidy(e.value)}" for e in estimates
    ]
    return svg.figure("; ".join([title, *values]), _FOREST, bottom + 22 + LINE, parts)


def _estimate(e: Estimate, y: Real, left: Real, across: Scale) -> str:
    weight = ' font-weight="600"' if e.summary else ""
    value = "–" if e.value is None else f"{e.value:.3f}"
    parts = [
        svg.text(0, y + 4, svg.fitted(e.name, left - 12), full=e.name, strong=weight),
        svg.text(_FOREST, y + 4, value, "end", strong=weight),
    ]
    colour, fade = COLOURS[0], ' opacity="0.45"' if e.faint else ""
    if e.low is not None and e.high is not None:
        parts.append(svg.path(f"M{across(e.low):.1f} {y}H{across(e.high):.1f}", colour, 2, fade))
    if e.value is not None:
        x = across(e.value)
        shape = f'circle cx="{x:.1f}" cy="{y}" r="4"'
        if e.summary:
            shape = f'path d="M{x - 6:.1f} {y}l6 -6l6 6l-6 6z"'
        parts.append(f'<{shape} fill="{colour}"{fade}/>')
    if e.mark is not None:
        parts.append(svg.path(f"M{across(e.mark):.1f} {y - 7}v14", COLOURS[1], 2.5))
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
    left = 12 + min(130.0, max(map(svg.wide, names))) if named else 12.0
    room = min(90.0, max(map(svg.wide, names))) if named else 0.0
    top = 48 + room
    width, height = left + size * len(names), top + size * len(names) + 8
    parts = [svg.title(title, max(width, 240)), svg.text(0, 34, "rows: label; columns: called")]
    for i, name in enumerate(names if named else ()):
        at = size * (i + 0.5)
        parts.append(
            svg.text(left - 6, top + at + 4, svg.fitted(name, left - 12), "end", full=name)
        )
        turned = f' transform="rotate(-90 {left + at + 4:.1f} {top - 6:.1f})"'
        short = svg.fitted(name, room + 6)
        parts.append(svg.text(left + at + 4, top - 6, short, full=name, attributes=turned))
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            hint = f"{names[i]} called {names[j]}: {count:,} of {sum(row):,}"
            at = left + size * j, top + size * i
            number = f"{count:,}" if len(names) <= _NUMBERED else ""
            parts.append(_cell(at, size, count / max(1, sum(row)), number, hint))
    right = sum(row[i] for i, row in enumerate(counts))
    description = f"{title}; {right:,} of {sum(map(sum, counts)):,} on the diagonal"
    return svg.figure(description, max(width, 240), height, parts)


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
