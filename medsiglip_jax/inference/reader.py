"""One image, named or in memory, -> the square that a model's image tower takes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from medsiglip_jax.model.config import VisionConfig
from medsiglip_jax.preprocess import sources, xla
from medsiglip_jax.preprocess.decode import decode_with_facts
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import Facts, within_memory
from medsiglip_jax.preprocess.formats import Format


class Reader:
    """Reads and resizes images for one model, by one preset and one set of rules.

    Attributes:
        size: height and width of the squares; 0 for a model without an image tower.
        rules: how DICOM files, volumes and 16-bit grey become pixels.
    """

    def __init__(self, vision: VisionConfig | None, preset: str, rules: Rules = Rules()):
        resample = vision.pixels.resample if vision else "bicubic"
        self._to_array, self._resize = xla.preset(preset, resample)
        self.size, self.rules = vision.image_size if vision else 0, rules

    def decode(
        self, image: str | bytes, on_format: Callable[[Format], Any] = lambda format: None
    ) -> tuple[UInt8[np.ndarray, "h w 3"], Facts]:
        """The pixels of a source (see `preprocess.names`), or of the content of a file.

        Args:
            image: the source or the content.
            on_format: as for `preprocess.sources.read`; not called for content.

        Raises:
            UnreadableImage, OSError, ModuleNotFoundError: as `preprocess.sources.read`.
        """
        if isinstance(image, str):
            return sources.read(image, self._to_array, self.rules, None, on_format)
        with within_memory():
            return decode_with_facts(image, self._to_array, self.rules)

    def square(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        """Resizes pixels to the size of the model, as the preset says."""
        with within_memory():
            return self._resize(pixels, self.size)
