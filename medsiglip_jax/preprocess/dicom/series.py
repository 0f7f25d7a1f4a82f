"""Frames of DICOM files -> stacks: the frames of one series and orientation, in spatial order."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# The cosine of 8 degrees. Frames that differ by more, as in a localiser, belong to two stacks.
_SAME_DIRECTION = 0.99


class Plane(NamedTuple):
    """Where a frame lies. It identifies a patient's study, and is never shown.

    Attributes:
        series, uid: UIDs of the series and of the file; "" if the file does not say.
        number: the file's InstanceNumber; None if the file does not say.
        position: of the first pixel, in mm; () if the file does not say.
        orientation: directions of rows and columns; () if the file does not say.
    """

    series: str
    uid: str
    number: float | None
    position: tuple[float, ...]
    orientation: tuple[float, ...]


class Slot(NamedTuple):
    """A frame: the number of its file among those given, and its number in the file."""

    file: int
    frame: int


class Stack(NamedTuple):
    """Frames in order.

    Attributes:
        slots: the frames.
        order: what they are sorted by: "position", "instance number" or "name".
    """

    slots: list[Slot]
    order: str


@dataclass
class Stacks:
    """What `into_stacks` makes of files.

    Attributes:
        stacks: each where its first file was.
        copies: number of files left out because another file is the same instance.
        split: number of series with more than one orientation.
    """

    stacks: list[Stack] = field(default_factory=list)
    copies: int = 0
    split: int = 0


class _Frame(NamedTuple):
    """A frame, in the order in which frames of one place are sorted."""

    number: float
    slot: Slot
    plane: Plane


def into_stacks(files: Sequence[Sequence[Plane]]) -> Stacks:
    """Sorts frames into stacks.

    A stack is sorted by position along its normal, the cross product of the directions of rows and
    columns; frames at one position by instance number, and then by file. Frames without a position
    are a stack of their own, sorted by instance number if they have one, else by file.

    Args:
        files: the frames of each file; a file without frames is not DICOM and is left out.
    """
    result, series = Stacks(), defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for file, planes in enumerate(files):
        if not planes:
            continue
        key = planes[0].series, planes[0].uid
        if all(key) and key in seen:
            result.copies += 1
            continue
        seen.add(key)
        for frame, plane in enumerate(planes):
            number = np.inf if plane.number is None else plane.number
            series[planes[0].series or file].append(_Frame(number, Slot(file, frame), plane))
    for frames in series.values():
        parts = _by_direction(frames)
        result.split += len(parts) > 1
        result.stacks += [_sorted(normal, part) for normal, part in parts]
    result.stacks.sort(key=lambda stack: min(stack.slots))
    return result


def _by_direction(frames: Iterable[_Frame]) -> list[tuple[np.ndarray | None, list[_Frame]]]:
    """The frames of a series by their normal, which is None where they have no position."""
    groups: list[tuple[np.ndarray | None, list[_Frame]]] = []
    for frame in sorted(frames, key=lambda frame: (frame.number, frame.slot)):
        normal = _normal(frame.plane)
        same = [of_group for other, of_group in groups if _alike(normal, other)]
        if same:
            same[0].append(frame)
        else:
            groups.append((normal, [frame]))
    return groups


def _alike(normal: np.ndarray | None, other: np.ndarray | None) -> bool:
    if normal is None or other is None:
        return normal is other
    return bool(normal @ other > _SAME_DIRECTION)


def _normal(plane: Plane) -> np.ndarray | None:
    if not plane.position or not plane.orientation:
        return None
    with np.errstate(all="ignore"):  # directions of a damaged file may be anything
        normal = np.cross(plane.orientation[:3], plane.orientation[3:])
        length = np.linalg.norm(normal)
    return normal / length if 0 < length < np.inf else None


def _sorted(normal: np.ndarray | None, frames: list[_Frame]) -> Stack:
    """Frames that are in the order of their numbers, and those of one number in that of files."""
    if normal is not None:
        # Less than a thousandth of a millimetre is rounding, not a distance.
        along = sorted(frames, key=lambda frame: round(float(normal @ frame.plane.position), 3))
        return Stack([frame.slot for frame in along], "position")
    slots = [frame.slot for frame in frames]
    if frames[-1].number < np.inf:
        return Stack(slots, "instance number")
    return Stack(sorted(slots), "name")
