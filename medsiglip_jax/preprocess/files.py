"""A path or URI -> the pixels of its image, augmented and resized. PIL and numpy."""

import errno
import functools
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from medsiglip_jax import opener
from medsiglip_jax.preprocess.augment import Augment, recolour, window
from medsiglip_jax.preprocess.decode import UnreadableImage, decode, describe
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import preset

_RANGE = re.compile(r"(.*)#(\d+):(\d+)", re.DOTALL)


# What the system says of one file, and not of the disk it lies on.
_OF_THE_FILE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
)
# Seconds between tries of a network that fails.
_PAUSES = (0.5, 2.0, 8.0)


class Outage(OSError):
    """Reading failed for a reason that lies not in the file; it may work when tried again."""


@dataclass(frozen=True)
class Codec:
    """Who decodes and who resizes; whoever it is, the pixels are the same to the bit.

    Attributes:
        decode: bytes -> uint8 [H, W, 3] of any array type that can be sliced; raises as
            `preprocess.decode.decode` does.
        resize: (what `decode` made, size) -> uint8 [size, size, 3].
    """

    decode: Callable[[bytes], Any]
    resize: Callable[[Any, int], np.ndarray]


def pil_codec(preprocess: str, dicom: Rules = Rules()) -> Codec:
    """PIL, and the preset of that name; DICOM by these rules."""
    return Codec(functools.partial(decode, rules=dicom), preset(preprocess))


def load_image(
    path: str,
    size: int,
    codec: Codec,
    augment: Augment = Augment(),
    key: tuple[int, ...] = (),
) -> UInt8[np.ndarray, "s s 3"]:
    """Reads, decodes, crops, resizes, flips and colours one image.

    Args:
        path: local path or URI; "path#offset:length" is that range of the bytes of a file.
        size: height and width of the result, in pixels.
        codec: decoder and preset.
        augment: by default none, and then the pixels are those of `image.load_images`.
        key: of the augmentation.

    Raises:
        UnreadableImage: missing, cut off, not an image; one line with path and reason.
    """
    data = b""
    try:
        data = read_bytes(path)
        pixels = codec.decode(data)
        height, width = map(int, pixels.shape[:2])
        top, left, h, w = window(augment, height, width, key)
        if (h, w) != (height, width):
            pixels = pixels[top : top + h, left : left + w]
        return recolour(augment, codec.resize(pixels, size), key)
    except UnreadableImage as error:
        reason = str(error).removeprefix(f"{describe(data)}: ")
        raise UnreadableImage(f"{describe(path)}: {reason}") from error


def read_bytes(path: str) -> bytes:
    """The content of a file, or of the part of it that "path#offset:length" names.

    Raises:
        UnreadableImage: there is no such file, or it may not be read; the reason, without the path.
        Outage: the disk or the network fails, which says nothing about the file.
    """
    match = None if os.path.exists(path) else _RANGE.fullmatch(path)
    file, start, length = (match[1], int(match[2]), int(match[3])) if match else (path, 0, None)
    try:
        data = _patiently(file, start, length) if "://" in file else _read(file, start, length)
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except IsADirectoryError:
        raise UnreadableImage("a folder") from None
    except OSError as error:
        if isinstance(error, Outage) or error.errno not in _OF_THE_FILE:
            raise Outage(f"{describe(path)}: cannot be read: {error.strerror or error}") from error
        raise UnreadableImage(error.strerror or str(error)) from None
    if length is not None and len(data) < length:
        raise UnreadableImage(f"the file ends before byte {start + length}")
    return data


def _read(file: str, start: int, length: int | None) -> bytes:
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):  # a pipe or device may never end
        raise UnreadableImage("a folder" if stat.S_ISDIR(mode) else "not a file")
    with open(file, "rb") as stream:
        stream.seek(start)
        return stream.read(length)


def _patiently(file: str, start: int, length: int | None) -> bytes:
    for pause in (*_PAUSES, None):
        try:
            return _read_remote(file, start, length)
        except (FileNotFoundError, IsADirectoryError):
            raise
        except Exception as error:  # remote file systems raise types of their own
            if pause is None:
                reason = " ".join(str(error).split())[:200]
                raise Outage(f"{type(error).__name__}: {reason}") from error
            time.sleep(pause)
    raise AssertionError


def _read_remote(file: str, start: int, length: int | None) -> bytes:
    system, name = opener.file_system(file)
    if length is None:
        return system.cat_file(name)
    return system.cat_file(name, start=start, end=start + length)  # one request
