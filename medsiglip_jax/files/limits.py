"""Where files may be read from, how many bytes of one, and how long reading one may take."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from medsiglip_jax.files import settings

# Local disks, and what the README names.
PROTOCOLS = frozenset(("file", "local", "gs", "https", "http", "hf"))


class TooLarge(ValueError):
    """An object has more bytes than may be read into memory."""


class TooSlow(Exception):
    """A server does not answer, or stops, or is too slow.

    No OSError, and no error of aiohttp: aiohttp would turn the former into others, and gcsfs try
    again after the latter.
    """


@dataclass(frozen=True)
class Limits:
    """What is read from other machines, and how long it may take to read a file from anywhere.

    Attributes:
        protocols: names of the protocols that are used; others are refused.
        max_bytes: of an object that is read into memory as a whole, such as an image or a CSV file,
            after decompression. Parquet tables, shards and checkpoints are read in parts and may be
            larger.
        timeout: seconds in which an answer has to begin, and in which at least one more part of it
            has to arrive. An answer as a whole may take longer, see `web.SLOWEST`.
        read_timeout: seconds in which one input has to be read and decoded, from wherever it is; 0
            is no limit. What takes longer is a disk or a mount that is gone, see `threads.Stalled`.
    """

    protocols: frozenset[str] = PROTOCOLS
    max_bytes: Annotated[int, settings.at_least(1)] = 512 << 20
    timeout: Annotated[float, settings.more_than(0)] = 60.0
    read_timeout: Annotated[float, settings.at_least(0)] = 600.0

    def __post_init__(self):
        settings.verify(self)


# One value for the process, as the umask is: a name leads to bytes in some thirty places and in
# threads of other libraries, which a parameter or a context variable would not reach.
_limits = Limits()


def current() -> Limits:
    """The limits that hold now."""
    return _limits


def keep(limits: Limits) -> None:
    """Sets the limits of this process for good."""
    global _limits
    _limits = limits


@contextlib.contextmanager
def use(limits: Limits) -> Iterator[None]:
    """Sets the limits of this process until the end of the block."""
    before = _limits
    keep(limits)
    try:
        yield
    finally:
        keep(before)


def allow(protocol: str) -> None:
    """Adds a protocol to the current limits, for file systems that are registered here."""
    global _limits
    _limits = replace(_limits, protocols=_limits.protocols | {protocol})


def parse(
    protocols: str | None,
    max_bytes: int | None,
    timeout: float | None,
    read_timeout: float | None = None,
) -> Limits:
    """The current limits, with what the flags say in place of them.

    Args:
        protocols: further ones, with commas between them, such as "s3" or "s3,ftp".
        max_bytes, timeout, read_timeout: as for `Limits`; None leaves what holds now.

    Raises:
        ValueError: a number that is too small, or a name that no protocol can have.
    """
    names = {name.strip().removesuffix("://") for name in (protocols or "").split(",")} - {""}
    if wrong := sorted(name for name in names if not name.replace("+", "").isalnum()):
        raise ValueError(f"--protocols {wrong[0]}: expected names such as s3, with commas between")
    given = {"max_bytes": max_bytes, "timeout": timeout, "read_timeout": read_timeout}
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(_limits, protocols=_limits.protocols | names, **changes)
