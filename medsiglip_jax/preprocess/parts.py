"""Which parts of files become rows: a small object that commands take and record."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from medsiglip_jax.preprocess.names import MIDDLE, frame_number

ALL = "all"
_EVERY = re.compile(r"every=([1-9]\d*)")
# Images among those at one place, and what may be asked of them.
_CHOICES = {
    "time": re.compile(r"\d+"),
    "type": re.compile(r"\S(.*\S)?"),
    "b": re.compile(r"\d+(\.\d+)?"),
    "echo": re.compile(r"\d+(\.\d+)?"),
}


@dataclass(frozen=True)
class Parts:
    """Which images are taken from files that hold several; other files ignore it.

    Attributes:
        frame: which frames of a DICOM file or a picture, pages of a TIFF, slices of a NIfTI volume,
            or with `series` slices of a series: a number from 0, "middle" (of pictures and TIFF the
            first), "all", or "every=K" for every K-th, from the first.
            Where a series has several images at one place, also which of them, such as "time=0",
            "type=M", "b=1000" or "echo=4.9", with commas between; these take all slices unless
            one of the former is given, too: "type=M,every=2".
        series: treat DICOM files as slices of their series, in spatial order.
        mpp: micrometres per pixel at which slides are cut into tiles; None leaves them whole.
        slide_mpp: micrometres per pixel of the finest level, of slides that do not record it or
            record another; None takes what they record.
        tissue: minimum tissue fraction of a tile, 0 to 1.
    """

    frame: int | str = MIDDLE
    series: bool = False
    mpp: float | None = None
    slide_mpp: float | None = None
    tissue: float = 0.25

    def __post_init__(self):
        slices = self._slices
        number = isinstance(slices, int) and slices >= 0
        if not (number or slices in (MIDDLE, ALL) or _EVERY.fullmatch(str(slices))):
            expected = f"a number from 0, {MIDDLE!r}, {ALL!r} or 'every=K' with K from 1"
            of_series = "with series also time=N, type=NAME, b=X or echo=MS, with commas between"
            raise ValueError(f"frame is {self.frame!r}; expected {expected}; {of_series}")
        if self.choices and not self.series:
            raise ValueError(
                f"frame is {self.frame!r}; times, types, b-values and echoes are those of a series "
                "of DICOM files: expected --series with it"
            )
        for name in ("mpp", "slide_mpp"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected micrometres per pixel, more than 0")
        if not 0 <= self.tissue <= 1:
            raise ValueError(f"tissue is {self.tissue}; expected a fraction of a tile, 0 to 1")

    @property
    def choices(self) -> dict[str, str]:
        """Which of several images at one place: "time", "type", "b" or "echo" -> what it is."""
        words = [word.partition("=") for word in self._words]
        return {name: value for name, _, value in words if _is_choice(name, value)}

    @property
    def _words(self) -> list[str]:
        return str(self.frame).split(",")

    @property
    def _slices(self) -> int | str:
        """`frame` without `choices`."""
        if isinstance(self.frame, int) or not self.choices:
            return self.frame
        words = [w for w in self._words if not _is_choice(*w.partition("=")[::2])]
        if len(words) + len(self.choices) < len(self._words):
            return str(self.frame)  # one of them is given twice
        slices = ",".join(words) or ALL
        return int(slices) if slices.isdecimal() else slices

    @property
    def step(self) -> int | None:
        """Take every step-th frame; None where one frame of a file is taken."""
        every = _EVERY.fullmatch(str(self._slices))
        return int(every[1]) if every else 1 if self._slices == ALL else None

    @property
    def single_frame(self) -> int | str:
        """The value of `Rules.frame`, for files of which one frame is read."""
        return self._slices if self.step is None else MIDDLE

    def chosen(self, count: int) -> range:
        """Which of `count` frames become rows; none if the frame asked for does not exist."""
        if self.step is not None:
            return range(0, count, self.step)
        first = frame_number(self._slices, count)
        return range(first, min(first + 1, count))

    def to_dict(self) -> dict[str, Any]:
        """The attributes, as JSON gives them back."""
        return asdict(self)


def _is_choice(name: str, value: str) -> bool:
    return name in _CHOICES and bool(_CHOICES[name].fullmatch(value))


class Tiles(NamedTuple):
    """The tiles of a slide.

    Attributes:
        columns: of equal length, which may be 0: int32 `x`, `y`, `level`, `size` of `names.Tile`;
            float32 `mpp`, the resolution after the tile is resized to `slides.TILE` pixels.
        shared: equal for all files of one slide; None where a slide is one file.
    """

    columns: dict[str, np.ndarray]
    shared: str | None
