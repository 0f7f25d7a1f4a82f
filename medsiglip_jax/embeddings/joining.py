"""Which embedding belongs to a name in a table: by id, by source, or by the end of a path."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from medsiglip_jax.embeddings.store import Embeddings
from medsiglip_jax.files.credentials import without
from medsiglip_jax.preprocess import formats
from medsiglip_jax.preprocess.facts import describe

NONE = -1
_UNREADABLE = -2  # of a source that embed could not read


@dataclass(frozen=True)
class Joined:
    """Names joined with images.

    Attributes:
        rows: the row of each name in the embeddings, or `NONE`.
        by: what was compared: "id", "source" or "the end of the path"; "" if nothing fits.
        missing: the names without an embedding.
        others: how many embeddings of images have no name, and the id of the first.
    """

    rows: Sequence[int]
    by: str
    missing: Sequence[str]
    others: tuple[int, str]

    def __str__(self) -> str:
        said = [f"{len(self.rows) - len(self.missing):,} rows are joined by {self.by or 'nothing'}"]
        if self.missing:
            first = describe(self.missing[0])
            said.append(f"{len(self.missing):,} have no embedding, the first {first}")
        if self.others[0]:
            first = describe(self.others[1])
            said.append(f"{self.others[0]:,} embeddings are of no row, the first {first}")
        return "; ".join(said)


@dataclass(frozen=True)
class _Image:
    """One that may be meant: its number, its id and source."""

    row: int
    id: str
    source: str


def join(names: Sequence[str], embeddings: Embeddings, root: str = "") -> Joined:
    """Finds the image of each name.

    Names are compared whole with the ids or, if none is one, as paths with the sources. If none is
    one, either, a name fits an image if it is the end of its id or source, or if the source or id
    is the end of it, in whole folder names; a name without a suffix of images also fits a file name
    without one. All names are compared in the same way, so that one whose own image was not
    embedded does not get another's.

    Args:
        names: ids, or paths and addresses of images.
        embeddings: with ids and sources.
        root: the folder that relative paths start at.

    Raises:
        ValueError: a name fits two images, or two names fit one; both are shown.
    """
    images = [_Image(n, row["id"], row["source"]) for n, row in _images(embeddings)]
    numbers, by = _by_key(names, images), "id"
    if not any(n >= 0 for n in numbers):
        full = [_full(name, root) for name in names]
        sources = [_Image(i.row, _full(i.source), i.source) for i in images]
        numbers, by = _by_key(full, sources), "source"
    if not any(n >= 0 for n in numbers):
        gone = [_Image(_UNREADABLE, source, source) for source in embeddings.unreadable]
        numbers, by = _by_end(names, [*images, *gone]), "the end of the path"
    missing = [name for name, n in zip(names, numbers, strict=True) if n < 0]
    used = {n for n in numbers if n >= 0}
    unused = [image.id for image in images if image.row not in used]
    return Joined([max(n, NONE) for n in numbers], by if used else "", missing,
                  (len(unused), unused[0] if unused else ""))  # fmt: skip


def _images(embeddings: Embeddings) -> Iterator[tuple[int, dict[str, str]]]:
    named = enumerate(embeddings.names(range(len(embeddings))))
    return ((n, row) for n, row in named if row["kind"] == "image")


def _by_key(names: Sequence[str], images: Iterable[_Image]) -> list[int]:
    """The image whose id is the name."""
    wanted, image_of = {*names}, {}
    for image in images:
        if image.id in wanted and image_of.setdefault(image.id, image) is not image:
            raise ValueError(_ambiguous(image.id, image_of[image.id], image))
    return [image_of[name].row if name in image_of else NONE for name in names]


def _full(name: str, root: str = "") -> str:
    """A local path in full; an address without credentials, as sources are."""
    if "://" in name and not name.startswith("file://"):
        return without(name)
    return os.path.abspath(os.path.join(root, name.removeprefix("file://")))


def _by_end(names: Sequence[str], images: Iterable[_Image]) -> list[int]:
    wanted = {_file(name) for name in names}
    of_file = defaultdict(list)
    for image in images:
        for file in {_file(image.source), _file(image.id)}:
            for key in {file, _stem(file)} & wanted:
                of_file[key].append(image)
    images_of_names = [_fitting(name, of_file[_file(name)]) for name in names]
    _check_one_each(names, images_of_names)
    return [NONE if image is None else image.row for image in images_of_names]


def _fitting(name: str, images: Sequence[_Image]) -> _Image | None:
    """The one image that a name fits."""
    fits = [i for i in images if _ends_alike(name, i.source) or _ends_alike(name, i.id)]
    if len(fits) > 1:
        raise ValueError(_ambiguous(name, *fits[:2]))
    return fits[0] if fits else None


def _check_one_each(names: Sequence[str], found: Sequence[_Image | None]) -> None:
    """Raises ValueError if two names fit one image; or if they are longer than its id by folders
    that differ, which the ids do not tell apart."""
    first: dict[object, str] = {}
    for name, image in zip(names, found, strict=True):
        if image is None:
            continue
        if (other := first.setdefault(image, name)) != name:
            raise ValueError(
                f"{describe(other)} and {describe(name)} both fit the image {describe(image.id)}; "
                "expected one row for each image (--id-column names a column of ids)"
            )
    above = {}
    for name, image in zip(names, found, strict=True):
        if image is not None and not _ends_alike(name, image.source):
            above.setdefault("/".join(_parts(name)[: -len(_parts(image.id))]), (name, image))
    if len(above) > 1:
        (name, image), (other, other_image) = list(above.values())[:2]
        raise ValueError(
            f"{describe(name)} and {describe(other)} lie in different folders, and the images that "
            f"may be meant, {describe(image.id)} and {describe(other_image.id)}, do not say "
            "which; expected a column of ids (--id-column)"
        )


def _ends_alike(name: str, path: str) -> bool:
    """Whether one is the end of the other, in whole folder names."""
    first, second = _parts(name), _parts(path)
    if _is_stem(first[-1]):
        second = [*second[:-1], _stem(second[-1])]
    count = min(len(first), len(second))
    return first[-count:] == second[-count:]


def _parts(path: str) -> list[str]:
    """The folders and the file of a path; of one of Windows, too."""
    path = without(path)
    if "/" not in path:
        path = path.replace("\\", "/")
    return [part for part in path.split("/") if part not in ("", ".")] or [path]


def _file(path: str) -> str:
    return _parts(path)[-1]


def _is_stem(file: str) -> bool:
    return formats.by_suffix(file) is None


def _stem(file: str) -> str:
    """A file name without its suffix, if that is one of images."""
    format = formats.by_suffix(file)
    suffixes = format.suffixes if format else ()
    longest = max((s for s in suffixes if file.lower().endswith(s)), key=len, default="")
    return file[: len(file) - len(longest)]


def _ambiguous(name: str, *images: _Image) -> str:
    both = " and ".join(
        describe(i.source)
        if i.id in (name, i.source)
        else f"{describe(i.id)} ({describe(i.source)})"
        for i in images
    )
    return f"{describe(name)} may be {both}; expected names that fit one image (--id-column)"
