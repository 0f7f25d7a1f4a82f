"""What the commands print: results on stdout, notes and progress on stderr."""

import datetime
import logging
import re
import sys
import threading
import time
import traceback as tracebacks
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from medsiglip_jax.files.credentials import without_in_text

# What shows nothing and is meant: line ends, tabs, and the joiners of Persian and Indian scripts.
_MEANT = frozenset("\n\t\u200c\u200d")
# A line break that does not begin a further problem of the same error, as `CheckpointError` has it.
_LINE_BREAK = re.compile(r"\n(?!  )")
_SURROGATE = re.compile("[\ud800-\udfff]")


def show(result: Any, as_json: bool, to_text: Callable[[Any], str]) -> None:
    """Prints a result as text, or as JSON, where a number that is not finite is null."""
    print(to_json(result) if as_json else printable(to_text(result), sys.stdout.encoding))


def to_json(result: Any) -> str:
    """A JSON document for stdout, which is valid whatever the names of files hold."""
    from medsiglip_jax.files.json_text import dumps

    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    document = without_in_text(dumps(result, ensure_ascii=False, indent=2))
    # Bytes of names that are not UTF-8 have no place in JSON; they are as `names.escaped` has them.
    document = _SURROGATE.sub(lambda half: rf"\\u{ord(half[0]):04x}", document)
    return _escaped(document, lambda letter: dumps(letter)[1:-1], only_ascii=not utf8)


def printable(text: str, encoding: str | None = None) -> str:
    """Text without what a terminal would obey rather than show, such as escape sequences and marks
    that turn the direction of writing, which names of files may hold: they are escaped. Credentials
    of addresses are left out.

    Args:
        text: of one or more lines.
        encoding: of the terminal; what it cannot show is escaped, too.
    """
    text = _escaped(without_in_text(text), lambda letter: letter.encode("unicode_escape").decode())
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def _escaped(text: str, escape: Callable[[str], str], only_ascii: bool = False) -> str:
    if text.isprintable() and not (only_ascii and not text.isascii()):
        return text
    return "".join(
        letter if _is_shown(letter) and (letter.isascii() or not only_ascii) else escape(letter)
        for letter in text
    )


def _is_shown(letter: str) -> bool:
    return letter.isprintable() or letter in _MEANT or unicodedata.category(letter) == "Zs"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def scored(results: Iterable[dict[str, Any]], to_lines: Callable[[Any], Iterable[str]]) -> str:
    """Each image with the lines that are made of its scores, or why it has none."""
    from medsiglip_jax.preprocess.facts import describe

    lines = []
    for result in results:
        reasons = {"unreadable": result.get("error"), "no answer": result.get("no_assist")}
        without = [f"  {what}: {why}" for what, why in reasons.items() if why]
        lines += [describe(result["image"]), *(without or to_lines(result["scores"]))]
    return "\n".join(lines)


def note(line: str) -> None:
    """Prints a note, a warning or an error on stderr."""
    line = _LINE_BREAK.sub(r"\\n", line)
    print(printable(line, sys.stderr.encoding), file=sys.stderr, flush=True)


def traceback(*error: Any) -> None:
    """Prints the traceback of a bug on stderr, as `sys.excepthook`."""
    lines = "".join(tracebacks.format_exception(*error))
    print(printable(lines, sys.stderr.encoding), file=sys.stderr, flush=True)


def leave_out_what_is_raised_too() -> None:
    """Leaves out what threads say of a checkpoint that cannot be written, such as on a full disk.

    The first of hundreds of errors, one per array, is raised, and the command says it in a line.
    Orbax also logs it with a traceback, asyncio logs those that nobody waits for any more, and
    TensorStore's threads, which find the event loop closed, print theirs.
    """
    logging.getLogger("absl").addFilter(_is_only_logged)
    logging.getLogger("asyncio").addFilter(_is_only_logged)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _unraisable


def _is_only_logged(record: logging.LogRecord) -> bool:
    raised_too = ("_SignalingThread.run() raised", "was never retrieved", "was destroyed but")
    return not any(words in record.getMessage() for words in raised_too)


def _unraisable(error: Any) -> None:
    """Threads of C++ name no object; Python's own name the callback or the `__del__`."""
    if error.object is not None or threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(error)


def progress_bar(
    unit: str, total: int | float | None = None, delay: float = 0, initial: int = 0
) -> Any:
    """Progress on stderr: on a terminal a bar of tqdm, shown once the work has taken `delay`
    seconds; else `_Lines`, which is used in the same way. `initial` units were done before."""
    if not sys.stderr.isatty():
        return _Lines(unit, total, initial)
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, unit_scale=True, delay=delay, initial=initial)


_SECONDS_BETWEEN_LINES = 60.0


class _Lines:
    """What a bar is on a terminal, in a log: a line a minute, also while a step takes longer.

    Work that takes less than a minute says nothing. Where nothing moves, there are lines only if it
    is known that there is more to do.
    """

    def __init__(self, unit: str, total: int | float | None = None, initial: int = 0):
        self.unit, self.total, self.n, self.initial = unit, total, initial, initial
        self._start, self._postfix = time.monotonic(), ""
        self._printed = 0
        self._closed = threading.Event()
        threading.Thread(target=self._print_lines, daemon=True).start()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()

    def update(self, n: int | float = 1) -> None:
        self.n += n

    def reset(self, total: int | float | None = None) -> None:
        """Begins anew, with another total if one is given."""
        self.n = self.initial = self._printed = 0
        self._start, self.total = time.monotonic(), total or self.total

    def unpause(self) -> None:
        """Takes now for the start."""
        self._start = time.monotonic()

    def set_postfix(self, shown: Mapping[str, str], refresh: bool = False) -> None:
        """What each line says at its end."""
        self._postfix = "".join(f", {name} {value}" for name, value in shown.items())

    def _print_lines(self) -> None:
        while not self._closed.wait(_SECONDS_BETWEEN_LINES):
            unfinished = self.n < self.total if self.total else self.n != self._printed
            if unfinished:
                self._printed = self.n
                note(self.line(time.monotonic() - self._start))

    def line(self, seconds: float) -> str:
        """The line after so many seconds; what was there at the start does not count for the
        rate."""
        done, rate = self.n - self.initial, (self.n - self.initial) / seconds
        of = f" of {self.total:,.0f}" if self.total else ""
        text = f"{self.n:,.0f}{of} {self.unit}s in {_duration(seconds)}, {rate:.3g}/s"
        if self.total and done:
            text += f", {_duration((self.total - self.n) / rate)} left"
        return text + self._postfix


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
