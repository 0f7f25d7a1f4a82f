"""Occlusion (Zeiler and Fergus 2014, arXiv 1311.2901): what a logit loses without a part of the
image."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from medsiglip_jax.trust.maps.targets import Target
from medsiglip_jax.trust.maps.tower import Pixels, Tower

# Sides of the squares, as fractions of the side of the image; they overlap by half.
SIDES = (1 / 8, 1 / 4)

Square = tuple[int, int, int]  # top, left, side


def squares(size: int) -> list[list[Square]]:
    """The squares of each side in `SIDES` that cover an image, 225 and 49 as a rule."""
    scales = []
    for fraction in SIDES:
        side = max(1, round(size * fraction))
        count = 1 + max(0, -(-2 * (size - side) // max(1, side)))
        corners = np.rint(np.linspace(0, size - side, count)).astype(int).tolist()
        scales.append([(top, left, side) for top in corners for left in corners])
    return scales


def occlude(
    tower: Tower, targets: Sequence[Target], image: Pixels
) -> tuple[list[Float[np.ndarray, "s s"]], int]:
    """The maps of one image, one for each target, and how many occluded images were embedded.

    A square that is made mid-grey is worth the logits that are lost, spread evenly over its pixels.
    A pixel has the mean over the squares of one side that hold it, and of these the mean over the
    sides. So the unit is logits per pixel, as that of integrated gradients, but the sum is not
    that of any difference: parts can stand in for each other.

    Args:
        tower: the image tower.
        targets: the logits.
        image: as the tower takes it.
    """
    scales = squares(tower.size)
    places = [square for scale in scales for square in scale]
    z = tower.embed(_occluded(image, tower.grey, places))
    maps = []
    for target in targets:
        logits = target.logits(z).astype(np.float64)
        lost = dict(zip(places, logits[0] - logits[1:], strict=True))
        maps.append(np.mean([_spread(scale, lost, tower.size) for scale in scales], axis=0))
    return maps, len(places)


def _occluded(image: Pixels, grey: Pixels, places: Sequence[Square]) -> Iterator[Pixels]:
    """The image itself, and then with each square in grey."""
    yield image
    for top, left, side in places:
        covered = image.copy()
        part = slice(top, top + side), slice(left, left + side)
        covered[part] = grey[part]
        yield covered


def _spread(places: Sequence[Square], lost: dict[Square, float], size: int) -> np.ndarray:
    total, count = np.zeros((size, size)), np.zeros((size, size))
    for top, left, side in places:
        part = slice(top, top + side), slice(left, left + side)
        total[part] += lost[top, left, side] / side**2
        count[part] += 1
    return total / count
