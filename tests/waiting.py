"""Waiting for what another thread or process does, however busy the machine is."""

import time
from collections.abc import Callable

HANGS = 60.0  # seconds, after which what has not happened will not


def wait_for(happens: Callable[[], object]) -> None:
    end = time.monotonic() + HANGS
    while not happens() and time.monotonic() < end:
        time.sleep(0.01)
    assert happens()
