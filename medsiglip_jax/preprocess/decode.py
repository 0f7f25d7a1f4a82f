"""One image, in whatever form it comes -> uint8 RGB [H, W, 3]: `pil` says what is decided.

Formats that are known by their content, such as DICOM, are read as their row in `formats` says, by
the `Rules` given; everything else is PIL's.
"""

import io
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

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
        item: path (str or PathLike) | bytes | open binary file | PIL.Image.Image | uint8 or uint16
            array or tensor [H,W], [H,W,1], [H,W,2] (grey + alpha), [H,W,3] or [H,W,4], of torch
            also [1,H,W], [3,H,W] or [4,H,W] | a mapping with "bytes" or "path", as Hugging Face's
            `datasets` has images that are not decoded.
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
    given = item
    try:
        item = plain(item)
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
        raise FileNotFoundError(f"{describe(given)}: no such file") from None
    except ModuleNotFoundError:
        raise
    except UnreadableImage as error:
        raise error.of(describe(given)) from None
    except Exception as error:  # PIL plugins raise nearly every type there is on hostile input
        raise UnreadableImage(pil.reason(error), describe(given)) from None


def plain(item: Any) -> Any:
    """What a wrapper holds: an array of a tensor, bytes of an open file, bytes or path of a
    mapping; anything else as it is.

    Raises:
        UnreadableImage: a mapping with neither.
    """
    if isinstance(item, Mapping):
        held = item.get("bytes") or item.get("path")
        if not held:
            raise UnreadableImage(f'{pil.EXPECTED}, or a mapping with "bytes" or "path"')
        return held
    if is_tensor(item):
        return _of_torch(item) if hasattr(item, "detach") else np.asarray(item)
    if hasattr(item, "read"):
        if item.seekable():
            item.seek(0)  # a BytesIO that was just written stands at its end
        return item.read()
    return item


def is_tensor(item: Any) -> bool:
    """Whether this is an array of another library than numpy."""
    other = not isinstance(item, (np.ndarray, np.generic, Image.Image))
    return other and hasattr(item, "__array__") and hasattr(item, "shape")


def _of_torch(tensor: Any) -> np.ndarray:
    """Its channels come first (torchvision.io.read_image), unless they can only come last."""
    pixels = tensor.detach().cpu().numpy()
    first = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] > 4
    return pixels.transpose(1, 2, 0) if first else pixels


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
