"""Frames of DICOM files -> stacks: the frames of one series and orientation, in spatial order.

Where a series has several images at one place (times, magnitude and phase, b-values, echoes), each
kind of them is a stack.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# Types that are named in messages, and how many b-values and echo times are.
_NAMED = ("M", "P", "R", "I", "ORIGINAL", "DERIVED", "ADC", "TRACEW", "FA", "SECONDARY")
_SHOWN = 8
_SAME_VALUE = 0.05  # s/mm2 or ms: b-values and echo times are rounded when they are given
# The cosine of 8 degrees. Frames that differ by more, as in a localiser, belong to two stacks.
_SAME_DIRECTION = 0.99


class Kind(NamedTuple):
    """What tells images at one place apart.

    Attributes:
        types: Image Type, and the parts of its values: "M" of magnitude, "P" of phase.
        b: b-value of diffusion, in s/mm2; None if the file does not say.
        echo: echo time in ms; None if the file does not say.
        times: what may number the times: temporal position, trigger time and others.
        time: the number of the time, from 0.
    """

    types: frozenset[str] = frozenset()
    b: float | None = None
    echo: float | None = None
    times: tuple[float | None, ...] = ()
    time: int = 0

    def has(self, choices: Mapping[str, str]) -> bool:
        """Whether it is one of those asked for, as `Parts.choices` has them."""
        return all(
            value.upper() in self.types if name == "type"
            else (own := getattr(self, name)) is not None and abs(own - float(value)) < _SAME_VALUE
            for name, value in choices.items()
        )  # fmt: skip


class Plane(NamedTuple):
    """Where a frame lies. It identifies a patient's study, and is never shown.

    Attributes:
        series, uid: UIDs of the series and of the file; "" if the file does not say.
        number: the file's InstanceNumber; None if the file does not say.
        position: of the first pixel, in mm; () if the file does not say.
        orientation: directions of rows and columns; () if the file does not say.
        kind: what tells it from others at its place.
    """

    series: str
    uid: str
    number: float | None
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    kind: Kind = Kind()


class Slot(NamedTuple):
    """A frame: the number of its file among those given, and its number in the file."""

    file: int
    frame: int


class Stack(NamedTuple):
    """Frames in order.

    Attributes:
        slots: the frames.
        order: what they are sorted by: "position", "instance number" or "name".
        kind: what all of them are.
        places: equal for the stacks whose images lie at the same places.
        extent: the number of these places.
    """

    slots: list[Slot]
    order: str
    kind: Kind = Kind()
    places: int = 0
    extent: int = 0


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


def into_stacks(files: Sequence[Sequence[Plane]], by_time: bool = False) -> Stacks:
    """Sorts frames into stacks.

    A stack is sorted by position along its normal, the cross product of the directions of rows and
    columns. It has one image at each place: where a series has more, they are told apart by type,
    b-value and echo time, and then by time. Times of a single place are one stack, in their order.
    Frames without a position are a stack of their own, sorted by instance number if they have one,
    else by file.

    Args:
        files: the frames of each file; a file without frames is not DICOM and is left out.
        by_time: keep the times of a single place apart, too.
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
        for normal, part in parts:
            places = len(result.stacks)
            kinds = [(Kind(), part)] if normal is None else _by_kind(part, by_time)
            extent = len(set(map(_place, part)))
            for kind, same in kinds:
                result.stacks.append(Stack(*_sorted(normal, same), kind, places, extent))
    result.stacks.sort(key=lambda stack: min(stack.slots))
    return result


def options(kinds: Sequence[Kind]) -> list[str]:
    """What may be asked of them to take some and not others, in the words of `Parts.frame`.

    Of types only these are named, since a file may hold anything there.
    """
    common = frozenset.intersection(*(kind.types for kind in kinds))
    types = {name for kind in kinds for name in kind.types - common if name in _NAMED}
    choices = [f"type={name}" for name in _NAMED if name in types]
    for name in ("b", "echo"):
        values = sorted({v for kind in kinds if (v := getattr(kind, name)) is not None})
        choices += [f"{name}={value:g}" for value in values[:_SHOWN] if len(values) > 1]
    last = max(kind.time for kind in kinds)
    choices += [f"time=0 to time={last}"] * (last > 0)
    return choices or ["type=NAME, a part of their Image Type"]


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


def _by_kind(frames: list[_Frame], by_time: bool) -> list[tuple[Kind, list[_Frame]]]:
    """The frames of one orientation, so that each place is in each group once at most.

    Where there is a single place, and not `by_time`, its times are one group.
    """
    traits = [name for name in ("types", "b", "echo") if _differs_at_a_place(frames, name)]
    groups = defaultdict(list)
    for frame in frames:
        groups[tuple(getattr(frame.plane.kind, name) for name in traits)].append(frame)
    kinds = []
    for group in groups.values():
        numbers, times = _times(group), defaultdict(list)
        for frame, number in zip(group, numbers, strict=True):
            times[number].append(frame)
        if len(set(map(_place, group))) == 1 and not by_time:
            kinds.append((_common(group), [times[n][0] for n in sorted(times)]))
        else:
            kinds += [(_common(times[n])._replace(time=n), times[n]) for n in sorted(times)]
    return kinds


def _differs_at_a_place(frames: Iterable[_Frame], name: str) -> bool:
    values = defaultdict(set)
    for frame in frames:
        values[_place(frame)].add(getattr(frame.plane.kind, name))
    return any(len(at_place) > 1 for at_place in values.values())


def _place(frame: _Frame) -> tuple[float, ...]:
    return tuple(round(x, 3) for x in frame.plane.position)


def _times(frames: list[_Frame]) -> list[int]:
    """The number of each frame's time, from 0: by a number that the files have, or else in order.

    A number of the files counts if it tells apart all frames of each place, and has no more values
    than the fullest place has frames: trigger times may differ from slice to slice as well.
    """
    most = max(Counter(map(_place, frames)).values())
    for values in zip(*(frame.plane.kind.times for frame in frames), strict=False):
        pairs = {(_place(frame), value) for frame, value in zip(frames, values, strict=True)}
        if None not in values and len(set(values)) == most and len(pairs) == len(frames):
            return [sorted(set(values)).index(value) for value in values]
    seen: Counter[tuple[float, ...]] = Counter()
    numbers = []
    for frame in frames:  # which are in the order of their numbers
        numbers.append(seen[_place(frame)])
        seen[_place(frame)] += 1
    return numbers


def _common(frames: Sequence[_Frame]) -> Kind:
    """What all frames have in common."""
    kinds = [frame.plane.kind for frame in frames]
    types = frozenset.intersection(*(kind.types for kind in kinds))
    first = kinds[0]
    b = first.b if all(kind.b == first.b for kind in kinds) else None
    echo = first.echo if all(kind.echo == first.echo for kind in kinds) else None
    return Kind(types, b, echo)


def _sorted(normal: np.ndarray | None, frames: list[_Frame]) -> tuple[list[Slot], str]:
    """Frames that are in the order of their numbers, and those of one number in that of files."""
    if normal is not None:
        # Less than a thousandth of a millimetre is rounding, not a distance.
        along = sorted(frames, key=lambda frame: round(float(normal @ frame.plane.position), 3))
        return [frame.slot for frame in along], "position"
    slots = [frame.slot for frame in frames]
    if frames[-1].number < np.inf:
        return slots, "instance number"
    return sorted(slots), "name"
