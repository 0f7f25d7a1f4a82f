"""Reads that a graph asks Python for, each given up where its disk does not answer.

A thread of TensorFlow that hangs would keep the process from ending, so the reads are made by other
threads.
"""

import weakref
from collections.abc import Callable
from typing import TypeVar

from medsiglip_jax.files.threads import Threads

T = TypeVar("T")


class Reader:
    """Threads that read files for the threads of a graph, which wait for them.

    They end when the reader is no longer referred to, since a graph is never closed.
    """

    def __init__(self, workers: int | None = None):
        """`workers` is the number of threads, as many as the graph has; default
        `threads.workers`."""
        self._threads = Threads("tf.data", workers)
        weakref.finalize(self, self._threads.close).atexit = False

    def __call__(self, name: str, read: Callable[[], T]) -> T:
        """What `read` returns or raises.

        Args:
            name: of what is read, for the message.
            read: reads one file. It must not refer to the reader, whose threads would else be the
                last that do, and would have to wait for themselves.

        Raises:
            Stalled: it takes more than `limits.Limits.read_timeout` seconds.
        """
        return self._threads.result(self._threads.submit(read), name)
