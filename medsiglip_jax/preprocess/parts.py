"""Which parts of files are rows: one small object that commands take and record."""

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
    """What is made of files that hold more than one image; other files do not ask.

    Attributes:
        frame: of the frames of a DICOM file, the slices of a NIfTI volume, and with `series` those
            of a series: a number from 0, "middle", "all", or "every=K", the first of each K.
        series: DICOM files are slices of their series, in the order of their places.
        mpp: micrometres per pixel at which slides are cut into tiles; None leaves them whole.
        slide_mpp: of the finest level of slides that do not say it.
        tissue: least share of tissue in a tile, 0 to 1.
    """

    frame: int | str = MIDDLE
    series: bool = False
    mpp: float | None = None
    slide_mpp: float | None = None
    tissue: float = 0.25

    def __post_init__(self):
        number = isinstance(self.frame, int) and self.frame >= 0
        if not (number or self.frame in (MIDDLE, ALL) or _EVERY.fullmatch(str(self.frame))):
            raise ValueError(
                f"frame is {self.frame!r}; expected a number from 0, {MIDDLE!r}, {ALL!r} or "
                "'every=K' with K from 1"
            )
        for name in ("mpp", "slide_mpp"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected micrometres per pixel, more than 0")
        if not 0 <= self.tissue <= 1:
            raise ValueError(f"tissue is {self.tissue}; expected a share of a tile, 0 to 1")

    @property
    def step(self) -> int | None:
        """Each how-manieth frame is a row; None where one frame of a file is."""
        found = _EVERY.fullmatch(str(self.frame))
        return int(found[1]) if found else 1 if self.frame == ALL else None

    @property
    def one(self) -> int | str:
        """The frame of a file that is one row, as `Rules` have it."""
        return self.frame if self.step is None else MIDDLE

    def chosen(self, count: int) -> range:
        """Numbers of the frames that are rows, of so many; none where the one asked for is not."""
        if self.step is not None:
            return range(0, count, self.step)
        first = frame_number(self.frame, count)
        return range(first, min(first + 1, count))

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return asdict(self)


class Tiles(NamedTuple):
    """The tiles of a slide.

    Attributes:
        columns: of one length: int32 `x`, `y`, `level`, `size`, of `read`; float32 `mpp`, the
            resolution of the tile in `TILE` pixels. They may be empty.
        shared: the same for all files of one slide; None where that is one file.
    """

    columns: dict[str, np.ndarray]
    shared: str | None
