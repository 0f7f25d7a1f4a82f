"""How many bytes of requests are in memory."""

import contextlib
from collections.abc import Callable, Iterator


class Held:
    """Counts the bodies of requests that are being answered, and files that were fetched for them
    and wait to be decoded, up to a limit.

    Attributes:
        size: bytes now.
        most: bytes at a time.
    """

    def __init__(self, most: int):
        self.size, self.most = 0, most

    @contextlib.contextmanager
    def counting(self) -> Iterator[Callable[[int], bool]]:
        """What counts further bytes as held until the block ends; false if they are too many."""
        own = 0

        def count(more: int) -> bool:
            nonlocal own
            if self.size + more > self.most:
                return False
            own, self.size = own + more, self.size + more
            return True

        try:
            yield count
        finally:
            self.size -= own
