"""What a request asks to be embedded, whatever its contract calls it."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.serve.errors import INVALID_FIELD, InstanceError

_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[\w.+-]*)*;base64,", re.ASCII)


@dataclass(frozen=True)
class Text:
    """A text."""

    text: str


@dataclass(frozen=True)
class Patch:
    """A rectangle of an image, in its pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Level:
    """A level of a slide's pyramid: by its number, or by what it has to be at least as large as.

    Attributes:
        index: from 0, the finest; negative ones count from the end. Beyond, the nearest there is.
        least: (width, height): the coarsest level that is no smaller, or else the finest.
    """

    index: int = 0
    least: tuple[int, int] | None = None

    def chosen(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Which of the levels with these (width, height), the finest first."""
        count = len(sizes)
        if self.least is None:
            index = self.index + count if self.index < 0 else self.index
            return min(max(index, 0), count - 1)
        width, height = self.least
        enough = [i for i, (w, h) in enumerate(sizes) if w >= width and h >= height]
        return enough[-1] if enough else 0


@dataclass(frozen=True)
class Reading:
    """How an image becomes pixels.

    Attributes:
        preset: of `preprocess.image`.
        rules: of DICOM and others.
        kind: of the rows, "image", or "features" for a classifier that reads others.
    """

    preset: str
    rules: Rules
    kind: str = "image"


@dataclass(frozen=True)
class Picture:
    """An image.

    Attributes:
        content: base64 of a file, or else
        address: where it is fetched from.
        patches: what is embedded instead of the whole image; they may reach beyond it, where they
            are black, if `inside` is false.
        inside: refuse patches that reach beyond the image.
        resized: (width, height) that the image is resized to before it is cut into patches.
        level: of a slide, which is then read at that level; its patches are in pixels of it.
        windowed: the request asks for a window, `reading.rules.ct_window`.
    """

    content: str | None = None
    address: str | None = None
    patches: tuple[Patch, ...] = ()
    inside: bool = True
    resized: tuple[int, int] | None = None
    reading: Reading | None = None
    level: Level | None = None
    windowed: bool = False

    @property
    def rows(self) -> int:
        """How many vectors it gets."""
        return len(self.patches) or 1


@dataclass(frozen=True, eq=False)
class Pixels:
    """An image that is read and resized already."""

    values: UInt8[np.ndarray, "s s 3"]


Instance = Text | Picture | Pixels


def picture(given: str, where: str, reading: Reading | None = None) -> Picture:
    """The picture that a string means: a data URI, an address, or base64.

    Args:
        given: from a request.
        where: its field, for messages.
        reading: how it becomes pixels.
    """
    if given.startswith("data:"):
        if not (start := _DATA_URI.match(given[:200])):
            raise InstanceError(INVALID_FIELD, f"{where}: expected a data URI with ;base64,")
        return Picture(content=given[start.end() :], reading=reading)
    if "://" in given[:32]:
        return Picture(address=given, reading=reading)
    return Picture(content=given, reading=reading)


def decoded(content: str, where: str = "image") -> bytes:
    """The bytes of base64, of either alphabet, with or without padding at the end.

    Raises:
        InstanceError: it is none, or empty.
    """
    try:
        data = content.encode("ascii")
        if b"-" in data or b"_" in data:
            data = data.translate(bytes.maketrans(b"-_", b"+/"))
        content_bytes = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise InstanceError(INVALID_FIELD, f"{where}: expected base64") from None
    if not content_bytes:
        raise InstanceError(INVALID_FIELD, f"{where}: empty")
    return content_bytes
