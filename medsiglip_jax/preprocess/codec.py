"""A source -> the pixels of its image, augmented and resized; with PIL and numpy."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.augment import Augment, recolour, window
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import Facts, UnreadableImage, describe, within_memory
from medsiglip_jax.preprocess.image import preset


@dataclass(frozen=True)
class Codec:
    """A decoder and a resize. All codecs of a preset give the same pixels, to the bit.

    Attributes:
        decode: bytes -> uint8 [H, W, 3] of any array type that can be sliced; raises as
            `preprocess.decode.decode` does.
        resize: (what `decode` returned, or a numpy array, size) -> uint8 [size, size, 3].
        dicom: how parts of files are read, which have no bytes of their own to decode.
    """

    decode: Callable[[bytes], Any]
    resize: Callable[[Any, int], np.ndarray]
    dicom: Rules = Rules()


def pil_codec(preprocess: str, dicom: Rules = Rules()) -> Codec:
    """PIL and the preset of that name; `dicom` says how DICOM becomes pixels."""
    return Codec(functools.partial(decode, rules=dicom), preset(preprocess), dicom)


def load_image(
    path: str, size: int, codec: Codec, augment: Augment = Augment(), key: tuple[int, ...] = ()
) -> UInt8[np.ndarray, "s s 3"]:
    """Reads, decodes, crops, resizes, flips and colours one image.

    Args:
        path: a source, see `preprocess.names`.
        size: height and width of the result, in pixels.
        codec: decoder and preset.
        augment: none by default; the pixels are then those of `load.load_images`.
        key: of the augmentation.

    Raises:
        UnreadableImage: missing, cut off, not an image; one line with path and reason.
    """
    pixels, _ = sources.read(
        path, rules=codec.dicom, decode=lambda data: (codec.decode(data), Facts())
    )
    height, width = map(int, pixels.shape[:2])
    top, left, h, w = window(augment, height, width, key)
    if (h, w) != (height, width):
        pixels = pixels[top : top + h, left : left + w]
    try:
        with within_memory():
            return recolour(augment, codec.resize(pixels, size), key)
    except UnreadableImage as error:  # a preset refuses it
        raise error.of(describe(path)) from error
