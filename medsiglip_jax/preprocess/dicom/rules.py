"""The rules by which files become pixels: a small object that commands take and record."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from medsiglip_jax.files import settings
from medsiglip_jax.preprocess import facts
from medsiglip_jax.preprocess.names import MIDDLE, frame_number

NAMES = ("dicom", "official")
VOLUMES = ("ct", "percentile")
GREY16 = ("stretch", "full")
# What must be equal for vectors to be compared.
_TREATMENT = ("name", "ct_window", "window", "grey16")
# What a model remembers of its training: these, and what its volumes held.
TRAINED = (*_TREATMENT, "volume")
# What is recorded only where it is not the default: it says which images are read, and changes no
# pixel of one, so that runs from before it existed can be resumed.
_LIMITS = ("max_pixels", "max_side")


@dataclass(frozen=True)
class Rules:
    """How DICOM files, NIfTI volumes and 16-bit grey are read, and which images are too large.

    Attributes:
        name: "dicom" follows the standard, and renders CT as in training, with three windows as
            red, green and blue, where its values are Hounsfield units (`hounsfield`); "official"
            gives the pixels of the official container, for the modalities that it serves.
        ct_window: (width, level) in Hounsfield units: render CT in this one window, grey. With
            "dicom" it is ignored where values are not in these units, which `Facts.seen` says.
        window: which of the file's windows or VOI LUTs, from 0; ignored where there is only one.
        frame: which frame, slice or page, from 0, or "middle", which is the first of pictures such
            as TIFF and GIF; ignored for files of one, and where the source itself names a frame
            (`preprocess.names`).
        volume: what NIfTI volumes hold, since the files do not say: "ct" for Hounsfield units,
            rendered as CT; "percentile" for anything else, rendered from the 0.5th to the 99.5th
            percentile of the volume. None refuses such files.
        grey16: which values of 16-bit grey in PNG, TIFF and arrays are black and white: "stretch",
            the 0.5th and the 99.5th percentile of the image; "full", 0 and 65535. None takes what
            the file says, and where it says nothing 0 and 65535.
        slide_labels: read the LABEL and OVERVIEW images of slides in DICOM, and the label and macro
            pages of those in TIFF, too. They mostly show the patient's name, and are refused
            otherwise.
        max_pixels: images of more pixels are refused.
        max_side: images with a longer side are refused.
    """

    name: str = "dicom"
    ct_window: tuple[int | float, int | float] | None = None
    window: int = 0
    frame: int | str = MIDDLE
    volume: str | None = None
    grey16: str | None = None
    slide_labels: bool = False
    max_pixels: int = facts.MAX_PIXELS
    max_side: int = facts.MAX_SIDE

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"DICOM rules {self.name!r}; expected one of {', '.join(NAMES)}")
        ct = self.ct_window
        if ct is not None and not (len(ct) == 2 and all(map(math.isfinite, ct)) and ct[0] >= 1):
            raise ValueError(f"ct_window is {ct!r}; expected (width, level), finite, width >= 1")
        if self.window < 0:
            raise ValueError(f"window is {self.window}; expected a number from 0")
        if self.frame != MIDDLE and not (isinstance(self.frame, int) and self.frame >= 0):
            raise ValueError(f"frame is {self.frame!r}; expected a number from 0, or {MIDDLE!r}")
        if self.volume is not None and self.volume not in VOLUMES:
            raise ValueError(f"volume is {self.volume!r}; expected one of {', '.join(VOLUMES)}")
        if self.grey16 is not None and self.grey16 not in GREY16:
            raise ValueError(f"grey16 is {self.grey16!r}; expected one of {', '.join(GREY16)}")
        for limit in _LIMITS:
            if getattr(self, limit) < 1:
                raise ValueError(f"{limit} is {getattr(self, limit)}; expected at least 1")

    def check_size(self, width: int, height: int) -> None:
        """Raises UnreadableImage if an image is too large to be read; see `facts.check_size`."""
        facts.check_size(width, height, self.max_pixels, self.max_side)

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
        """The same rules, to read other files: another frame, and what their volumes hold.

        Raises:
            ValueError: `volume` contradicts what these rules already say.
        """
        if volume is not None and self.volume not in (None, volume):
            raise ValueError(f"volume is {volume!r}; the embeddings were made with {self.volume!r}")
        frame, volume = self.frame if frame is None else frame, volume or self.volume
        return replace(self, frame=frame, volume=volume)

    def as_trained(self, trained: "Rules", asked: Collection[str] = ()) -> "Rules":
        """These rules and, where they are the default and not `asked` for by name, those that a
        model was trained with; frames, slide labels and limits of sizes stay."""
        default = {name for name in TRAINED if getattr(self, name) == getattr(Rules(), name)}
        return replace(self, **{name: getattr(trained, name) for name in default - {*asked}})

    def to_dict(self) -> dict[str, Any]:
        """The attributes, as JSON gives them back."""
        usual = {name for name in _LIMITS if getattr(self, name) == getattr(Rules(), name)}
        recorded = {name: value for name, value in asdict(self).items() if name not in usual}
        return {**recorded, "ct_window": self.ct_window and list(self.ct_window)}


def from_dict(recorded: Mapping[str, Any] | None) -> Rules:
    """The rules that a manifest records; default rules for a manifest from before they existed.

    Raises:
        ValueError: all that is wrong with them.
    """
    return settings.build(Rules, recorded or {}, "dicom")


def treatment(recorded: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The part of recorded rules that must be equal for vectors to be compared.

    Which frame was taken does not matter; what volumes hold is compared by `Provenance`.
    """
    if recorded is None:
        return None
    rules = from_dict(recorded).to_dict()
    return {name: rules[name] for name in _TREATMENT}


def parse(
    name: str,
    ct_window: str | None,
    window: int,
    frame: str,
    volume: str | None = None,
    grey16: str | None = None,
    slide_labels: bool = False,
    max_pixels: int = facts.MAX_PIXELS,
    max_side: int = facts.MAX_SIDE,
) -> Rules:
    """The rules that command line flags ask for.

    Args:
        name: one of `NAMES`.
        ct_window: "W/L", such as "350/40".
        window, volume, grey16, slide_labels, max_pixels, max_side: see `Rules`.
        frame: a number from 0, or "middle".

    Raises:
        ValueError: which of them is wrong.
    """
    ct = None
    if ct_window is not None:
        try:
            width, level = map(float, ct_window.split("/"))
        except ValueError:
            raise ValueError(
                f"CT window {ct_window!r}; expected WIDTH/LEVEL in HU, such as 350/40"
            ) from None
        ct = (width, level)
    return Rules(
        name, ct, window, parse_frame(frame), volume, grey16, slide_labels, max_pixels, max_side
    )


def parse_frame(text: str) -> int | str:
    """The frame that a command line flag asks for: a number, or a word such as "middle"."""
    return int(text) if text.isdecimal() else text
