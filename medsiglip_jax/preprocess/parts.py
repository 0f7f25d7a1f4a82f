"""Which parts of files become rows: a small object that commands take and record."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from medsiglip_jax.preprocess.names import MIDDLE, frame_number

ALL = "all"
_EVERY = re.compile(r"every=([1-9]\d*)")


@dataclass(frozen=True)
class Parts:
    """Which images are taken from files that hold several; other files ignore it.

    Attributes:
        frame: which frames of a DICOM file or a picture, pages of a TIFF, slices of a NIfTI volume,
            or with `series` slices of a series: a number from 0, "middle" (of pictures and TIFF the
            first), "all", or "every=K" for every K-th, from the first.
        series: treat DICOM files as slices of their series, in spatial order.
        mpp: micrometres per pixel at which slides are cut into tiles; None leaves them whole.
        slide_mpp: micrometres per pixel of the finest level, for slides that do not record it.
        tissue: minimum tissue fraction of a tile, 0 to 1.
    """

    frame: int | str = MIDDLE
    series: bool = False
    mpp: float | None = None
    slide_mpp: float | None = None
    tissue: float = 0.25

    def __post_init__(self):
        number = isinstance(self.frame, int) and self.frame >= 0
        if not (number or self.frame in (MIDDLE, ALL) or _EVERY.fullmatch(str(self.frame))):
            expected = f"a number from 0, {MIDDLE!r}, {ALL!r} or 'every=K' with K from 1"
            raise ValueError(f"frame is {self.frame!r}; expected {expected}")
        for name in ("mpp", "slide_mpp"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected micrometres per pixel, more than 0")
        if not 0 <= self.tissue <= 1:
            raise ValueError(f"tissue is {self.tissue}; expected a fraction of a tile, 0 to 1")

    @property
    def step(self) -> int | None:
        """Take every step-th frame; None where one frame of a file is taken."""
        every = _EVERY.fullmatch(str(self.frame))
        return int(every[1]) if every else 1 if self.frame == ALL else None

    @property
    def single_frame(self) -> int | str:
        """What `Rules.frame` is, for files of which one frame is read."""
        return self.frame if self.step is None else MIDDLE

    def chosen(self, count: int) -> range:
        """Which of `count` frames become rows; none if the frame asked for does not exist."""
        if self.step is not None:
            return range(0, count, self.step)
        first = frame_number(self.frame, count)
        return range(first, min(first + 1, count))

    def to_dict(self) -> dict[str, Any]:
        """As JSON restores it."""
        return asdict(self)


class Tiles(NamedTuple):
    """The tiles of a slide.

    Attributes:
        columns: of equal length, which may be 0: int32 `x`, `y`, `level`, `size` of `names.Tile`;
            float32 `mpp`, the resolution after the tile is resized to `slides.TILE` pixels.
        shared: equal for all files of one slide; None where a slide is one file.
    """

    columns: dict[str, np.ndarray]
    shared: str | None
