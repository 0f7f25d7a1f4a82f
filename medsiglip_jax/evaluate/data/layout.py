"""How a data set lies on disk: what `[data]` of a task file may say, one dataclass per adapter.

An adapter turns a folder into a `dataset.Dataset`. Paths are relative to that folder and do not
lead out of it.
"""

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
        columns: to melt.
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
        file: of both, where they name none.
    """

    images: ArrayName
    labels: ArrayName
    file: _Paths = ()

    def __post_init__(self):
        lacking = [n for n in ("images", "labels") if not (getattr(self, n).file or self.file)]
        if lacking:
            raise ValueError(f"{' and '.join(lacking)}: lacks file")


LAYOUTS = {"csv": CsvData, "folders": FolderData, "npz": ArrayData, "h5": ArrayData}


def build(data: Mapping[str, Any]) -> Any:
    """The layout that `[data]` of a task file describes, of the class that its adapter has.

    Raises:
        ValueError: all that is wrong with it.
    """
    adapter = data.get("adapter")
    if not isinstance(adapter, str) or adapter not in LAYOUTS:
        shown = settings.shown(adapter)
        raise ValueError(f"adapter is {shown}; expected one of {', '.join(LAYOUTS)}")
    table = {key: value for key, value in data.items() if key != "adapter"}
    return settings.build(LAYOUTS[adapter], table, "the table")
