"""By which rules DICOM becomes pixels: one small object that commands take and record."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from medsiglip_jax.preprocess.names import MIDDLE, frame_number

NAMES = ("dicom", "official")
VOLUMES = ("ct", "percentile")


@dataclass(frozen=True)
class Rules:
    """How DICOM files and NIfTI volumes are read; other files do not ask.

    Attributes:
        name: "dicom": the standard, and CT as in training, three windows as red, green and blue; or
            "official": the pixels of the official container, where it serves the modality.
        ct_window: (width, level) in Hounsfield units: CT in this one window, grey.
        window: which of several windows or VOI LUTs of a file, from 0. Where there is one, that.
        frame: which of several frames or slices, from 0; or "middle". Where there is one, that. A
            source may name another (`preprocess.sources`).
        volume: what the values of NIfTI volumes are, for the files do not say: "ct", Hounsfield
            units, as CT; or "percentile", anything else, from the 0.5th to the 99.5th percentile
            of the volume. None: there are no such files.
    """

    name: str = "dicom"
    ct_window: tuple[int | float, int | float] | None = None
    window: int = 0
    frame: int | str = MIDDLE
    volume: str | None = None

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"DICOM rules {self.name!r}; expected one of {', '.join(NAMES)}")
        one = self.ct_window
        if one is not None and not (len(one) == 2 and all(map(math.isfinite, one)) and one[0] >= 1):
            raise ValueError(f"ct_window is {one!r}; expected (width, level), finite, width >= 1")
        if self.window < 0:
            raise ValueError(f"window is {self.window}; expected a number from 0")
        if self.frame != MIDDLE and not (isinstance(self.frame, int) and self.frame >= 0):
            raise ValueError(f"frame is {self.frame!r}; expected a number from 0, or {MIDDLE!r}")
        if self.volume is not None and self.volume not in VOLUMES:
            raise ValueError(f"volume is {self.volume!r}; expected one of {', '.join(VOLUMES)}")

    def chosen(self, count: int) -> int:
        """The frame that is taken of a file with `count` frames; it may lack that frame."""
        return 0 if count == 1 else frame_number(self.frame, count)

    def check_volume(self) -> None:
        """Raises ValueError if the rules do not say what the values of NIfTI volumes are."""
        if self.volume is None:
            raise ValueError(
                "NIfTI does not say what its values are; expected --volume ct (Hounsfield units) "
                "or --volume percentile (MR and others)"
            )

    def reading(self, frame: int | str | None = None, volume: str | None = None) -> "Rules":
        """The same rules for other files: with that frame, and that content of volumes.

        Raises:
            ValueError: volumes are known to hold something else.
        """
        if volume is not None and self.volume not in (None, volume):
            raise ValueError(f"volume is {volume!r}; these are compared with {self.volume!r}")
        frame, volume = self.frame if frame is None else frame, volume or self.volume
        return replace(self, frame=frame, volume=volume)

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {**asdict(self), "ct_window": self.ct_window and list(self.ct_window)}


def from_dict(found: Mapping[str, Any] | None) -> Rules:
    """The rules that a manifest records; the default ones of one that is older than they are."""
    found = found or {}
    window = found.get("ct_window")
    return Rules(**{**found, "ct_window": window and tuple(window)})


def treatment(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What of recorded rules has to be the same for vectors to be compared: not which frame was
    taken, nor what volumes hold, which both have to say (`features.Provenance`)."""
    if found is None:
        return None
    rules = from_dict(found).to_dict()
    return {name: rules[name] for name in ("name", "ct_window", "window")}


def parse(
    name: str, ct_window: str | None, window: int, frame: str, volume: str | None = None
) -> Rules:
    """Rules of command line flags.

    Args:
        name: of `NAMES`.
        ct_window: "W/L", such as "350/40".
        window, volume: see `Rules`.
        frame: a number from 0, or "middle".

    Raises:
        ValueError: which of them is not so.
    """
    one = None
    if ct_window is not None:
        try:
            width, level = map(float, ct_window.split("/"))
        except ValueError:
            raise ValueError(
                f"CT window {ct_window!r}; expected WIDTH/LEVEL in HU, such as 350/40"
            ) from None
        one = (width, level)
    return Rules(name, one, window, parse_frame(frame), volume)


def parse_frame(text: str) -> int | str:
    """The number, or the name, of a command line flag."""
    return int(text) if text.isdecimal() else text
