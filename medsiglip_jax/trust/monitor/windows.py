"""Windows of images: drawn from the reference to learn what is usual, and cut from what is new."""

import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

FEWEST = 20  # rows of a window that is tested; of fewer nothing can be said
_DURATION = re.compile(r"(\d+)([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 168}
_EXPECTED = "expected a number of images, or a time such as 12h, 7d or 4w"


def draw(
    groups: Int64[np.ndarray, " n"], size: int, count: int, rng: np.random.Generator
) -> Bool[np.ndarray, "b n"]:
    """Draws windows of `size` rows as they would come: of patients with all their images.

    The last patient of a window may be cut. Windows overlap each other, but what they are compared
    with is the rest of the rows, never themselves, so that a window differs from the rest as much
    as a new one does.

    Args:
        groups: patient of each row.
        size: rows of a window, fewer than there are.
        count: how many windows.
        rng: the generator of the draws.
    """
    n = len(groups)
    windows = np.zeros((count, n), bool)
    _, codes = np.unique(groups, return_inverse=True)
    alone = codes.max() + 1 == n
    for window in windows:
        order = rng.permutation(n)
        if not alone:  # patients in random order, each with all rows
            order = order[np.argsort(rng.permutation(codes.max() + 1)[codes[order]], kind="stable")]
        window[order[:size]] = True
    return windows


@dataclass(frozen=True, eq=False)
class Window:
    """Some of the new rows.

    Attributes:
        name: for people, such as "2026-03-02" or "rows 1 to 100".
        rows: their numbers, ascending.
    """

    name: str
    rows: Int64[np.ndarray, " n"]


def parse_size(text: str) -> int | datetime.timedelta:
    """A number of rows, or a time such as 12h, 7d or 4w."""
    if text.isdecimal() and int(text) >= FEWEST:
        return int(text)
    if (match := _DURATION.fullmatch(text)) and int(match[1]):
        return datetime.timedelta(hours=int(match[1]) * _HOURS[match[2]])
    raise ValueError(f"--window is {text!r}; {_EXPECTED}, of at least {FEWEST} images")


def cut(count: int, size: int | datetime.timedelta | None, times: Sequence[str]) -> list[Window]:
    """Cuts rows into windows.

    Args:
        count: number of rows.
        size: rows of a window, in their order; a time; or None for one window of all. Of rows at
            the end that are fewer than `FEWEST` none is made.
        times: when each row was made, ISO 8601; needed if the size is a time.

    Raises:
        ValueError: times are missing or are none.
    """
    if size is None:
        return [Window("all", np.arange(count))]
    if isinstance(size, int):
        starts = range(0, count, size)
        parts = [np.arange(start, min(start + size, count)) for start in starts]
        named = [Window(f"rows {p[0] + 1} to {p[-1] + 1}", p) for p in parts]
        return [w for w in named if len(w.rows) >= FEWEST] or named[:1]
    return list(_by_time(_parsed(times), size))


def _by_time(times: Sequence[datetime.datetime], size: datetime.timedelta) -> Iterator[Window]:
    """Windows of equal length from the day of the first row on, without those of no rows."""
    first = min(times).replace(hour=0, minute=0, second=0, microsecond=0)
    numbers = np.array([(time - first) // size for time in times])
    for number in np.unique(numbers).tolist():
        start = first + number * size
        name = start.date().isoformat()
        if size < datetime.timedelta(days=1):
            name = start.isoformat(" ", "minutes")
        yield Window(name, np.flatnonzero(numbers == number))


def _parsed(times: Sequence[str]) -> list[datetime.datetime]:
    if not times:
        raise ValueError("a --window of time needs --time COLUMN of the --metadata table")
    parsed = []
    for row, text in enumerate(times, start=1):
        try:
            time = datetime.datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(
                f"time {text!r} of row {row}: expected ISO 8601, such as 2026-03-02T10:30 or "
                "20260302"
            ) from None
        parsed.append(time)
    zoned = [time.tzinfo is not None for time in parsed]
    if any(zoned) and not all(zoned):
        first, other = times[zoned.index(True)], times[zoned.index(False)]
        raise ValueError(
            f"times {first!r} and {other!r}: one has a time zone and the other not; expected one "
            "for all or for none"
        )
    return [t.astimezone(datetime.UTC).replace(tzinfo=None) if t.tzinfo else t for t in parsed]
