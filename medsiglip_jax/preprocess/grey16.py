"""16-bit grey -> 8 bits: which stored values are black, and which are white.

Detectors give 10, 12 or 14 bits, and many writers store these in 16 as they are: an image of 12
bits comes out almost black where all 16 are taken for the range. A file may say what it uses:

* PNG in the chunk sBIT. The standard wants samples scaled up to 16 bits beside it (RFC 2083
  4.2.6), so it counts only where no value needs more bits than it says.
* TIFF in BitsPerSample, or as SMinSampleValue and SMaxSampleValue (TIFF 6.0, page 80). Of
  MaxSampleValue, which shall "not affect the visual appearance" (page 37), the bits count.
"""

import struct
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from medsiglip_jax.preprocess.dicom import grey, samples
from medsiglip_jax.preprocess.facts import UnreadableImage

_MOST = 65535
# Values below this use 14 bits or fewer, and come out darker than a quarter of white.
_DARK = 1 << 14
_BITS, _PHOTOMETRIC, _MAX, _SMIN, _SMAX = 258, 262, 281, 340, 341  # tags of TIFF


class Stated(NamedTuple):
    """The range that a file states.

    Attributes:
        low, high: the stored values that are black and white.
        where: what says so, such as "sBIT".
    """

    low: float
    high: float
    where: str


class Rendered(NamedTuple):
    """Grey levels, uint8 [H, W, 3].

    Attributes:
        pixels: 4 bytes apart.
        seen: how stored values became levels, in words; "" where the whole range was taken.
        dark: whether the image comes out dark, and nothing says that it should.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    seen: str
    dark: bool


def render(
    values: Integer[np.ndarray, "h w"],
    choice: str | None,
    stated: Stated | None = None,
    inverted: bool = False,
) -> Rendered:
    """Grey levels of stored values.

    Args:
        values: as stored.
        choice: "full", all 16 bits; "stretch", from the 0.5th to the 99.5th percentile of the
            image; None, what the file states, or else all 16 bits.
        stated: by the file; ignored where a value contradicts it.
        inverted: whether the least value is white.

    Raises:
        UnreadableImage: values outside of 16 bits, and nothing says what to make of them.
    """
    least, most = int(values.min()), int(values.max())
    dark = False
    if choice == "stretch":
        low, high = map(float, np.quantile(values, grey.PERCENTILES, method="inverted_cdf"))
        words = "percentiles 0.5 and 99.5"
    elif choice is None and stated and stated.low <= least and most <= stated.high:
        (low, high), words = stated[:2], f"as the file says ({stated.where})"
    elif least < 0 or most > _MOST:
        outside = f"32-bit pixels with values {least}..{most}, outside 0..{_MOST}"
        raise UnreadableImage(f"{outside}; window or scale them to uint8 or uint16 first")
    else:
        low, high, words = 0.0, float(_MOST), ""
        dark = choice is None and is_dark(most)
    seen = f"16-bit grey, {low:g} to {high:g}{words and f', {words}'}"
    seen += f", of which values up to {most} are used" if dark else ""

    def shade(x: np.ndarray) -> np.ndarray:
        levels = np.rint(255 * grey.ramp(x, low, high - low)).astype(np.uint8)
        levels = 255 - levels if inverted else levels
        return np.broadcast_to(levels[:, None], (len(x), 3))

    return Rendered(samples.shaded(values, shade), seen if words or dark else "", dark)


def is_dark(most: int) -> bool:
    """Whether an image of 16 bits whose greatest value this is comes out dark, but not black."""
    return 0 < most < _DARK


def stated_by(image: Image.Image) -> Stated | None:
    """The range that an image file states; None if it states none, or has been loaded already."""
    try:
        if image.format == "PNG":
            bits = _significant_bits(image.fp)  # pyright: ignore[reportAttributeAccessIssue]
            return _of_bits(bits, "sBIT")
        return _of_tags(image.tag_v2)  # pyright: ignore[reportAttributeAccessIssue]
    except Exception:  # broken metadata does not make the pixels unreadable
        return None


def is_inverted(image: Image.Image) -> bool:
    """Whether the least value of a 16-bit TIFF is white, which PIL reads as if it were black."""
    return getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0


def _significant_bits(stream: Any) -> int | None:
    """The first byte of sBIT, which precedes the pixels; the position of the stream is kept."""
    position = stream.tell()
    stream.seek(8)
    try:
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"sBIT", b"IDAT"):
                return stream.read(1)[0] if kind == b"sBIT" else None
            stream.seek(length + 4, 1)
    finally:
        stream.seek(position)


def _of_tags(tags: Any) -> Stated | None:
    smallest, greatest, used, bits = (_first(tags.get(n)) for n in (_SMIN, _SMAX, _MAX, _BITS))
    if greatest is not None:
        return Stated(float(smallest or 0), float(greatest), "SMaxSampleValue")
    if used is not None:
        return _of_bits(int(used).bit_length(), "MaxSampleValue")
    return _of_bits(bits, "BitsPerSample")


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _of_bits(bits: int | None, where: str) -> Stated | None:
    """The range of so many bits; None for 16 and more, which is taken where a file says nothing."""
    return Stated(0.0, 2.0**bits - 1, where) if bits and bits < 16 else None
