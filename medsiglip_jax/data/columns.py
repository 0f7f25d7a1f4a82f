"""CSV and JSONL files -> columns, as Arrow arrays, and what Arrow arrays can be as columns."""
# Arrow makes its compute functions when it is imported.
# pyright: reportAttributeAccessIssue=false

import codecs
import csv
import gzip
import io
import itertools
import math
import os
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc

from medsiglip_jax.data import spreadsheets
from medsiglip_jax.files.documents import loads
from medsiglip_jax.files.places import read_bytes
from medsiglip_jax.preprocess.names import escaped

_BLOCK = 65536  # rows that are Python objects at a time
_PART = 1 << 20  # bytes of text that are decoded at a time
# Rows of a table, which take some 150 bytes each, and bytes of its text. A Parquet file of 200 kB
# may hold 100 million empty cells, or one text 20 million times.
MAX_ROWS, MAX_BYTES = 1 << 24, 1 << 31

# (line, name -> cell) of every row of a text file.
_NumberedRows = Iterator[tuple[int, dict[str, str]]]

# What may separate cells, and of how many rows the first decide.
_DELIMITERS, _SAMPLE = (",", ";", "\t", "|"), 20


def read_lines(path: str) -> tuple[dict[str, pyarrow.ChunkedArray], Sequence[int], dict[str, str]]:
    """Reads .csv, .tsv and .jsonl, and these as .gz, with few rows as Python objects at a time.

    Cells of .csv may also be separated by semicolons, tabs or vertical bars, which is warned of.

    Returns:
        Name -> cells, null where a row lacks one; the line on which each row ends; and the columns
        that hold lists or objects, and where the first of them is.

    Raises:
        ValueError: path, line and what is wrong with it.
    """
    refused: dict[str, str] = {}
    is_jsonl = _plain_name(path).endswith(".jsonl")
    rows = _jsonl_lines(path, refused) if is_jsonl else _csv_lines(path)
    lines, tables = array("q"), [pyarrow.table({})]
    while block := list(itertools.islice(rows, _BLOCK)):
        lines.extend(line for line, _ in block)
        check_rows(path, len(lines))
        names = dict.fromkeys(name for _, row in block for name in row)
        cells = {name: [row.get(name) for _, row in block] for name in names}
        where = f"{path}, to line {lines[-1]}"
        tables.append(pyarrow.table({name: _array(c, where) for name, c in cells.items()}))
    table = pyarrow.concat_tables(tables, promote_options="default")
    return dict(zip(table.column_names, table.columns, strict=True)), lines, refused


def _array(cells: Sequence[str | None], where: str) -> pyarrow.Array:
    try:
        return pyarrow.array(cells, pyarrow.large_string())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and Arrow cannot
        written = [cell and escaped(cell) for cell in cells]
        count = sum(a != b for a, b in zip(cells, written, strict=True))
        warnings.warn(
            f"{where}: {count} cells are not Unicode; halves of surrogate pairs in them are read "
            r"as \udXXX, as they are written in JSON",
            stacklevel=2,
        )
        return pyarrow.array(written, pyarrow.large_string())


def _csv_lines(path: str) -> _NumberedRows:
    csv.field_size_limit(MAX_BYTES)  # by default 131,072; too long a text is a row of its own
    text = _open_text(path, newline="")
    reader = csv.reader(text, delimiter=_delimiter(path, text), strict=True)
    header, ragged, protected = [], [], 0
    try:
        for row in filter(None, reader):
            cells = spreadsheets.unprotect(row)
            protected += cells != row
            if not header:
                header = column_names(path, cells)
            elif len(row) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            else:
                ragged.append((reader.line_num, len(row)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    if protected:
        warnings.warn(
            f"{path}: {protected} rows have text with an apostrophe before = + - or @, which keeps "
            "spreadsheets from taking it for a formula; it is read without the apostrophe",
            stacklevel=2,
        )
    if ragged:
        raise ValueError(
            f"{path}, line {ragged[0][0]}: {ragged[0][1]} fields, expected {len(header)} as in "
            f"the header ({len(ragged)} such rows; quote fields with commas)"
        )


def _plain_name(path: str) -> str:
    """A path in lower case, without the suffix of a compressed file."""
    return path.lower().removesuffix(".gz")


def _delimiter(path: str, text: io.TextIOWrapper) -> str:
    """The character between cells: the usual one, unless only another splits all rows alike."""
    usual = "\t" if _plain_name(path).endswith(".tsv") else ","
    choices = dict.fromkeys((usual, *_DELIMITERS))
    chosen = next((delimiter for delimiter in choices if _fits(text, delimiter)), usual)
    text.seek(0)
    if chosen != usual:
        warnings.warn(f"{path}: read as cells separated by {chosen!r}, not {usual!r}", stacklevel=2)
    return chosen


def _fits(text: io.TextIOWrapper, delimiter: str) -> bool:
    """Whether the first rows have two or more cells each, and all as many."""
    text.seek(0)
    rows = filter(None, csv.reader(text, delimiter=delimiter, strict=True))
    try:
        counts = {len(row) for row in itertools.islice(rows, _SAMPLE)}
    except csv.Error:
        return False
    return len(counts) == 1 and counts != {1}


def _jsonl_lines(path: str, refused: dict[str, str]) -> _NumberedRows:
    for number, line in enumerate(_open_text(path, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            row = loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {line.strip()[:40]}")
        for name, value in row.items():
            if isinstance(value, (list, dict)):  # as a string it might pass for a path
                kind = "a list" if isinstance(value, list) else "an object"
                refused.setdefault(name, f"holds {kind} in line {number}, expected strings")
        yield number, {name: _cell(value) for name, value in row.items()}


def column_names(path: str, row: Sequence[str]) -> list[str]:
    """The names in the header of a table, without blanks around them; ValueError if two are
    equal."""
    names = [name.strip() for name in row]
    # Spreadsheets leave columns without a name, which nobody can ask for.
    counts = Counter(names)
    if repeated := sorted(name for name, count in counts.items() if name and count > 1):
        raise ValueError(f"{path}: columns given twice: {', '.join(map(repr, repeated))}")
    return names


def check_rows(path: str, rows: int) -> None:
    """Raises ValueError if a table has more than `MAX_ROWS` rows."""
    if rows > MAX_ROWS:
        raise ValueError(f"{path}: {rows} rows, more than the limit of {MAX_ROWS}; split the table")


def check_text(column: pyarrow.ChunkedArray) -> None:
    """Raises ValueError if the texts of a column take more than `MAX_BYTES` where each is written
    out."""
    if (size := sum(map(_text_bytes, column.chunks))) > MAX_BYTES:
        raise ValueError(f"{size} bytes of text, more than the limit of {MAX_BYTES}")


def _text_bytes(values: pyarrow.Array) -> int:
    """How many bytes texts take where each is written out."""
    if not pyarrow.types.is_dictionary(values.type):
        return values.nbytes
    if not is_textual(kind := values.type.value_type) or pyarrow.types.is_primitive(kind):
        return 0
    lengths = pc.cast(pc.binary_length(values.dictionary), pyarrow.int64())
    return pc.sum(lengths.take(values.indices)).as_py() or 0


def strings(values: pyarrow.Array) -> pyarrow.Array:
    """Values of any type as stripped large_string, with "" for null and NaN."""
    types, type = pyarrow.types, values.type
    if types.is_dictionary(type):
        return strings(values.dictionary_decode())
    if not (types.is_string(type) or types.is_large_string(type) or types.is_integer(type)):
        return pyarrow.array(map(_cell, values.to_pylist()), pyarrow.large_string())
    return pc.utf8_trim_whitespace(pc.fill_null(values.cast(pyarrow.large_string()), ""))


def is_textual(type: pyarrow.DataType) -> bool:
    """Whether values of this type can be cells of a CSV file."""
    return not (pyarrow.types.is_nested(type) or _is_bytes(type))


def is_names(type: pyarrow.DataType) -> bool:
    """Whether values of this type are lists of names, or of numbers that stand for them."""
    types = pyarrow.types
    if not any(is_kind(type) for is_kind in (types.is_list, types.is_large_list)):
        return False
    item = type.value_type
    return types.is_string(item) or types.is_large_string(item) or types.is_integer(item)


def is_pictures(type: pyarrow.DataType) -> bool:
    """Whether values of this type can be encoded images: bytes, or as Hugging Face's `datasets`
    stores its feature Image, bytes with a path."""
    types = pyarrow.types
    if types.is_struct(type):
        names = {field.name: field.type for field in type}
        return "bytes" in names and is_pictures(names["bytes"])
    return _is_bytes(type)


def _is_bytes(type: pyarrow.DataType) -> bool:
    types = pyarrow.types
    kinds = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return types.is_fixed_size_binary(type) or any(is_kind(type) for is_kind in kinds)


def filled(strings: pyarrow.ChunkedArray) -> np.ndarray:
    """Which of the strings are not empty."""
    return pc.not_equal(strings, "").to_numpy()


def joined(*strings: Any) -> Any:
    """Columns of strings, and strings that are the same in all rows, joined row by row."""
    type = pyarrow.large_string()
    scalars = (pyarrow.scalar(s, type) if isinstance(s, str) else s for s in (*strings, ""))
    return pc.binary_join_element_wise(*scalars)


def decode(path: str, data: bytes) -> str:
    """The text of a file.

    Raises:
        ValueError: not UTF-8; path and line.
    """
    try:
        return data.decode("utf-8-sig")  # Excel writes a byte-order mark
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None


def read_text_bytes(path: str) -> bytes:
    """The content of a file of text, inflated if it is a .gz.

    Raises:
        ValueError: it has more than `MAX_BYTES`, or is not gzip.
    """
    too_many = ValueError(f"{path}: more than {MAX_BYTES} bytes of text; split the file")
    if "://" not in path and os.path.getsize(path) > MAX_BYTES:
        raise too_many
    data = read_bytes(path)
    if not path.lower().endswith(".gz"):
        return data
    try:
        data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not readable as gzip ({error})") from None
    if len(data) > MAX_BYTES:
        raise too_many
    return data


def _open_text(path: str, newline: str) -> io.TextIOWrapper:
    data = read_text_bytes(path)
    _check_utf8(path, data)  # the stream would not name the line that is not UTF-8
    return io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=newline)


def _check_utf8(path: str, data: bytes) -> None:
    """Raises the error of `decode`, without a copy of the text, which may take gigabytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), _PART):
            decoder.decode(data[start : start + _PART])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        decode(path, data)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():  # integers with gaps, as pandas keeps them
        return str(int(value))
    return str(value).strip()
