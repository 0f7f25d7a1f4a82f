"""Which shards of a run are whose: one rule for one process, `jax.distributed`, and `--part`."""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The shards of one process of several: every `count`-th, from `index` on, which counts from
    0. The default are all shards."""

    index: int = 0
    count: int = 1

    def of(self, shards: int) -> range:
        """The numbers among so many shards."""
        return range(self.index, shards, self.count)

    def rows(self, total: int, shard_size: int) -> int:
        """How many rows of `total` lie in these shards."""
        starts = (number * shard_size for number in self.of(-(-total // shard_size)))
        return sum(min(shard_size, total - start) for start in starts)

    def owners(self, shards: Collection[int]) -> list[int]:
        """The indices of the processes whose share holds one of these shards."""
        return sorted({number % self.count for number in shards})

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse(text: str) -> Share:
    """The share that "i/n" names.

    Raises:
        ValueError: it names none.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    index, count = map(int, match.groups()) if match else (0, 0)
    if index >= count:
        expected = f"0/{count} to {count - 1}/{count}" if count else "such as 0/64 to 63/64"
        raise ValueError(f"--part {text}: parts are counted from 0; expected {expected}")
    return Share(index, count)
