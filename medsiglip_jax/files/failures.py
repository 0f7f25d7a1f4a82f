"""Failures on a file as one line: its content is wrong, or the machine cannot write it."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

# The machine fails, or nothing is there: no word on what a file holds.
_OF_THE_MACHINE = (
    MemoryError, ModuleNotFoundError, FileNotFoundError, FileExistsError, PermissionError,
    IsADirectoryError, NotADirectoryError,
)  # fmt: skip
_LONGEST = 300  # characters of a reason; libraries quote whole files


def _wrong(path: object, problem: str) -> Exception:
    return ValueError(f"{path}: {problem}")


@contextlib.contextmanager
def explained(
    path: object,
    problem: str,
    advice: str = "",
    error: Callable[[object, str], Exception] = _wrong,
) -> Iterator[None]:
    """Turns whatever fails on the content of a file into one ValueError that names the file.

    Parsers and libraries raise nearly every type there is for content that they do not expect, from
    KeyError to RecursionError and types of their own. Only code that reads belongs in here, since
    its bugs are reported as faults of the file, too.

    Args:
        path: of the file, for the message.
        problem: what is wrong with it, such as "not a probe".
        advice: what to do; it ends the message.
        error: (path, message) -> the exception to raise, a ValueError.

    Raises:
        ValueError: the content is wrong. Errors that name the file already, and those of the
            system, such as a missing file, pass unchanged.
    """
    try:
        yield
    except Exception as caught:
        named = isinstance(caught, ValueError) and str(caught).startswith(f"{path}: ")
        if named or _of_the_machine(caught):
            raise
        because = f"{problem} ({reason(caught)}){advice and '; '}{advice}"
        raise error(path, because) from caught


def reason(error: Exception) -> str:
    """What an exception says, in one line that is not too long."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return shortened(" ".join(str(error).split())) or type(error).__name__


def shortened(text: str) -> str:
    """A text without what is beyond some hundred characters."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _of_the_machine(error: Exception) -> bool:
    # Errors with a number come from the system. A file that is cut off leads libraries to read at
    # places that do not exist, which is the one number that content can cause.
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    return isinstance(error, _OF_THE_MACHINE) or number not in (None, errno.EINVAL)


# What libraries put into messages of their own types where the system could not write.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Turns a full or failing disk, by whatever exception a library tells of it, into one OSError.

    TensorStore raises a ValueError, safetensors a type of its own, Arrow an OSError without a name.
    """
    try:
        yield
    except Exception as caught:
        number = caught.errno if isinstance(caught, OSError) else None
        full = next((n for n in CANNOT_WRITE if os.strerror(n) in str(caught)), None)
        nameless = type(caught) is OSError and not caught.filename
        if not nameless and (full is None or isinstance(caught, OSError)):
            raise
        number = number or full
        text = os.strerror(number) if number else reason(caught)
        raise OSError(number, text, str(path)) from caught
