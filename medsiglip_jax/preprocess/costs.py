"""What decoding an image file takes, judged by its header, before any of it is decoded.

Some formats say "blank, a hundred megapixels" in 30 bytes, and their decoders hold the pixels up to
six times. A file may take more memory and time the more bytes it has; the factors leave room for
ten times the compression that images of anything have.
"""

import io
import struct
from dataclasses import dataclass
from typing import Any

from PIL import Image

from medsiglip_jax.preprocess.dicom import streams
from medsiglip_jax.preprocess.dicom.header import Header
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage

# Bytes per pixel that a decoder takes at its peak, the result included (measured); of others 4.
_PEAK = {"WEBP": 19, "AVIF": 21}
_PROGRESSIVE, _INT32, _GREY_ALPHA = 10, 16, 15
# JPEG 2000: bytes per pixel of the result, and per sample of the tile that is being decoded.
_RESULT, _SAMPLE = 4, 6
_FRAME_SAMPLE = 5  # bytes per sample of a frame of DICOM, by JPEG 2000, the codec that takes most
# What any file may take, for each pixel that `Rules.max_pixels` allows: 1.75 GiB. And for each byte
# that the file has.
_ALLOWED, _PER_BYTE = 10.5, 200
# Pixels that may be gone over, for each that is allowed, and for each byte of the file. Scans of a
# progressive JPEG, and frames before the one that is wanted, each go over all of them.
_PASSES, _PASSED_PER_BYTE = 16, 500
# JPEG 2000 is decoded at 15 million pixels a second, and PIL lets no other thread run meanwhile:
# 6 kB stopped a server for 6 s. The share of the pixels that are allowed which any file may have,
# and how many more for each of its bytes: 500 are 0.016 bits per pixel.
_SLOW_SHARE, _SLOW_PER_BYTE = 1 / 8, 500
_TILE_PART = 14  # bytes of the least that a tile of JPEG 2000 takes (ISO 15444-1 A.4)
_SCAN = b"\xff\xda"  # the marker before each scan of a JPEG


@dataclass(frozen=True)
class Costs:
    """The costs of an image that is open, and not loaded yet."""

    image: Image.Image

    def check(self, rules: Rules) -> None:
        """Refuses an image that takes more memory or time than its file can be worth.

        Raises:
            UnreadableImage: it takes more, or is cut off.
        """
        if (stream := getattr(self.image, "fp", None)) is None:  # it is in memory already
            return
        if self.image.format in ("JPEG2000", "ICNS"):
            needed, length = self._of_jpeg_2000(_content(stream))
        else:
            needed, length = self._peak() * self._pixels, _length(stream)
        if needed > _ALLOWED * rules.max_pixels + _PER_BYTE * length:
            raise UnreadableImage(
                f"{self.image.width}x{self.image.height} {self.image.format} of {length} bytes: "
                f"decoding it takes {needed / 2**30:.1f} GiB (a decompression bomb?); pass a "
                "smaller image, or raise --max-pixels"
            )
        if self.image.format == "JPEG2000":
            self._check_pace(length, rules)
        if self.image.format == "JPEG":
            self.check_passes(_content(stream).count(_SCAN), rules)
        if self.image.format == "TIFF":
            self._check_tiles(rules)

    def check_passes(self, count: int, rules: Rules) -> None:
        """Refuses an image whose pixels are gone over more often than its file can be worth."""
        allowed = _PASSES * rules.max_pixels
        if count * self._pixels <= allowed or (stream := getattr(self.image, "fp", None)) is None:
            return
        if count * self._pixels > allowed + _PASSED_PER_BYTE * _length(stream):
            raise UnreadableImage(
                f"{self.image.width}x{self.image.height} {self.image.format} that has to be decoded"
                f" {count} times over (scans or frames): too much work for its size"
            )

    def _check_pace(self, length: int, rules: Rules) -> None:
        """Refuses an image that takes long, and is so blank that its file can hold nothing."""
        if self._pixels > _SLOW_SHARE * rules.max_pixels + _SLOW_PER_BYTE * length:
            raise UnreadableImage(
                f"{self.image.width}x{self.image.height} JPEG 2000 of {length} bytes: too much "
                "work for its size (a decompression bomb?)"
            )

    @property
    def _pixels(self) -> int:
        return self.image.width * self.image.height

    def _peak(self) -> int:
        """Bytes per pixel."""
        if "progressive" in self.image.info:
            return _PROGRESSIVE
        if any(tile[3] == "LA;16B" for tile in getattr(self.image, "tile", [])):
            return _GREY_ALPHA
        return _INT32 if self.image.mode == "I" else _PEAK.get(str(self.image.format), 4)

    def _of_jpeg_2000(self, data: bytes) -> tuple[int, int]:
        """Bytes that decoding takes, and bytes of the file; also of a stream in other files."""
        at = data.find(streams.SIZ) + len(streams.SIZ) + 4
        if not len(streams.SIZ) + 4 <= at <= len(data) - 34:
            return self._pixels * _RESULT, len(data)
        right, bottom, left, top, width, height, x, y, samples = struct.unpack_from(
            ">8IH", data, at
        )
        across, down = -(-(right - x) // max(1, width)), -(-(bottom - y) // max(1, height))
        tiles = across * down
        if tiles * _TILE_PART > len(data):
            raise UnreadableImage(f"JPEG 2000 of {tiles} tiles, with bytes for fewer: cut off")
        tile = min(width, max(0, right - left)) * min(height, max(0, bottom - top))
        whole = max(self._pixels, max(0, right - left) * max(0, bottom - top))
        return whole * _RESULT + tile * samples * _SAMPLE, len(data)

    def _check_tiles(self, rules: Rules) -> None:
        """Refuses tiles that are larger than images may be: one is decoded as a whole."""
        tags: Any = getattr(self.image, "tag_v2", {})
        width, height = (tags.get(tag) for tag in (322, 323))
        if isinstance(width, int) and isinstance(height, int):
            if width * height > max(2 * self._pixels, rules.max_pixels):
                raise UnreadableImage(f"TIFF with tiles of {width}x{height}, larger than the image")


def check_frame(header: Header, length: int, rules: Rules) -> None:
    """Refuses a compressed frame of DICOM, of `length` bytes, as `Costs.check` does images."""
    pixels = header.rows * header.columns
    needed = pixels * (_RESULT + _FRAME_SAMPLE * header.samples)
    if needed > _ALLOWED * rules.max_pixels + _PER_BYTE * length:
        raise UnreadableImage(
            f"DICOM with a frame of {header.columns}x{header.rows} in {length} bytes: decoding it "
            f"takes {needed / 2**30:.1f} GiB (a decompression bomb?)"
        )


def _length(stream: Any) -> int:
    """Bytes of a file; its position is kept, since plugins of PIL go on from there."""
    position = stream.tell()
    try:
        return stream.seek(0, io.SEEK_END)
    finally:
        stream.seek(position)


def _content(stream: Any) -> bytes:
    """The bytes of a file; its position is kept."""
    position = stream.tell()
    try:
        stream.seek(0)
        return stream.read()
    finally:
        stream.seek(position)
