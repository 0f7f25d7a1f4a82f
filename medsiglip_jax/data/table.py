"""A table as columns, what is asked of them, and the problems found in them so far."""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc

from medsiglip_jax.data import roles
from medsiglip_jax.data.columns import (
    check_text,
    filled,
    is_names,
    is_pictures,
    is_textual,
    joined,
    strings,
)
from medsiglip_jax.data.parquet_columns import ParquetColumns
from medsiglip_jax.data.rows import seen_before

_NO_STRINGS = pyarrow.chunked_array([], pyarrow.large_string())


@dataclass(frozen=True)
class Images:
    """The images of a table.

    Attributes:
        names: large_string; the paths or, of pictures inside the table, the names that they had
            outside; "" where there is none.
        cells: their sources, of pictures inside the table; null where there are none.
    """

    names: pyarrow.ChunkedArray
    cells: pyarrow.ChunkedArray

    @property
    def inside(self) -> np.ndarray:
        """Which rows have a picture inside the table."""
        return self.cells.is_valid().to_numpy()

    @property
    def given(self) -> np.ndarray:
        """Which rows have an image."""
        return self.inside | filled(self.names)

    @property
    def relative(self) -> np.ndarray:
        """Which rows have a relative path."""
        elsewhere = pc.or_(
            pc.match_substring(self.names, "://"), pc.starts_with(self.names, "/")
        ).to_numpy()
        return filled(self.names) & ~elsewhere & ~self.inside

    def sources(self, root: str) -> pyarrow.ChunkedArray:
        """What `preprocess.sources` reads; relative paths start at `root`, which ends in a slash
        unless it is empty."""
        paths = pc.if_else(pyarrow.array(self.relative), joined(root, self.names), self.names)
        return pc.coalesce(self.cells, paths)


@dataclass
class Table:
    """Columns, and the problems found in them so far.

    Attributes:
        path: as given, for messages.
        root: what relative image paths are relative to.
        columns: name -> one value per row, of any type; `strings` and `column` give them as text.
        lines: the name of each row in messages: its line, its number or its file.
        unit: "line", "row" or "file".
        label: the label column or columns, if the format itself says so.
        classes: the classes in their order, if the format itself says so.
        refused: columns that cannot be used, and what to say after their name.
        problems: collected by the methods, raised by `raise_problems`.
    """

    path: str
    root: str
    columns: Mapping[str, pyarrow.ChunkedArray]
    lines: Sequence[int] | Sequence[str]
    unit: str = "line"
    label: str | tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def strings(self, name: str) -> pyarrow.ChunkedArray:
        """A column as large_string, "" where a value is missing; empty if there is no column."""
        column = self.columns.get(name, _NO_STRINGS)
        nested = None if is_textual(column.type) else f"holds {column.type}, expected strings"
        if reason := self.refused.get(name, nested):
            problem = f"column {name!r} {reason}"
            self.problems += [] if problem in self.problems else [problem]
            return _NO_STRINGS
        try:
            check_text(column)
        except ValueError as error:
            raise ValueError(f"{self.path}: column {name!r}: {error}; split the table") from None
        chunks = [strings(chunk) for chunk in column.chunks]
        return pyarrow.chunked_array(chunks, pyarrow.large_string())

    def lists(self, name: str) -> list[str] | None:
        """The cells of a column as text, and lists as JSON or Python has them; None without such a
        column."""
        if name not in self.columns:
            return None
        column = self.columns[name]
        if isinstance(self.columns, ParquetColumns) and is_names(self.columns.schema_of(name)):
            return self.columns.lists(name)
        if self.refused.get(name, "").startswith("holds a list"):
            return [text for chunk in column.chunks for text in strings(chunk).to_pylist()]
        return self.strings(name).to_pylist()

    def find(self, role: str, name: str) -> str | None:
        """The name of the column of images or texts, which is known by other names, too, unless it
        was named; None if there is none.

        Args:
            role: "image", "text", or another, which is known by its own name only.
            name: what was asked for; the role itself is the default, and may be missing.
        """
        if name != role or role not in ("image", "text"):
            return name if self.has(name, (role,)) else None
        if role in self.refused:
            return role
        try:
            column = roles.find(self.columns, role)
        except roles.Question as question:
            self.problems.append(str(question))
            return None
        if column not in (None, role):
            warnings.warn(f"{self.path}: column {column!r} is read as {role}s", stacklevel=3)
        return column

    def check_texts_only(self, used: Collection[str]) -> None:
        """Warns that only the texts of a table are read, if it has other columns; of these one that
        looks as if it held images is a problem."""
        others = [name for name in self.columns if name not in used]
        try:
            roles.check_texts_only(self.columns, others)
        except roles.Question as question:
            self.problems.append(str(question))
            return
        if others:
            warnings.warn(
                f"{self.path}: no column of images, so only its texts are read; --image-column "
                f"names one of {', '.join(others)}",
                stacklevel=3,
            )

    def holds_pictures(self, name: str) -> bool:
        """Whether the images of a column are inside the table, as only Parquet has them."""
        columns = self.columns
        return isinstance(columns, ParquetColumns) and is_pictures(columns.schema_of(name))

    def images(self, name: str | None) -> Images:
        """The images in a column; none if there is no column."""
        count = len(self.lines)
        nothing = pyarrow.nulls(count, pyarrow.large_string())
        if name is None:
            return Images(pyarrow.chunked_array([nothing.fill_null("")]), _chunked(nothing))
        if not self.holds_pictures(name):
            return Images(self.strings(name), _chunked(nothing))
        names, inside = self.columns.pictures(name)  # pyright: ignore[reportAttributeAccessIssue]
        numbers = pyarrow.array(np.arange(count)).cast(pyarrow.large_string())
        cells = joined(f"{self.path}#row=", numbers, f",{name}")  # as `preprocess.names.Cell`
        return Images(names, _chunked(pc.if_else(pyarrow.array(inside), cells, None)))

    def default_ids(self, images: Images) -> tuple[pyarrow.ChunkedArray, np.ndarray]:
        """The ids of rows of a table without any, and which are the names of the images; the others
        have no name, or that of an earlier row, and are FILE:LINE."""
        has_name = filled(images.names)
        by_image = np.zeros(len(has_name), bool)
        by_image[has_name] = ~seen_before(images.names.filter(pyarrow.array(has_name)))
        lines = pyarrow.array(np.asarray(self.lines)).cast(pyarrow.large_string())
        lines = joined(f"{os.path.basename(self.path)}:", lines)
        return pc.if_else(pyarrow.array(by_image), images.names, lines), by_image

    def has(self, name: str, optional: Collection[str] = ()) -> bool:
        """Whether there is such a column; a missing one is a problem unless it is optional."""
        if name not in self.columns and name not in optional:
            self.problems.append(f"no column {name!r}; there are {', '.join(self.columns)}")
        return name in self.columns

    def column(
        self, name: str | None, optional: Collection[str] = (), blank: bool = False
    ) -> list[str] | None:
        """The cells of a column, or None if it is not asked for or missing.

        A missing column is a problem unless it is optional, an empty cell unless `blank`.
        """
        if name is None or not self.has(name, optional):
            return None
        cells = self.strings(name).to_pylist()
        if not blank:
            self.report(name, cells, [i for i, cell in enumerate(cells) if not cell], "no value")
        return cells

    def report(self, name: str | None, cells: Any, rows: Sequence[int], problem: str) -> None:
        """Adds a problem of a column if there are such rows: the first one and how many."""
        if rows:
            cell = str(cells[rows[0]])
            count = f" ({len(rows)} rows in all)" if len(rows) > 1 else ""
            self.problems.append(
                f"column {name!r}, {self.where(rows[0])}: {problem}{cell and f' {cell!r}'}{count}"
            )

    def where(self, row: int) -> str:
        """The name of a row in messages, such as "line 7"."""
        return f"{self.unit} {self.lines[row]}"

    def raise_problems(self) -> None:
        """Raises a ValueError that names all problems, if there are any."""
        if self.problems:
            raise ValueError(f"{self.path}: {'; '.join(self.problems)}")


def _chunked(array: pyarrow.Array) -> pyarrow.ChunkedArray:
    return pyarrow.chunked_array([array])
