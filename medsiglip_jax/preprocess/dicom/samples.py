"""Stored samples, and functions of one value applied to images through a lookup table."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float64, UInt8

from medsiglip_jax.preprocess.dicom.header import Header

# float64 [k] -> uint8 [k, 3]
Shade = Callable[[np.ndarray], np.ndarray]
_BLOCK = 1 << 16  # values processed at a time


def in_use(pixels: np.ndarray, header: Header, bits: int, high: int) -> np.ndarray:
    """Integers with their sign, and without the bits that are not in use (overlays, rubbish).

    Args:
        pixels: integers; floats are returned unchanged.
        header: whether they are signed, which a codec may also say.
        bits: number of bits in use.
        high: the highest of them.
    """
    size = pixels.dtype.itemsize * 8
    if pixels.dtype.kind == "f" or (bits, high) == (size, size - 1):
        kind = "i" if header.signed and pixels.dtype.kind == "u" else pixels.dtype.kind
        return pixels.view(f"{pixels.dtype.byteorder}{kind}{size // 8}")
    signed = header.signed or pixels.dtype.kind == "i"
    words = pixels.view(f"{pixels.dtype.byteorder}{'i' if signed else 'u'}{size // 8}")
    return (words << (size - 1 - high)) >> (size - bits)  # arithmetic shift: it repeats the sign


def clipped(pixels: np.ndarray, header: Header, bits: int) -> tuple[np.ndarray, bool]:
    """Integers with their sign, of which a codec gives more bits than the file has in use.

    What is beyond the range of Bits Stored, which lossy compression may overshoot, becomes the end
    of that range: without its high bits it would be dark where it is bright.

    Args:
        pixels: integers.
        header: how many bits are in use, and whether they are signed.
        bits: of each value, as the codec says; more than are in use.

    Returns:
        The values, and whether any was beyond the range.
    """
    stored = header.stored
    fits = pixels.dtype.kind == "u" and int(pixels.max()) >> stored == 0
    if fits or header.overlays:
        return in_use(pixels, header, stored, stored - 1), False
    wide = in_use(pixels, header, bits, bits - 1)
    low = -(1 << (stored - 1)) if wide.dtype.kind == "i" else 0
    within = np.clip(wide, low, low + (1 << stored) - 1)
    return within, not np.array_equal(within, wide)


def exceeds(pixels: np.ndarray, header: Header) -> bool:
    """Whether integers laid out as without compression have values beyond Bits Stored.

    Bits above it that are set are no part of a value (PS3.5 8.1.1), unless they repeat its sign.
    """
    size = pixels.dtype.itemsize * 8
    if pixels.dtype.kind == "f" or header.overlays or not header.high + 1 == header.stored < size:
        return False
    unsigned = pixels.view(f"{pixels.dtype.byteorder}u{size // 8}")
    if int(unsigned.max()) >> header.stored == 0:
        return False
    if not header.signed:
        return True
    wide = in_use(pixels, header, size, size - 1)
    narrow = in_use(pixels, header, header.stored, header.high)
    return bool(((wide != narrow) & (unsigned >> header.stored != 0)).any())


def is_padding(stored: np.ndarray, header: Header) -> np.ndarray:
    """Which stored values mark pixels outside of the image."""
    if header.padding is None:
        return np.zeros(stored.shape, bool)
    return (stored >= header.padding[0]) & (stored <= header.padding[1])


def levels(pixels: np.ndarray) -> Float64[np.ndarray, " k"] | None:
    """All values between minimum and maximum, for integers of at most 16 bits; None for others."""
    if pixels.dtype.kind == "f" or pixels.dtype.itemsize > 2:
        return None
    return np.arange(int(pixels.min()), int(pixels.max()) + 1, dtype=np.float64)


def histogram(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and their counts: those of `levels`, or else each pixel by itself."""
    if (values := levels(pixels)) is None:
        return pixels.reshape(-1).astype(np.float64), np.ones(pixels.size, np.int64)
    counts, low = np.zeros(len(values), np.int64), int(values[0])
    for block in _blocks(pixels.reshape(-1)):
        counts += np.bincount(block.astype(np.int32) - low, minlength=len(counts))
    return values, counts


def shaded(pixels: np.ndarray, shade: Shade) -> UInt8[np.ndarray, "h w 3"]:
    """Applies a function of one value to all pixels; the result is 4 bytes apart, as in PIL.

    For integers of at most 16 bits it is computed once per possible value.
    """
    flat, out = pixels.reshape(-1), np.empty(pixels.size, np.uint32)
    values = levels(pixels)
    table, low = (None, 0) if values is None else (_packed(shade(values)), int(values[0]))
    for block, target in zip(_blocks(flat), _blocks(out), strict=True):
        if table is None:
            target[:] = _packed(shade(block.astype(np.float64)))
        else:
            table.take(block.astype(np.int32) - low, out=target, mode="clip")  # unbuffered
    return out.view(np.uint8).reshape(*pixels.shape, 4)[..., :3]


def _blocks(flat: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks that stay in cache, and bound the memory of wider dtypes."""
    for at in range(0, flat.size, _BLOCK):
        yield flat[at : at + _BLOCK]


def _packed(colours: np.ndarray) -> np.ndarray:
    """uint8 [k, 3] as uint32 [k]."""
    packed = np.zeros((len(colours), 4), np.uint8)
    packed[:, :3] = colours
    return packed.view(np.uint32)[:, 0]
