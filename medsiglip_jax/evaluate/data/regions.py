"""Where the classes of a task lie in its images, by the file that `[regions]` of the task names."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int64

from medsiglip_jax.data.columns import read_lines, read_text_bytes
from medsiglip_jax.evaluate.data import images
from medsiglip_jax.evaluate.data.csv_tables import files_of
from medsiglip_jax.evaluate.data.dataset import where_to_get
from medsiglip_jax.evaluate.data.layout import BoxTable, RegionFile
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.places import Place

# (what the file calls the image, what it calls the class, the region)
_Found = Iterator[tuple[str, str, "Region"]]
_OUTSIDE = 1.0  # pixels that a box may lie outside of its image, for coordinates that were rounded
_DIGITS = 8  # most characters of a length of COCO's: 40 bits, more than any image has pixels


@runtime_checkable
class Region(Protocol):
    """The pixels of an image that show a class."""

    def mask(self, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
        """The pixels, of an image of this height and width; at least one.

        Raises:
            ValueError: the region is of an image of another size.
        """
        ...


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Pixels as COCO writes them.

    Attributes:
        size: height and width of the image.
        lengths: of runs of pixels down the columns, alternately outside and inside of the region.
    """

    size: tuple[int, int]
    lengths: Int64[np.ndarray, " n"]

    def mask(self, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
        _check_size(shape, self.size)
        inside = np.arange(len(self.lengths)) % 2 == 1
        return np.repeat(inside, self.lengths).reshape(self.size, order="F")


@dataclass(frozen=True, eq=False)
class Boxes:
    """All boxes of a class in an image; a pixel belongs to a box that its centre lies in.

    Attributes:
        corners: left, upper, right and lower edge of each, in pixels.
        size: height and width of the image; empty where the file does not say.
    """

    corners: Float64[np.ndarray, "n 4"]
    size: tuple[int, ...] = ()

    def mask(self, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
        if self.size:
            _check_size(shape, self.size)
        height, width = shape
        (left, top), (right, bottom) = self.corners[:, :2].min(axis=0), self.corners[:, 2:].max(0)
        if min(left, top) < -_OUTSIDE or right > width + _OUTSIDE or bottom > height + _OUTSIDE:
            raise ValueError(
                f"boxes reach from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), and the image "
                f"has {width} x {height} pixels"
            )
        mask = np.zeros(shape, bool)
        for x, y, x_max, y_max in self.corners.tolist():
            mask[_centres(y, y_max), _centres(x, x_max)] = True
        if not mask.any():
            raise ValueError("no pixel has its centre in a box")
        return mask


def _check_size(shape: tuple[int, int], size: Sequence[int]) -> None:
    if shape != tuple(size):
        raise ValueError(
            f"the region is of an image of {size[1]} x {size[0]} pixels, and this one has "
            f"{shape[1]} x {shape[0]}"
        )


def _centres(low: float, high: float) -> slice:
    """The pixels of a line whose centres lie from `low` up to `high`."""
    return slice(max(0, int(np.ceil(low - 0.5))), max(0, int(np.ceil(high - 0.5))))


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of a data set.

    Attributes:
        layout: what the task says of the file.
        file: the file that was read.
        of_images: name of an image, as `images.stem` has it -> class -> region.
        other: what the file names that is no class of the task -> how many regions it has.
    """

    layout: RegionFile
    file: Place
    of_images: Mapping[str, Mapping[str, Region]]
    other: Mapping[str, int]

    def of(self, id: str) -> Mapping[str, Region]:
        """The regions of an image of the data set, by class; empty if it has none."""
        if not self.layout.name:
            return self.of_images.get(images.stem(id), {})
        match = re.search(self.layout.parse, id)
        name = self.layout.name.format_map(match.groupdict("")) if match else ""
        return self.of_images.get(images.stem(name), {})


def read(task: Task, root: Place) -> Regions:
    """Reads the file of regions of a task.

    Args:
        task: with `regions`, and with the classes that its data has.
        root: the folder of the data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or names no class of the task.
    """
    layout = task.region_file
    assert layout is not None
    file = _file(task, layout, root)
    entries = _boxes(file, layout) if isinstance(layout, BoxTable) else _segmentations(file)
    classes, other = {c.name: c.name for c in task.classes} | dict(layout.names), Counter()
    of_images: dict[str, dict[str, Region]] = defaultdict(dict)
    for image, name, region in entries:
        if name not in classes:
            other[name] += 1
            continue
        regions = of_images[images.stem(image)]
        if classes[name] in regions:
            raise ValueError(
                f"{file}: {image}, {name}: images of this file name have several regions of "
                f"{classes[name]}; expected one, by one name (folder, suffix and case of an image "
                "do not matter)"
            )
        regions[classes[name]] = region
    if not of_images:
        named = f"names only {', '.join(map(repr, other))}" if other else "has no region"
        raise ValueError(f"{file}: {named}; expected regions of {', '.join(classes)}")
    return Regions(layout, file, of_images, other)


def _file(task: Task, layout: RegionFile, root: Place) -> Place:
    files = files_of(layout.file, root)
    names = " or ".join(layout.file)
    if not files:
        where = where_to_get(task)
        raise FileNotFoundError(f"{root}: no {names}, which says where classes lie{where}")
    if len(files) > 1:
        raise ValueError(f"{root}: {len(files)} files match {names}, expected one: {files[:3]}")
    return files[0]


# -------------------------------------------------------------------------------- segmentations


def _segmentations(file: Place) -> _Found:
    with explained(file, "not segmentations in JSON"):
        content = parse(read_text_bytes(str(file)))
    for image, of_classes in content.items():
        with explained(file, f"{image}: not segmentations by class"):
            coded = dict(of_classes)
        for name, segmentation in coded.items():
            with explained(file, f"{image}, {name}: not a segmentation as COCO writes it"):
                region = _segmentation(segmentation)
            if region.lengths[1::2].any():
                yield image, name, region


def _segmentation(coded: Mapping[str, Any]) -> Segmentation:
    height, width = map(int, coded["size"])
    lengths = run_lengths(coded["counts"])
    total, shortest = int(lengths.sum()), min(lengths.tolist(), default=0)
    if min(height, width) < 1 or shortest < 0 or total != height * width:
        raise ValueError(
            f"runs of {total:,} pixels, the shortest {shortest}; expected {height * width:,}, none "
            "below 0"
        )
    return Segmentation((height, width), lengths)


def run_lengths(counts: str | Sequence[Any]) -> Int64[np.ndarray, " n"]:
    """The lengths that COCO writes as a list or, compressed, as a string.

    A length has 5 bits in each character, the lowest first; 32 says that more follow, and 16 in the
    last one that it is negative. From the fourth length on they are differences from the length
    before the last (cocoapi, common/maskApi.c, `rleFrString`).

    Raises:
        ValueError: other characters, or a length that is cut off or too long.
    """
    if not isinstance(counts, str):
        return np.array([*counts], np.int64)
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], last[:-1] + 1])
    if codes.min(initial=0) < 0 or codes.max(initial=0) > 63 or not len(codes):
        raise ValueError("expected characters from 0 to o")
    if codes[-1] & 32 or (last - starts).max() >= _DIGITS:
        raise ValueError("a length is cut off, or too long")
    digit = np.arange(len(codes)) - np.repeat(starts, last - starts + 1)
    values = np.add.reduceat((codes & 31) << 5 * digit, starts)
    values -= np.where(codes[last] & 16, 1 << 5 * (last - starts + 1), 0)
    values[1::2], values[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return values


# ---------------------------------------------------------------------------------------- boxes


def _boxes(file: Place, layout: BoxTable) -> _Found:
    columns = {name: cells.to_pylist() for name, cells in read_lines(str(file))[0].items()}

    def column(names: str | tuple[str, ...]) -> list[str]:
        names = (names,) if isinstance(names, str) else names
        there = next((name for name in names if name in columns), None)
        if there is None:
            raise ValueError(
                f"{file}: no column {' or '.join(map(repr, names))}; there are "
                f"{', '.join(filter(None, columns))}"
            )
        return [(cell or "").strip() for cell in columns[there]]

    edges = layout.x, layout.y, layout.width or layout.x_max, layout.height or layout.y_max
    cells = [*zip(*map(column, edges), strict=True)]
    pictures = column(layout.image)
    names = column(layout.finding) if layout.finding else [layout.class_] * len(pictures)
    of_images = defaultdict(list)
    for number, (image, name, texts) in enumerate(zip(pictures, names, cells, strict=True), 1):
        if any(texts):
            with explained(file, f"row {number}: not a box"):
                of_images[image, name].append(_corners(texts, bool(layout.width)))
    for (image, name), corners in of_images.items():
        yield image, name, Boxes(np.array(corners), layout.size)


def _corners(texts: Sequence[str], sides: bool) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge, of texts whose last two are sides or edges."""
    x, y, right, bottom = map(float, texts)
    right, bottom = (x + right, y + bottom) if sides else (right, bottom)
    if not (np.isfinite([x, y, right, bottom]).all() and x < right and y < bottom):
        raise ValueError(f"it is {', '.join(texts)}; expected a box with an area")
    return x, y, right, bottom
