"""How a data set lies on disk: what `[data]` and `[regions]` of a task file may say.

There is a dataclass for each adapter, which turns a folder into a `dataset.Dataset`, and for each
kind of regions. Paths are relative to the folder and do not lead out of it.
"""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from medsiglip_jax.files import places, settings


def _is_below(path: str) -> bool:
    """Whether a path or glob stays below the folder: `**` may stand for it, so that `..` leads out
    of it also behind that."""
    return places.stays_below(path) and ".." not in path.split("/")


_BELOW = settings.Check(
    lambda paths: all(map(_is_below, (paths,) if isinstance(paths, str) else paths)),
    "paths below the folder of the data (links in it are followed)",
)
_Paths = Annotated[tuple[str, ...], _BELOW]

# Columns of images.parquet beside those of attributes.
RESERVED = ("id", "group", "part")


@dataclass(frozen=True)
class Melt:
    """Several columns of file names become one.

    Attributes:
        columns: the columns of file names.
        to: the new column, which holds stems of file names.
        number: a second new column: the number of the row.
    """

    columns: tuple[str, ...]
    to: str
    number: str


@dataclass(frozen=True)
class Table:
    """The table of labels, or a table that is joined to it, one row to many.

    Attributes:
        file: alternatives, each a glob.
        on: the columns to join on; the first table has none.
        rename: column -> its name in the task, where a version of the table has another.
        parse: column -> regular expression; its named groups become columns.
        stem: columns of file names that are cut to their stem.
        melt: several columns to one.
        optional: go on without the table, and without its row for an image.
    """

    file: _Paths
    on: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    parse: Mapping[str, str] = field(default_factory=dict)
    stem: tuple[str, ...] = ()
    melt: Melt | None = None
    optional: bool = False


@dataclass(frozen=True)
class ImageFiles:
    """Which image files belong to a row, in one of three ways; {column} stands for its cell.

    Attributes:
        path: alternatives; the first file that exists is the image of the row.
        each: every path that is not empty is an image of the row.
        find: a glob over image files, which are matched with rows by `name`, or by `parse` and
            `on`. A row has one image: several files for it are copies, of which one is chosen.
        name: file name of the image of a row; folder, suffix and case do not matter.
        parse: regular expression over the path of a file.
        on: columns that have to equal the named groups of `parse`.
        several: with `parse`, a row may have several images, of different file names: only files of
            one name are copies.
        known_missing: files that the published data set itself lacks.
    """

    path: _Paths = ()
    each: _Paths = ()
    find: Annotated[str, _BELOW] = ""
    name: str = ""
    parse: str = ""
    on: tuple[str, ...] = ()
    several: bool = False
    known_missing: tuple[str, ...] = ()

    def __post_init__(self):
        if not (self.path or self.each or self.find):
            raise ValueError("lacks one of path, each, find")
        if self.find and not (self.name or (self.parse and self.on)):
            raise ValueError("find needs name, or parse and on")
        if self.several and (self.name or not self.parse):
            raise ValueError("several is of images that are found with parse")

    @property
    def columns(self) -> list[str]:
        """The columns that a row needs."""
        templates = [*self.path, *self.each, self.name]
        fields = (part for text in templates for part in string.Formatter().parse(text))
        return [*self.on, *(name for _, name, _, _ in fields if name)]


@dataclass(frozen=True)
class LabelColumns:
    """Where the labels of a row are.

    Attributes:
        column: its cells name classes. Without it every class is a column of its own, a finding
            with the labels of `data.labels`.
        separator: between several names in a cell.
        literal: cells are Python lists of names.
        ignore: names that are no classes.
        ignore_others: names beside those of the classes are no mistake.
        except_: columns that are no classes, where the header says what the classes are.
    """

    column: str = ""
    separator: str = ""
    literal: bool = False
    ignore: tuple[str, ...] = ()
    ignore_others: bool = False
    except_: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listed:
    """Keeps the rows whose cell in `column` is a word of the text file `file`."""

    file: Annotated[str, _BELOW]
    column: str


@dataclass(frozen=True)
class CsvData:
    """Adapter "csv": tables of labels, joined, and the image files that their rows name.

    Attributes:
        tables: the first holds the labels.
        images: see `ImageFiles`.
        labels: see `LabelColumns`.
        readers: "majority" where an image has a row of each reader: a class has the label that more
            than half of the readers who gave one agree on, and is else unknown.
        text: column of captions or reports.
        where: column -> values of the rows to keep.
        listed: keeps the rows that a file lists.
        group: column of patients, lesions or slides; or several, of which the first that is filled
            says the group of a row.
        group_optional: go on where no such column is there.
        attributes: name -> column, or columns of which one is there.
        bands: name of an attribute -> {value: band}.
    """

    tables: tuple[Table, ...]
    images: ImageFiles
    labels: LabelColumns = LabelColumns()
    readers: Annotated[str, settings.one_of(("", "majority"))] = ""
    text: str = ""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    listed: Listed | None = None
    group: str | tuple[str, ...] = ""
    group_optional: bool = False
    attributes: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    bands: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """The columns of groups, the first before the others."""
        return [*filter(None, (self.group,) if isinstance(self.group, str) else self.group)]

    def __post_init__(self):
        if self.tables and self.tables[0].optional:
            raise ValueError("the first table is optional; the others are joined to it")
        if not all(table.on for table in self.tables[1:]):
            raise ValueError("tables after the first lack on, the columns to join on")
        if taken := [name for name in RESERVED if name in self.attributes]:
            raise ValueError(
                f"attributes: {', '.join(taken)} is a column of images.parquet already; rename it"
            )


@dataclass(frozen=True)
class FolderData:
    """Adapter "folders": a folder of images per class.

    Attributes:
        root: alternatives; the first that holds folders of classes is taken.
        all_files: know images by their content, whatever their suffix.
    """

    root: _Paths = (".",)
    all_files: bool = False


@dataclass(frozen=True)
class ArrayName:
    """The array `key` in the first of the files `file` that exists."""

    key: str
    file: _Paths = ()


@dataclass(frozen=True)
class ArrayData:
    """Adapters "npz" and "h5": images and labels are arrays in a file.

    Attributes:
        images: uint8 [n, H, W] or [n, H, W, channels].
        labels: numbers of classes [n] or [n, 1], or for "multi_label" 0 and 1 [n, classes].
        file: the alternatives for both arrays, where they name no file themselves.
    """

    images: ArrayName
    labels: ArrayName
    file: _Paths = ()

    def __post_init__(self):
        lacking = [n for n in ("images", "labels") if not (getattr(self, n).file or self.file)]
        if lacking:
            raise ValueError(f"{' and '.join(lacking)}: lacks file")


@dataclass(frozen=True, kw_only=True)
class RegionFile:
    """A file that says where in the images their classes lie.

    Attributes:
        file: alternatives, each a glob.
        names: what the file calls a class -> the class, where the two differ.
        parse: regular expression over the path of an image, of which `name` takes named groups.
        name: what the file calls an image, with {group}; by default by the name of its file.
            Folder, suffix and case do not matter.
        note: what should stand beside the result, such as figures that others published.
    """

    file: _Paths
    names: Mapping[str, str] = field(default_factory=dict)
    parse: str = ""
    name: str = ""
    note: str = ""

    def __post_init__(self):
        if bool(self.parse) != bool(self.name):
            raise ValueError("parse and name need each other")
        try:
            pattern = re.compile(self.parse)
        except re.error as error:
            raise ValueError(f"parse is no regular expression ({error})") from None
        used = {name for _, name, _, _ in string.Formatter().parse(self.name) if name is not None}
        if unknown := sorted(used - pattern.groupindex.keys()):
            raise ValueError(f"name takes {', '.join(unknown)}, which parse has no group of")


@dataclass(frozen=True, kw_only=True)
class SegmentationFile(RegionFile):
    """Kind "rle": JSON, image -> class -> {"size": [height, width], "counts": COCO's run lengths},
    as CheXlocalize has it. A class without a pixel is not in the image."""


_Columns = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BoxTable(RegionFile):
    """Kind "boxes": a table with a row for each box, in pixels from the upper left corner.

    Every column may be several, of which one is there. Rows without coordinates have no box.

    Attributes:
        image: column of the names of images.
        finding: column of classes; "" where all boxes are of the class `class_`.
        x, y: columns of the left and upper edge.
        width, height: columns.
        x_max, y_max: columns of the right and lower edge, in place of width and height.
        size: height and width of the images that the boxes were drawn on. Without it, images of
            another size pass as long as the boxes lie within them.
    """

    image: _Columns
    x: _Columns
    y: _Columns
    finding: _Columns = ""
    class_: str = ""
    width: _Columns = ""
    height: _Columns = ""
    x_max: _Columns = ""
    y_max: _Columns = ""
    size: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if bool(self.finding) == bool(self.class_):
            raise ValueError("expected either finding, a column, or class")
        sides = [bool(side) for side in (self.width, self.height, self.x_max, self.y_max)]
        if sides not in ([True, True, False, False], [False, False, True, True]):
            raise ValueError("expected either width and height, or x_max and y_max")
        if self.size and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size is {list(self.size)}; expected [height, width]")


LAYOUTS = {"csv": CsvData, "folders": FolderData, "npz": ArrayData, "h5": ArrayData}
REGIONS = {"rle": SegmentationFile, "boxes": BoxTable}


def build(data: Mapping[str, Any]) -> Any:
    """The layout that `[data]` of a task file describes, of the class that its adapter has.

    Raises:
        ValueError: all that is wrong with it.
    """
    return _of_kind(data, "adapter", LAYOUTS)


def build_regions(regions: Mapping[str, Any]) -> SegmentationFile | BoxTable:
    """The file that `[regions]` of a task file describes, of the class that its kind has.

    Raises:
        ValueError: all that is wrong with it.
    """
    return _of_kind(regions, "kind", REGIONS)


def _of_kind(table: Mapping[str, Any], key: str, kinds: Mapping[str, Any]) -> Any:
    kind = table.get(key)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{key} is {settings.shown(kind)}; expected one of {', '.join(kinds)}")
    content = {name: value for name, value in table.items() if name != key}
    return settings.build(kinds[kind], content, "the table")
