"""Which column of a table holds the images, and which the texts, where nobody has named it."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow

from medsiglip_jax.data.columns import is_pictures, is_textual, strings
from medsiglip_jax.preprocess.formats import FORMATS

# The names that these columns have elsewhere; the first is this project's own. Case, spaces,
# hyphens and underscores do not matter. "file_name" is that of Hugging Face's metadata.jsonl
# (datasets, "ImageFolder with metadata"), "Path" CheXpert's, "Image Index" ChestX-ray14's, "url"
# and "caption" those of img2dataset.
IMAGE = tuple(
    "image images img imagepath imagefile imagefilename imagename imageurl imageuri imageindex "
    "imgpath imgfile imgname file filename filepath path picture url uri".split()
)
TEXT = tuple("text texts caption captions report reports description descriptions".split())
# The option of commands, and the key of recipes, that names a column.
_OPTIONS = {"image": "--image-column, or data.image of a recipe",
            "text": "--text-column, or data.text of a recipe"}  # fmt: skip

_SUFFIXES = tuple(suffix for format in FORMATS for suffix in format.suffixes)
_ANY_SUFFIX = re.compile(r"\.[a-z]\w{0,9}$")
_LOOKED_AT = 100  # cells


class Question(ValueError):
    """The table does not say which column is meant."""


def find(columns: Mapping[str, pyarrow.ChunkedArray], role: str) -> str | None:
    """The column that is called "image", or "text", or by another name for it; None if none is.

    Args:
        columns: of a table.
        role: "image" or "text".

    Raises:
        Question: there are several.
    """
    if role in columns:
        return role
    names = IMAGE if role == "image" else TEXT
    known = {name: _plain(name) for name in columns if _plain(name) in names}
    named_so = [name for name, plain in known.items() if plain == role]
    fitting = [name for name in named_so or known if role == "text" or _fits(columns[name])]
    if len(fitting) > 1:
        which = " or ".join(map(repr, fitting))
        raise Question(f"which column is the {role}, {which}? Name it ({_OPTIONS[role]})")
    return fitting[0] if fitting else None


def check_texts_only(columns: Mapping[str, pyarrow.ChunkedArray], others: Iterable[str]) -> None:
    """Raises Question if one of the `others` looks as if it held images."""
    if likely := [name for name in others if _looks_like_images(columns[name])]:
        which = " or ".join(map(repr, likely))
        raise Question(
            f"no column of images is named, but {which} looks like one; name it "
            f"({_OPTIONS['image']}), or leave it out"
        )


def names_image(cell: str) -> bool:
    """Whether a text is the name of an image file, or of a part of one."""
    path = re.sub(r"[?#].*$", "", cell.strip().lower()) if "://" in cell else cell.strip().lower()
    path = re.sub(r"#[\w=,:-]+$", "", path)
    return path.endswith(_SUFFIXES) and "\n" not in path


def caption_of(content: Any) -> str | None:
    """The text in the JSON that lies beside an image; None if there is none."""
    if isinstance(content, dict):
        named = {_plain(name): value for name, value in content.items()}
        content = next((named[name] for name in TEXT if isinstance(named.get(name), str)), None)
    return content if isinstance(content, str) else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _fits(column: pyarrow.ChunkedArray) -> bool:
    """Whether the cells may be images: a path may lack a suffix, an address on the web may not."""
    if not is_textual(column.type):
        return is_pictures(column.type)
    cells = _first_cells(column)
    return all(names_image(c) or not ("://" in c or _ANY_SUFFIX.search(c.lower())) for c in cells)


def _looks_like_images(column: pyarrow.ChunkedArray) -> bool:
    """Whether cells look like images, or like lists of them, which no row can have."""
    if not is_textual(column.type):
        several = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
        return is_pictures(column.type.value_type if several else column.type)
    return any(names_image(cell.strip("[]{}'\" ")) for cell in _first_cells(column))


def _first_cells(column: pyarrow.ChunkedArray) -> Sequence[str]:
    cells = (cell for chunk in column.chunks for cell in strings(chunk).to_pylist())
    return list(itertools.islice(filter(None, cells), _LOOKED_AT))
