"""The axes of a chart: values as pixels, ticks at round numbers, and their names."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from medsiglip_jax.pages.svg import GREY, LINE, RULE, Real, path, text, tidy, wide

_LEAST = 0.002  # minimum span of an axis, as a share of its largest value


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
class Scale:
    """Values -> pixels; `low` and `high` lie at `start` and `end`."""

    low: Real
    high: Real
    start: Real
    end: Real
    log: bool

    @classmethod
    def of(
        cls, axis: Axis, values: Sequence[Real], start: Real, end: Real, room: Real = 0.0
    ) -> "Scale":
        """The scale of an axis from pixel `start` to `end`.

        Without limits it is that of the values, at least one, with `room` at both ends, as a share
        of their range.
        """
        if axis.limits is not None:
            return cls(*axis.limits, start, end, axis.log)
        low, high = min(values), max(values)
        if axis.log:
            factor = (high / low) ** room if high > low else 2.0
            return cls(low / factor, high * factor, start, end, True)
        margin = (high - low) * room if high > low else abs(high) / 2 or 1.0
        # Ticks have four digits: values that agree in them must not look far apart.
        least = (_LEAST * max(abs(low), abs(high)) - (high - low)) / 2
        margin = max(margin, least)
        return cls(low - margin, high + margin, start, end, False)

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


def frame(across: Scale, down: Scale, x: Axis, y: Axis) -> str:
    """Grid, ticks and labels of both axes."""
    left, right, bottom, top = across.start, across.end, down.start, down.end
    rungs, marks = down.ticks(), across.ticks()
    grid = "".join(f"M{left} {at:.1f}H{right}" for at, _ in rungs)
    stubs = "".join(f"M{at:.1f} {bottom}v4" for at, _ in marks)
    axis = f'<path d="M{left} {bottom}H{right}{stubs}" fill="none" stroke="{GREY}"/>'
    parts = [path(grid, RULE), axis]
    parts += [text(left - 6, at + 4, name, "end") for at, name in rungs]
    parts += [text(at, bottom + 16, name, "middle") for at, name in apart(marks)]
    if y.label:
        parts.append(text(left, top - 8, labelled(y.label, down)))
    if x.label:
        log = across.log  # an x axis that begins elsewhere misleads nobody
        label = labelled(x.label, across) if log else x.label
        parts.append(text(right, bottom + 16 + LINE, label, "end"))
    return "".join(parts)


def labelled(label: str, scale: Scale) -> str:
    """What an axis shows, and how, where that is not in proportion."""
    if scale.log:
        return f"{label} (log scale)"
    return f"{label} (axis cut)" if scale.low > 0 else label


def apart(marks: Sequence[tuple[float, str]]) -> Sequence[tuple[float, str]]:
    """As many names of ticks, side by side, as have room."""
    for every in range(1, len(marks)):
        kept = marks[::every]
        pairs = itertools.pairwise(kept)
        if all(b - a >= (wide(m) + wide(n)) / 2 + 4 for (a, m), (b, n) in pairs):
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
    return [tidy(v) for v in values]


def _scientific(value: Real) -> str:
    """2e-5, 1e-4."""
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if value else "0"
