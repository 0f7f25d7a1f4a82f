"""What a tf.data graph asks Python for: which rows a step has, their bytes, and odd pixels."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medsiglip_jax.data import loader
from medsiglip_jax.data.order import Once, Order
from medsiglip_jax.data.tf.kernels import size_of_plain_jpeg
from medsiglip_jax.data.tf.reading import Reader
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.augment import Augment, recolour, window
from medsiglip_jax.preprocess.decode import decode
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import Facts, UnreadableImage, describe, within_memory
from medsiglip_jax.preprocess.image import preset

PADDING = "padding"
_BLANK = np.zeros((1, 1, 3), np.uint8)


@dataclass(frozen=True)
class PixelRows:
    """Everything that determines the pixels of this host's part of every batch.

    Attributes:
        images: the sources of the images, by source of examples.
        order: the order of the rows.
        batch_size: number of rows of the global batch.
        part: (first, last + 1) place of this host in it.
        image_size: height and width of the images, in pixels.
        preprocess: name of a preset.
        resample: how the model's own processor resizes.
        augment: augmentation.
        seed: of the augmentation.
        dicom: how DICOM files become pixels.
        failures: what the methods raised, since TensorFlow passes on the message alone.
        reader: reads the files.
    """

    images: Sequence[Sequence[str]]
    order: Order | Once
    batch_size: int
    part: tuple[int, int]
    image_size: int
    preprocess: str
    resample: str
    augment: Augment
    seed: int
    dicom: Rules
    failures: list[Exception] = field(default_factory=list, compare=False)
    reader: Reader = field(default_factory=Reader, compare=False)

    @classmethod
    def of(
        cls,
        input: loader.Input,
        batch_size: int,
        places: np.ndarray,
        resample: str,
        workers: int | None = None,
    ) -> "PixelRows":
        """The rows of an input at these places of a global batch, read by `workers` threads."""
        images = tuple(source.images for source in input.examples)
        part = int(places[0]), int(places[-1]) + 1
        return cls(
            images, input.order, batch_size, part, input.image_size, input.preprocess, resample,
            input.augment, input.seed, input.dicom, reader=Reader(workers),
        )  # fmt: skip

    def places(self, step: int) -> np.ndarray:
        """Source, epoch and row of every place in a step, int64 [b, 3]; row -1 is padding."""
        positions = int(step) * self.batch_size + np.arange(*self.part)
        return np.stack(self.order.at(positions), axis=1)

    def plan(self, step: np.integer) -> tuple[np.ndarray, np.ndarray]:
        """The paths of a step as bytes, and the places."""
        places = self.places(int(step))
        rows = [(int(source), int(row)) for source, _, row in places]
        paths = [self.images[source][row] if row >= 0 else "" for source, row in rows]
        return np.array([os.fsencode(path) for path in paths], object), places

    def fetch(self, path: bytes, place: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray, bytes]:
        """Reads an image, and decodes what the graph does not.

        Returns:
            The bytes of a plain JPEG, or none; else the cropped pixels, uint8 [h, w, 3]; the window
            that is kept of it; and why it cannot be read.

        Raises:
            Outage: the disk or the network fails.
            Stalled: it does not answer.
        """
        nothing = np.zeros(4, np.int32)
        if place[2] < 0:
            return b"", _BLANK, nothing, PADDING.encode()
        source = os.fsdecode(path)
        opened = functools.partial(_opened, rules=self.dicom)
        read = functools.partial(sources.read, source, rules=self.dicom, decode=opened)
        try:
            image, _ = self.reader(describe(source), read)
        except UnreadableImage as error:
            return b"", _BLANK, nothing, error.reason.encode()
        height, width = image.size if isinstance(image, _Jpeg) else image.shape[:2]
        kept = np.array(window(self.augment, height, width, self._key(place)), np.int32)
        if isinstance(image, _Jpeg):
            return image.data, _BLANK, kept, b""
        return b"", _cropped(image, kept), kept, b""

    def decode(self, data: bytes, kept: np.ndarray) -> tuple[np.ndarray, bytes]:
        """What `fetch` returns of a JPEG that TensorFlow refuses: pixels, or why there are none.

        Raises:
            MemoryError: there is no JPEG, so that the graph failed at pixels that are good.
        """
        if not data:
            raise MemoryError("tf.data failed at an image that was decoded, as without memory")
        try:
            with within_memory():
                return _cropped(decode(data, self.dicom), kept), b""
        except UnreadableImage as error:
            return _BLANK, error.reason.encode()

    def resize(self, pixels: np.ndarray) -> tuple[np.ndarray, bytes]:
        """The preset, or why it refuses the image."""
        try:
            with within_memory():
                return self._preset(pixels, self.image_size), b""
        except UnreadableImage as error:
            return np.zeros((self.image_size, self.image_size, 3), np.uint8), error.reason.encode()

    @functools.cached_property
    def _preset(self) -> Callable[[np.ndarray, int], np.ndarray]:
        return preset(self.preprocess, self.resample)

    def recolour(self, pixels: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The augmentation after the resize."""
        return recolour(self.augment, pixels, self._key(place))

    def _key(self, place: np.ndarray) -> tuple[int, ...]:
        return self.seed, *place.tolist()


@dataclass(frozen=True)
class _Jpeg:
    """A file that the graph decodes, and its height and width."""

    data: bytes
    size: tuple[int, int]


def _opened(data: bytes, rules: Rules) -> tuple[Any, Facts]:
    """A `_Jpeg`, or the pixels of any other image."""
    if size := size_of_plain_jpeg(data, rules):
        return _Jpeg(data, size), Facts()
    return decode(data, rules), Facts()


def _cropped(pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    top, left, height, width = kept.tolist()
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])
