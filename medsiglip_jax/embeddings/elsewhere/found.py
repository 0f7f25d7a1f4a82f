"""What a reader of vectors finds in a file, and which of its columns or arrays mean what."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from medsiglip_jax.data import roles
from medsiglip_jax.files import limits, places

# Bytes of vectors, and of names, that are held in memory: a million vectors of 1,152 float32.
MOST_BYTES = 5 << 30
# The names that these columns and arrays have in files of others, in their order of preference;
# case, spaces, hyphens and underscores do not matter, nor an s at the end.
VECTORS = tuple("embedding vector feature imageembed imageembedding emb".split())
IDS = tuple("id imageid key uid name".split())
SOURCES = ("source", *roles.IMAGE)
KINDS = ("kind",)


@dataclass(frozen=True, eq=False)
class Found:
    """Vectors and their names, as the output of `embed` has them.

    Attributes:
        vectors: one for each name.
        ids, sources: of each; a file that has one of the two gives it for both.
        kinds: "image" or "text" of each, see `kind_of`; None if all are images.
        lacking: what the file names without a vector, and why there is none.
    """

    vectors: Float32[np.ndarray, "n d"]
    ids: Sequence[str]
    sources: Sequence[str]
    kinds: Sequence[str] | None = None
    lacking: Sequence[tuple[str, str]] = ()


def pick(role: Sequence[str], names: Collection[str], only: bool = True) -> str | None:
    """The name that a role has among others; None if there is none.

    Args:
        role: `VECTORS`, `IDS`, `SOURCES` or `KINDS`.
        names: of what may have the role.
        only: take a single name, whatever it is.

    Raises:
        ValueError: several may be meant.
    """
    if only and len(names) == 1:
        return next(iter(names))
    plain = {name: re.sub(r"[\W_]", "", name).lower() for name in names}
    for known in role:
        if alike := [name for name, p in plain.items() if p in (known, f"{known}s")]:
            if len(alike) == 1:
                return alike[0]
            raise ValueError(f"{' and '.join(alike)} both look like {known}s; rename one")
    return None


def pick_vectors(names: Collection[str]) -> str:
    """The name of the vectors; `pick` for what has to be there."""
    if (name := pick(VECTORS, names)) is not None:
        return name
    listed = ", ".join(names) or "none"
    raise ValueError(f"expected one list of vectors, or one of these called embedding: {listed}")


def kind_of(value: object) -> str:
    """What `embed` calls the kind of a vector, of what others have in a column of that name, where
    "X-ray" is no reason to leave a row out of a search among images."""
    return "text" if value == "text" else "image"


def named(path: places.Place, vectors: np.ndarray, columns: Mapping[str, Sequence[str]]) -> Found:
    """Vectors with their names, of the columns `IDS` and `SOURCES`, or of a list beside the file;
    and with their kinds, if there is a column of `KINDS`.

    Raises:
        ValueError: there are no names, or not as many as vectors; or no vectors of float numbers.
    """
    vectors = as_vectors(vectors)
    kind = pick(KINDS, columns, False)
    kinds = None if kind is None else [kind_of(value) for value in columns[kind]]
    columns = {name: column for name, column in columns.items() if name != kind}
    id, source = pick(IDS, columns, False), pick(SOURCES, columns, False)
    if id is None and source is None and columns:
        id = _only_names(columns)
    names = columns[id] if id is not None else columns[source] if source else _beside(path)
    sources = columns[source] if source else names
    for column in (names, sources, kinds or names):
        if len(column) != len(vectors):
            raise ValueError(f"{len(vectors):,} vectors and {len(column):,} names of them")
    return Found(vectors, names, sources, kinds)


def _only_names(columns: Mapping[str, Sequence[str]]) -> str | None:
    """A single column, whatever it is called, if it tells all rows apart, as labels do not."""
    name = pick(IDS, columns)
    return name if name is not None and len({*columns[name]}) == len(columns[name]) else None


def as_vectors(array: np.ndarray) -> Float32[np.ndarray, "n d"]:
    """An array of vectors as float32.

    Raises:
        ValueError: it is none.
    """
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise ValueError(f"{array.dtype} of shape {array.shape}; expected floats of shape [n, d]")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def check_bytes(count: int) -> None:
    """Raises ValueError if arrays are larger than what is held in memory."""
    if count > (most := max(MOST_BYTES, limits.current().max_bytes)):
        raise ValueError(f"{count:,} bytes, more than {most:,} (--max-bytes)")


def texts(array: np.ndarray) -> list[str]:
    """The names in an array of strings, bytes or whole numbers."""
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    return array.astype(str).tolist()


def are_names(shape: Sequence[int], dtype: np.dtype, count: int) -> bool:
    """Whether an array may hold the names of so many vectors."""
    return tuple(shape) == (count,) and dtype.kind in "USiu"


def _beside(path: places.Place) -> list[str]:
    """The names in the list that lies beside a file: one a line, of the vectors in their order."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        raise ValueError(
            f"no names of the vectors; expected them in the file, as ids or sources, or in "
            f"{beside.name} beside it, one a line"
        )
    from medsiglip_jax.data.columns import decode, read_text_bytes

    return decode(str(beside), read_text_bytes(str(beside))).splitlines()
