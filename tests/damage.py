"""Bytes of files, damaged at random."""

import numpy as np


def flipped(rng: np.random.Generator, data: bytes, end: int | None = None) -> bytes:
    """One to eight bytes of the first `end` changed, cut off, repeated or replaced by zeros."""
    out, end = bytearray(data), min(len(data), end or len(data))
    at, length = int(rng.integers(end)), int(rng.integers(1, 9))
    how = rng.integers(4)
    if how == 0:
        for position in rng.integers(0, end, length):
            out[position] = rng.integers(256)
    elif how == 1:
        del out[at:]
    elif how == 2:
        out[at:at] = out[at : at + 40] * int(rng.integers(1, 5))
    else:
        out[at : at + length] = bytes(length)
    return bytes(out)
