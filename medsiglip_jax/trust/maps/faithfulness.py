"""Whether a map names what the score depends on: insertion and deletion curves.

Deletion fills the cells of an image (see `cell_side`), those first that the map ranks highest;
insertion puts them in the same order into an image that is nothing but fill (Petsiuk et al. 2018,
arXiv 1806.07421). With a good map the logit rises early while cells come, and falls early while
they go.

Any map does this better than none, so each is measured beside random maps that are as smooth
(2404.01415: most metrics hardly tell methods from chance). They have the map's own spectrum, with
the phases of noise.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy import ndimage

from medsiglip_jax.trust.maps.geometry import by_cells, cell_side
from medsiglip_jax.trust.maps.gradients import LEAST
from medsiglip_jax.trust.maps.targets import Target
from medsiglip_jax.trust.maps.tower import Pixels, Tower

RANDOM_MAPS = 4
_STEPS = 10  # of a curve; fewer where there are fewer cells
FILLS = ("mean", "blur")


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How good a map is.

    Attributes:
        shares: of the cells that were inserted or deleted, 0 to 1.
        insertion, deletion: the logit at each share.
        insertion_minus_deletion: the area between the curves as shares of the way between the
            logits of fill and image (0.1 apart at least), where a curve beyond either counts as
            being there: -1 to 1. A map without any meaning gets 0 on average.
        random_maps: the same of each random map.
    """

    shares: Float64[np.ndarray, " k"]
    insertion: Float64[np.ndarray, " k"]
    deletion: Float64[np.ndarray, " k"]
    insertion_minus_deletion: float
    random_maps: tuple[float, ...]

    @property
    def random(self) -> float:
        """The mean of the random maps."""
        return float(np.mean(self.random_maps))

    @property
    def better(self) -> bool:
        """Whether the map is better than every random map.

        One without any meaning is so with a probability of 1 / 5; of 60 maps of smooth noise, on
        the quickstart's model, 8 were, while 30 were better than the mean of the random maps.
        """
        return self.insertion_minus_deletion > max(self.random_maps)


def fill_of(image: Pixels, fill: str = "mean") -> Pixels:
    """What cells are replaced by: the mean colour of the image, or the image blurred.

    Raises:
        ValueError: `fill` is neither "mean" nor "blur".
    """
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r}; expected {' or '.join(FILLS)}")
    if fill == "mean":
        return np.broadcast_to(image.mean(axis=(0, 1)), image.shape)
    side = len(image) / 8
    return ndimage.gaussian_filter(image, (side, side, 0))


def measure(
    tower: Tower,
    target: Target,
    image: Pixels,
    values: Float[np.ndarray, "s s"],
    fill: str = "mean",
    seed: int = 0,
) -> Faithfulness:
    """Insertion and deletion in ten steps, which with four random maps takes 92 forward passes.

    Args:
        tower: the image tower.
        target: the logit.
        image: as the tower takes it.
        values: the map.
        fill: see `fill_of`.
        seed: the seed of the random maps.
    """
    vision = tower.config.vision
    assert vision is not None
    side = cell_side(vision.image_size, vision.patch_size)
    cells = by_cells(values, side)
    steps = min(_STEPS, cells.size)
    shares = np.linspace(0, 1, steps + 1)
    # Other random maps for other images: chance does not favour the same places in all of them.
    maps = [cells, *random_maps(cells, RANDOM_MAPS, (seed, zlib.crc32(image.tobytes())))]
    kept = [mask for one in maps for mask in _kept(one, shares[1:-1])]
    images = _filled(image, fill_of(image, fill), kept, side)
    whole, empty, *logits = target.logits(tower.embed(images)).astype(np.float64)
    curves = np.array(logits).reshape(len(maps), 2, steps - 1)
    ends = np.broadcast_to([[[empty, whole]], [[whole, empty]]], (len(maps), 2, 1, 2))[:, :, 0]
    curves = np.concatenate([ends[..., :1], curves, ends[..., 1:]], axis=-1)
    low, high = sorted((whole, empty))
    way = np.clip((curves - low) / max(high - low, LEAST), 0, 1)
    own, *random = np.trapezoid(way[:, 0] - way[:, 1], shares).tolist()
    return Faithfulness(shares, curves[0, 0], curves[0, 1], own, tuple(random))


def random_maps(
    values: Float[np.ndarray, "g g"], count: int, seed: int | tuple[int, int]
) -> Iterator[Float[np.ndarray, "g g"]]:
    """Maps with the spectrum of `values`, and so as smooth, with the phases of white noise."""
    spectrum, rng = np.abs(np.fft.fft2(values)), np.random.default_rng(seed)
    for _ in range(count):
        noise = np.fft.fft2(rng.normal(size=values.shape))
        yield np.fft.ifft2(spectrum * noise / np.abs(noise)).real


def _kept(
    values: Float[np.ndarray, "g g"], shares: Float[np.ndarray, " k"]
) -> Iterator[Bool[np.ndarray, "g g"]]:
    """Which cells of the image are there at each step, of the insertion and then the deletion."""
    order = np.argsort(-values, axis=None, kind="stable")
    rank = np.empty(values.size, int)
    rank[order] = np.arange(values.size)
    counts = np.rint(shares * values.size).astype(int)
    inserted = [(rank < count).reshape(values.shape) for count in counts]
    yield from inserted
    yield from (~mask for mask in inserted)


def _filled(image: Pixels, fill: Pixels, kept: Sequence[np.ndarray], side: int) -> Iterator[Pixels]:
    """The image, the fill, and the image with fill where nothing is kept."""
    yield image
    yield np.ascontiguousarray(fill)
    for mask in kept:
        pixels = np.kron(mask, np.ones((side, side), bool))
        missing = len(image) - len(pixels)
        pixels = np.pad(pixels, (0, missing), mode="edge")  # beyond the last cell: no matter
        yield np.where(pixels[..., None], image, fill)
