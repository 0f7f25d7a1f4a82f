"""WebDataset shards: where in a tar file the images are, from its headers alone."""

import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from medsiglip_jax.data.columns import decode
from medsiglip_jax.data.listing import IMAGE_SUFFIXES, File
from medsiglip_jax.data.roles import caption_of
from medsiglip_jax.files.documents import loads
from medsiglip_jax.files.places import in_words, open_binary
from medsiglip_jax.files.threads import Step
from medsiglip_jax.preprocess import formats

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
# What members hold that are no images. Class labels are a number in ASCII, by WebDataset's decoder
# for "cls" (webdataset/autodecode.py), or a name.
_TEXTS = {".txt": "text", ".json": "text"}
_LABELS = {".cls": "label"}
_MOST_TEXT = 1 << 24  # bytes of one; the model reads 64 tokens


class Entry(NamedTuple):
    """An image, a text or a class label of a shard.

    Attributes:
        key: equal for an image, its text and its label; the whole name where there is a reason.
        source: of an image "path#offset:length", which `preprocess.sources` reads; of others the
            tar.
        kind: "image", "text" or "label".
        text: of a text, or of a label.
        reason: why it cannot be used.
        label: of an image, where `pairs` has given it one.
    """

    key: str
    source: str
    kind: str
    text: str | None = None
    reason: str | None = None
    label: str | None = None


class _Member(NamedTuple):
    """What an entry may be made of: its name with and without the suffix, where it lies, and what
    is wrong with it."""

    name: str
    stem: str
    suffix: str
    offset: int
    size: int
    reason: str | None

    @property
    def kind(self) -> str:
        return (_TEXTS | _LABELS).get(self.suffix, "image")

    @property
    def sample(self) -> str:
        """The stem without the words after its dots, as extensions may have several."""
        folder, slash, name = self.stem.rpartition("/")
        first, *rest = name.split(".")
        while rest and not rest[-1].isdecimal():  # numbers are those of a DICOM UID
            rest.pop()
        return folder + slash + ".".join([first, *rest])


def entries(
    path: str,
    skipped: Counter[str],
    all_files: bool = False,
    on_member: Step = lambda: None,
    labels: bool = False,
) -> Iterator[Entry]:
    """Yields every image and every text of a shard, in the order of the tar.

    A member is named KEY.EXTENSION. The extension starts at the last dot, so that a key may be a
    DICOM UID; or at an earlier dot if one image, at most one text, and labels then have the same
    key, such as s.input.jpg and s.outputs.txt. A text is a .txt or, where there is none, the
    caption in a .json, which is img2dataset's layout. A label is a .cls, as WebDataset has it. What
    is none of these, as a link, or the second of its key, has a reason. Hidden members and empty
    .txt are left out.

    Args:
        path: local or a URI.
        skipped: gets the number of other members, by suffix.
        all_files: also look for images among members of other suffixes, by their content.
        on_member: called for each member, whatever it is.
        labels: yield the class labels, too, which are else among the other members.

    Raises:
        ValueError: it is compressed, cut off or not a tar.
    """
    first: dict[tuple[str, str], str] = {}
    with in_words(path), open_binary(path) as stream:
        known = {*IMAGE_SUFFIXES, *_TEXTS, *(_LABELS if labels else ())}
        members = _members(path, stream, known, skipped, all_files, on_member)
        for _, group in itertools.groupby(members, lambda member: member.sample):
            for member, entry in _sample(path, stream, list(group), skipped):
                kind, key = entry.kind, entry.key
                if entry.reason is None and (before := first.get((kind, key))):
                    reason = f"{member.name} is a second {kind} of the key {key!r}, after {before}"
                    entry = Entry(member.name, entry.source, kind, reason=reason)
                first.setdefault((kind, key), member.name)
                yield entry


def pairs(path: str, skipped: Counter[str], all_files: bool = False) -> Iterator[Entry]:
    """Yields every image of a shard with its text and its label, None where it has none; and what
    cannot be used, or is a text or label without an image, with the reason. Arguments and errors
    are those of `entries`."""
    members = list(entries(path, skipped, all_files, labels=True))
    good = [entry for entry in members if entry.reason is None]
    texts, labels = (
        {entry.key: entry.text for entry in good if entry.kind == kind}
        for kind in ("text", "label")
    )
    keys = {entry.key for entry in good if entry.kind == "image"}
    for entry in members:
        if entry.kind == "image" or entry.reason is not None:
            yield entry._replace(text=texts.get(entry.key), label=labels.get(entry.key))
        elif entry.key not in keys:
            yield entry._replace(reason=f"the {entry.kind} {entry.key!r} has no image")


def _members(
    path: str,
    stream: Any,
    known: Collection[str],
    skipped: Counter[str],
    all_files: bool,
    on_member: Step,
) -> Iterator[_Member]:
    """The members of `known` suffixes, and with `all_files` images of any other."""
    for member in _headers(path, stream):
        on_member()
        name = member.name.removeprefix("./")
        stem, suffix = os.path.splitext(name)
        if member.isdir() or "/." in f"/{name}":
            continue
        is_known = suffix.lower() in known
        if not is_known and all_files and member.isreg():
            stream.seek(member.offset_data)
            is_known = formats.is_image(stream.read(min(formats.START, member.size)))
        if is_known:
            place = member.offset_data, member.size
            yield _Member(name, stem, suffix.lower(), *place, _problem(member) or None)
        else:
            skipped[File("other", "", name).suffix] += 1


def _sample(
    path: str, stream: Any, members: Sequence[_Member], skipped: Counter[str]
) -> Iterator[tuple[_Member, Entry]]:
    """The images, texts and labels among members of one sample."""
    good = [member for member in members if not member.reason]
    texts = _texts(stream, [member for member in good if member.kind == "text"], skipped)
    texts |= {member: _text(stream, member) for member in good if member.kind == "label"}
    used = [member for member in good if member.kind == "image" or member in texts]
    counts = Counter(member.kind for member in used)
    several_stems = len({member.stem for member in used}) > 1
    is_one = several_stems and counts["image"] == 1 and counts["text"] <= 1
    for member in members:
        key, kind = member.sample if is_one else member.stem, member.kind
        if member.reason:
            yield member, Entry(member.name, path, kind, reason=member.reason)
        elif kind == "image":
            yield member, Entry(key, f"{path}#{member.offset}:{member.size}", kind)
        elif member in texts:
            text, reason = texts[member]
            yield member, Entry(member.name if reason else key, path, kind, text, reason)


def _texts(
    stream: Any, members: Sequence[_Member], skipped: Counter[str]
) -> dict[_Member, tuple[str | None, str | None]]:
    """The texts of one sample, or what is wrong with them; a .json is read only where there is no
    .txt of its name."""
    texts: dict[_Member, tuple[str | None, str | None]] = {}
    stems: set[str] = set()
    for member in sorted(members, key=lambda member: member.suffix == ".json"):
        if member.stem in stems and member.suffix == ".json":
            continue
        text, reason = _text(stream, member)
        if text or reason:
            texts[member] = text, reason
            stems.add(member.stem)
        elif member.suffix == ".json":
            skipped[member.suffix] += 1
    return texts


def _text(stream: Any, member: _Member) -> tuple[str | None, str | None]:
    """The text of a member, None or "" if it has none; or what is wrong with it."""
    if member.size > _MOST_TEXT:
        return None, f"{member.name}: a text of {member.size} bytes, more than {_MOST_TEXT}"
    stream.seek(member.offset)
    try:
        text = decode(member.name, stream.read(member.size))
    except ValueError as error:
        return None, str(error)
    try:
        text = caption_of(loads(text)) if member.suffix == ".json" else text
    except ValueError:
        return None, f"{member.name}: not JSON"
    return text and text.strip(), None


def _headers(path: str, stream: Any) -> Iterator[tarfile.TarInfo]:
    start = stream.read(4)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"{path}: {name} file; decompress it, since images are read in place")
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:  # the next header would be this one again
                    raise tarfile.ReadError("negative size")
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or memory grows
                yield member
            # tarfile takes the end of the file, and a damaged header, for the end of the archive.
            stream.seek(tar.offset)
            if stream.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(f"no end of the archive at byte {tar.offset}")
    except (tarfile.TarError, EOFError, OverflowError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: not a tar file, or cut off ({error}); copy it again") from None


def _problem(member: tarfile.TarInfo) -> str:
    """Why the bytes of a member are not those of a file, if so."""
    kind = "a link" if member.issym() or member.islnk() else ""
    kind = kind or ("sparse" if member.issparse() else "" if member.isreg() else "not a file")
    return kind and (
        f"{member.name} is {kind}; expected ordinary files (tar --dereference --hard-dereference "
        "without --sparse)"
    )
