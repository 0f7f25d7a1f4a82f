"""Frames of DICOM files -> stacks: those of one series and orientation, in the order of places."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# The cosine of 8 degrees: frames that differ more, as those of a localiser do, are of two stacks.
_SAME_DIRECTION = 0.99


class Plane(NamedTuple):
    """Where a frame belongs. It says whose it is, and is never shown.

    Attributes:
        series, uid: of series and file, "" if it does not say.
        number: of the file in its series, as its maker counts.
        position: of the first pixel, in mm; () if the file does not say.
        orientation: directions of its rows and columns, likewise.
    """

    series: str
    uid: str
    number: float | None
    position: tuple[float, ...]
    orientation: tuple[float, ...]


class Slot(NamedTuple):
    """A frame: number of its file among those given, and of the frame in the file."""

    file: int
    frame: int


@dataclass
class Stack:
    """Frames in order.

    Attributes:
        slots: the frames.
        order: what they are sorted by: "position", "instance number" or "name".
    """

    slots: list[Slot]
    order: str


@dataclass
class Stacks:
    """All of them, each where its first file was.

    Attributes:
        found: the stacks.
        copies: files left out, for another one is the same instance.
        split: series with more than one orientation.
    """

    found: list[Stack] = field(default_factory=list)
    copies: int = 0
    split: int = 0


def stacks(files: Sequence[Sequence[Plane]]) -> Stacks:
    """Sorts frames into stacks.

    Within a stack they are in the order of their positions along its normal, the cross product of
    the directions of rows and columns; at one place in that of their numbers, and of the files.
    Frames without a place are a stack, in the order of instance numbers or else of the files.

    Args:
        files: the frames of each file; files without any are no DICOM, and left out.
    """
    done, series = Stacks(), defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for file, planes in enumerate(files):
        if not planes:
            continue
        key = planes[0].series, planes[0].uid
        if all(key) and key in seen:
            done.copies += 1
            continue
        seen.add(key)
        slots = [Slot(file, frame) for frame in range(len(planes))]
        series[planes[0].series or file] += slots
    for slots in series.values():
        parts = _by_direction(files, slots)
        done.split += len(parts) > 1
        done.found += [_sorted(files, normal, part) for normal, part in parts]
    done.found.sort(key=lambda stack: min(stack.slots))
    return done


def _by_direction(
    files: Sequence[Sequence[Plane]], slots: Iterable[Slot]
) -> list[tuple[np.ndarray | None, list[Slot]]]:
    """Frames of a series with one normal each, which is None where they have no place."""
    groups: list[tuple[np.ndarray | None, list[Slot]]] = []
    for slot in sorted(slots, key=lambda slot: (_number(files, slot), slot)):
        normal = _normal(files[slot.file][slot.frame])
        found = next((group for group in groups if _alike(normal, group[0])), None)
        if found is None:
            groups.append((normal, [slot]))
        else:
            found[1].append(slot)
    return groups


def _alike(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return bool(one @ other > _SAME_DIRECTION)


def _normal(plane: Plane) -> np.ndarray | None:
    if not plane.position or not plane.orientation:
        return None
    with np.errstate(all="ignore"):  # of directions that are none
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
    # A thousandth of a millimetre is no distance, but what rounding makes of none.
    along = {
        slot: round(float(normal @ files[slot.file][slot.frame].position), 3) for slot in slots
    }
    return Stack(sorted(slots, key=lambda s: (along[s], numbers[s], s)), "position")


def _number(files: Sequence[Sequence[Plane]], slot: Slot) -> float:
    number = files[slot.file][slot.frame].number
    return np.inf if number is None else number
