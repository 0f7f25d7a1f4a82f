"""One image, in whatever form it comes -> uint8 RGB [H, W, 3]: `pil` says what is decided.

Formats that are known by their content, such as DICOM, are read as their row in `formats` says, by
the `Rules` given; everything else is PIL's.
"""

import io
import os
import warnings
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from medsiglip_jax.preprocess import formats, pil
from medsiglip_jax.preprocess.bytes import check_regular
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import (
    DARK,
    NIFTI_PAIR,
    Facts,
    UnreadableImage,
    describe,
    is_nifti_header,
)
from medsiglip_jax.preprocess.pil import ToArray


def decode(
    item: Any, rules: Rules = Rules(), to_array: ToArray = np.asarray
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes one image to RGB.

    Args:
        item: path (str or PathLike) | bytes | PIL.Image.Image | uint8 or uint16 array [H,W],
            [H,W,1], [H,W,2] (grey + alpha), [H,W,3] or [H,W,4].
        rules: how DICOM and 16-bit grey become pixels.
        to_array: PIL image of mode RGB -> uint8 [H, W, 3].

    Returns:
        uint8 [H, W, 3], 0..255; may be read-only or share memory with `item`.

    Raises:
        FileNotFoundError: the path does not exist.
        UnreadableImage: anything else that keeps it from being an image: truncated, corrupt, empty,
            not an image, a folder, more than `facts.MAX_PIXELS` pixels (refused before decoding),
            float or 32-bit pixels without an agreed range, or an unsupported type of `item`.
        ModuleNotFoundError: the package that reads this format is not installed, so no other file
            of the format can be read, either.

    Warns:
        UserWarning: the image comes out dark (`Facts.dark`).
    """
    pixels, facts = decode_with_facts(item, to_array, rules)
    if facts.dark:
        warnings.warn(f"some {DARK}", stacklevel=2)
    return pixels


def decode_with_facts(
    item: Any, to_array: ToArray = np.asarray, rules: Rules = Rules()
) -> tuple[UInt8[np.ndarray, "h w 3"], Facts]:
    """Decodes one image and says what the pixels do not show.

    Args:
        item: as for `decode`.
        to_array: PIL image of mode RGB -> uint8 [H, W, 3].
        rules: how DICOM and 16-bit grey become pixels.

    Returns:
        The pixels as stored (uint8 [H, W, 3]), and facts.

    Raises:
        FileNotFoundError, UnreadableImage, ModuleNotFoundError: as for `decode`.
    """
    try:
        if isinstance(item, np.ndarray):
            return pil.from_array(item, rules)
        if isinstance(item, Image.Image):
            return pil.from_image(item, to_array, rules)
        if isinstance(item, (bytes, bytearray, memoryview)):
            return _from_stream(io.BytesIO(item), to_array, rules)
        if isinstance(item, (str, os.PathLike)):
            check_regular(item)
            with open(item, "rb") as stream:
                return _from_stream(stream, to_array, rules)
        raise UnreadableImage(pil.EXPECTED)
    except FileNotFoundError:
        raise FileNotFoundError(f"{describe(item)}: no such file") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # PIL plugins raise nearly every type there is on hostile input
        raise UnreadableImage(_reason(error), describe(item)) from error


def _from_stream(
    stream: io.BytesIO | io.BufferedReader, to_array: ToArray, rules: Rules
) -> tuple[np.ndarray, Facts]:
    start = stream.read(348)
    format = formats.by_content(start[: formats.START])
    stream.seek(0)
    if format is formats.PICTURES:
        if is_nifti_header(start):
            raise UnreadableImage(NIFTI_PAIR)
        return pil.from_stream(stream, to_array, rules)
    opened = format.load().open_bytes(stream.read())
    pixels, facts = opened.render(rules.chosen(opened.frames), rules)
    return pil.spread(pixels, to_array), facts


def _reason(error: Exception) -> str:
    if isinstance(error, UnreadableImage):
        return error.reason
    if isinstance(error, Image.DecompressionBombError):  # of a frame or tile inside the file
        return f"more pixels than PIL allows: {error}"
    if isinstance(error, UnidentifiedImageError):
        return "not an image file PIL can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:200] or "no further detail"
    return f"corrupt or unsupported image ({type(error).__name__}: {text})"
