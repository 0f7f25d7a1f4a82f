"""Images in whatever form they come -> one uint8 batch at the size of the model."""

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from medsiglip_jax.files.threads import Threads, workers
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.decode import decode_with_facts, is_tensor
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import DARK, Facts, UnreadableImage, describe, within_memory
from medsiglip_jax.preprocess.image import checked_size, preset


def load_images(
    items: Any,
    size: int,
    preprocess: str = "big_vision",
    dicom: Rules = Rules(),
    resample: str = "bicubic",
) -> UInt8[np.ndarray, "n s s 3"]:
    """Decodes and resizes images, in a thread for each core, at most 8; order is kept.

    Args:
        items: one image (a source, see `preprocess.names`, or anything else that `decode` takes),
            a sequence of them, of any kinds, or a batch: uint8 or uint16 array or tensor
            [n, H, W, 3].
        size: height and width of the result, in pixels.
        preprocess: name of a preset: "big_vision", "big_vision_pad", "huggingface" or "serving".
        dicom: how DICOM files become pixels.
        resample: how the model's own processor resizes, which "huggingface" does too.

    Returns:
        uint8 [n, size, size, 3]; [0, size, size, 3] for an empty sequence.

    Raises:
        UnreadableImage: an image that cannot be used, by position and name; also a
            FileNotFoundError if it does not exist.
        OSError: the disk or the network fails, or does not answer in `Limits.read_timeout`.
        ValueError: unknown preset, or a size below 1.

    Warns:
        UserWarning: once each, with the number of images whose EXIF orientation is not upright, of
            DICOM files that say that annotation is burned in, of those with something unusual about
            their values (`Facts.seen`), and of images of 16 bits that come out dark.
    """
    items, resize, size = as_list(items), preset(preprocess, resample), checked_size(size)
    out = np.empty((len(items), size, size, 3), np.uint8)

    def load(i: int) -> Facts:
        try:
            pixels, facts = decoded(items[i], dicom)
            with within_memory():
                out[i] = resize(pixels, size)
        except UnreadableImage as error:
            position = f"image {i + 1} of {len(items)}" if len(items) > 1 else ""
            raise error.of(": ".join(filter(None, (position, error.source)))) from error
        return facts

    with Threads("images", min(8, workers())) as pool:
        facts = list(pool.map(load, range(len(items)), lambda i: describe(items[i])))
    turned, burned_in = sum(f.orientation != 1 for f in facts), sum(f.burned_in for f in facts)
    unusual, dark = sum(f.unusual for f in facts), sum(f.dark for f in facts)
    warn_about_pixels(turned, burned_in, unusual, dark, len(items))
    return out


def warn_about_pixels(turned: int, burned_in: int, unusual: int, dark: int, count: int) -> None:
    """Warns of EXIF orientations that were not applied, of annotation burned into pixels, of DICOM
    files that are unusual, and of dark images.

    Args:
        turned: number of images whose EXIF orientation is not upright.
        burned_in: number of DICOM files that declare burned-in annotation.
        unusual: number of DICOM files with something unusual, `Facts.unusual`.
        dark: number of images of 16 bits that come out dark (`Facts.dark`).
        count: number of all images.
    """
    if turned:
        warnings.warn(
            f"{turned} of {count} images carry an EXIF orientation that is not applied: pixels"
            " are used as stored (PIL.ImageOps.exif_transpose turns an image upright)",
            stacklevel=3,
        )
    if burned_in:
        warnings.warn(
            f"{burned_in} of {count} images are DICOM files that say that annotation, which may"
            " identify people, is burned into their pixels",
            stacklevel=3,
        )
    if unusual:
        warnings.warn(
            f"{unusual} of {count} images are DICOM files with something unusual about their units,"
            " windows, colours or bits; `medsiglip-jax preview` says of each what was done",
            stacklevel=3,
        )
    if dark:
        warnings.warn(f"{dark} of {count} {DARK}", stacklevel=3)


def decoded(item: Any, rules: Rules = Rules()) -> tuple[UInt8[np.ndarray, "h w 3"], Facts]:
    """One of the images that `load_images` takes, at its own size; raises what that raises."""
    if isinstance(item, Mapping) and not item.get("bytes"):
        item = item.get("path") or item  # `decode` says what is wrong
    if isinstance(item, (str, os.PathLike)):
        return sources.read(os.fspath(item), rules=rules)
    return decode_with_facts(item, rules=rules)


def as_list(items: Any) -> list:
    """The images that `load_images` is given, one or several, as a list."""
    if isinstance(items, np.ndarray):
        several = items.ndim == 4 or items.dtype.kind in "OSU"  # a batch, or an array of paths
    elif is_tensor(items):
        several = len(items.shape) in (1, 4)
    elif hasattr(items, "read"):
        several = False
    else:
        single = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, Mapping)
        several = isinstance(items, Iterable) and not isinstance(items, single)
    return list(items) if several else [items]
