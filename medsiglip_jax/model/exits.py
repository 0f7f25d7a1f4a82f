"""How a process ends whose threads or peers may hang."""

import os
import sys
import threading
import time
from collections.abc import Callable

_LIMIT_NAME = "MEDSIGLIP_JAX_HEARTBEAT_SECONDS"


def leave(code: int = 1) -> None:
    """Ends this process without waiting for its threads, even if its output cannot be written."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def leave_within(seconds: float) -> None:
    """Has this process end after so many seconds, and a little later if its output blocks."""
    for after, function in ((seconds, leave), (1.5 * seconds, lambda: os._exit(1))):
        timer = threading.Timer(after, function)
        timer.daemon = True
        timer.start()


def heartbeat_limit(default: float, least: float, most: int) -> float:
    """Seconds without a heartbeat after which a process is lost, as the environment says."""
    given = os.environ.get(_LIMIT_NAME)
    if given is None:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0
    if not least <= seconds <= most:
        raise ValueError(f"{_LIMIT_NAME} is {given!r}; expected seconds, {least:.0f} to {most:.0f}")
    return seconds


def wait(condition: Callable[[], bool], seconds: float) -> None:
    """Waits until a condition holds, but no longer than so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
