"""Random crop, flip and colour as pure functions of a key: no generator to save or to share.

The key is (seed, source, epoch, row). Cropping comes before the resize, flip and colour after it,
on uint8, so both input pipelines share this file to the bit. Numpy only.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

_ATTEMPTS = 10
_LOG_ASPECT = math.log(4 / 3)
# ITU-R 601, what PIL's convert("L") and torchvision use.
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Augment:
    """What may happen to a training image; nothing by default.

    Attributes:
        crop: (smallest, largest) share of the image's area, in (0, 1]; aspect ratio 3/4 to 4/3, as
            in big_vision's `inception_crop` (pp/ops_image.py:158).
        flip: left-right in half of the cases. Off by default: a flipped chest has its heart on the
            wrong side, and the caption still says "left".
        colour: strength of brightness, contrast and saturation jitter, 0 (none) to 1: each is
            multiplied by a factor from [1 - colour, 1 + colour].
    """

    crop: tuple[float, float] | None = None
    flip: bool = False
    colour: float = 0.0

    def __post_init__(self):
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop is {self.crop}, expected 0 < smallest <= largest <= 1 (area)")
        if not 0 <= self.colour <= 1:
            raise ValueError(f"colour is {self.colour}, expected 0 (none) to 1")


def window(
    augment: Augment, height: int, width: int, key: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """The part of an image to keep: (top, left, h, w); all of it where no crop fits."""
    if augment.crop is None:
        return 0, 0, height, width
    low, high = augment.crop
    for area, shape, y, x in _draws(key, 0).random((_ATTEMPTS, 4)).tolist():
        pixels = height * width * (low + (high - low) * area)
        aspect = math.exp(_LOG_ASPECT * (2 * shape - 1))
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 1 <= h <= height and 1 <= w <= width:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    return 0, 0, height, width


def recolour(
    augment: Augment, image: UInt8[np.ndarray, "h w 3"], key: tuple[int, ...]
) -> UInt8[np.ndarray, "h w 3"]:
    """Flips and jitters the colours of a resized image; `image` itself if neither is asked."""
    if not (augment.flip or augment.colour):
        return image
    flip, *factors = _draws(key, 1).random(4)
    if augment.flip and flip < 0.5:
        image = image[:, ::-1]
    if augment.colour:
        image = _jitter(image, *(1 + augment.colour * (2 * np.float32(f) - 1) for f in factors))
    return image


def _jitter(
    image: np.ndarray, brightness: np.float32, contrast: np.float32, saturation: np.float32
) -> np.ndarray:
    """The three in turn in float32, clipped and rounded once at the end."""
    pixels = image.astype(np.float32) * brightness
    mean = _grey(pixels).mean(dtype=np.float64).astype(np.float32)
    pixels = mean + (pixels - mean) * contrast
    grey = _grey(pixels)[..., None]
    pixels = grey + (pixels - grey) * saturation
    return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def _grey(pixels: np.ndarray) -> np.ndarray:
    # Term by term: a matrix product may sum in another order on another machine.
    return pixels[..., 0] * _GREY[0] + pixels[..., 1] * _GREY[1] + pixels[..., 2] * _GREY[2]


def _draws(key: tuple[int, ...], purpose: int) -> np.random.Generator:
    return np.random.default_rng((1 + purpose, *key))
