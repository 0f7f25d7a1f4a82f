"""How a process ends whose threads or peers may hang."""

import os
import sys
import threading


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
