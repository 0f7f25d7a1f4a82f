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
        slots = [Slot(file, frame) for frame in range(len(planes))]
        series[planes[0].series or file] += slots
    for slots in series.values():
        parts = _by_direction(files, slots)
        result.split += len(parts) > 1
        result.stacks += [_sorted(files, normal, part) for normal, part in parts]
    result.stacks.sort(key=lambda stack: min(stack.slots))
    return result


def _by_direction(
    files: Sequence[Sequence[Plane]], slots: Iterable[Slot]
) -> list[tuple[np.ndarray | None, list[Slot]]]:
    """The frames of a series by their normal, which is None where they have no position."""
    groups: list[tuple[np.ndarray | None, list[Slot]]] = []
    for slot in sorted(slots, key=lambda slot: (_number(files, slot), slot)):
        normal = _normal(files[slot.file][slot.frame])
        same = [of_group for other, of_group in groups if _alike(normal, other)]
        if same:
            same[0].append(slot)
        else:
            groups.append((normal, [slot]))
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


def _sorted(
    files: Sequence[Sequence[Plane]], normal: np.ndarray | None, slots: Sequence[Slot]
) -> Stack:
    numbers = {slot: _number(files, slot) for slot in slots}
    if normal is None:
        order = "instance number" if max(numbers.values()) < np.inf else "name"
        keys = numbers if order == "instance number" else dict.fromkeys(slots, 0.0)
        return Stack(sorted(slots, key=lambda slot: (keys[slot], slot)), order)
    # Less than a thousandth of a millimetre is rounding, not a distance.
    along = {
        slot: round(float(normal @ files[slot.file][slot.frame].position), 3) for slot in slots
    }
    return Stack(sorted(slots, key=lambda s: (along[s], numbers[s], s)), "position")


def _number(files: Sequence[Sequence[Plane]], slot: Slot) -> float:
    number = files[slot.file][slot.frame].number
    return np.inf if number is None else number
