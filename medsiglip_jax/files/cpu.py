"""What the processor of this machine can do."""

import contextlib
from functools import cache


@cache
def features() -> frozenset[str]:
    """The features of the first core, as Linux lists them; nothing on other systems."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:  # of hundreds of cores only the first is read
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
