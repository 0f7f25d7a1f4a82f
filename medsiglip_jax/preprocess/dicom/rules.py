"""By which rules DICOM becomes pixels: one small object that commands take and record."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NAMES = ("dicom", "official")
MIDDLE = "middle"


@dataclass(frozen=True)
class Rules:
    """How DICOM files are read; other files do not ask.

    Attributes:
        name: "dicom": the standard, and CT as in training, three windows as red, green and blue; or
            "official": the pixels of the official container, where it serves the modality.
        ct_window: (width, level) in Hounsfield units: CT in this one window, grey.
        window: which of several windows or VOI LUTs of a file, from 0. Where there is one, that.
        frame: which of several frames, from 0; or "middle". Where there is one, that.
    """

    name: str = "dicom"
    ct_window: tuple[int | float, int | float] | None = None
    window: int = 0
    frame: int | str = MIDDLE

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"DICOM rules {self.name!r}; expected one of {', '.join(NAMES)}")
        if self.ct_window is not None and not (len(self.ct_window) == 2 and self.ct_window[0] >= 1):
            raise ValueError(
                f"ct_window is {self.ct_window!r}; expected (width, level), width >= 1"
            )
        if self.window < 0:
            raise ValueError(f"window is {self.window}; expected a number from 0")
        if self.frame != MIDDLE and not (isinstance(self.frame, int) and self.frame >= 0):
            raise ValueError(f"frame is {self.frame!r}; expected a number from 0, or {MIDDLE!r}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {**asdict(self), "ct_window": self.ct_window and list(self.ct_window)}


def from_dict(found: Mapping[str, Any] | None) -> Rules:
    """The rules that a manifest records; the default ones of one that is older than they are."""
    found = found or {}
    window = found.get("ct_window")
    return Rules(**{**found, "ct_window": window and tuple(window)})


def parse(name: str, ct_window: str | None, window: int, frame: str) -> Rules:
    """Rules of command line flags.

    Args:
        name: of `NAMES`.
        ct_window: "W/L", such as "350/40".
        window: see `Rules`.
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
    return Rules(name, one, window, int(frame) if frame.isdecimal() else frame)
