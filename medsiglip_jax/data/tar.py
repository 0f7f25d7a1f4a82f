"""WebDataset shards: where in a tar file the images are, from its headers alone."""

import os
import tarfile
from collections.abc import Iterator
from typing import Any

from medsiglip_jax.data.columns import decode
from medsiglip_jax.data.listing import IMAGE_SUFFIXES
from medsiglip_jax.files.places import open_binary

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512


def members(path: str) -> Iterator[tuple[str, str, str, str | None]]:
    """Yields (key, source, kind, text) of every image and every .txt, in the order of the tar.

    A member is named KEY.EXTENSION. The extension starts at the last dot, so that a key may be a
    DICOM UID. Hidden members, empty .txt and other kinds of members are skipped. The source of an
    image is "path#offset:length", which `preprocess.sources` reads; that of a text is the tar.

    Args:
        path: local or a URI.

    Raises:
        ValueError: it is compressed, cut off or not a tar, or a member is a link, sparse, or a text
            that is not UTF-8.
    """
    with open_binary(path) as stream:
        for member in _headers(path, stream):
            key, suffix = os.path.splitext(member.name.removeprefix("./"))
            suffix = suffix.lower()
            if member.isdir() or "/." in f"/{key}" or suffix not in IMAGE_SUFFIXES | {".txt"}:
                continue
            _check(path, member)
            if suffix != ".txt":
                yield key, f"{path}#{member.offset_data}:{member.size}", "image", None
                continue
            stream.seek(member.offset_data)
            if text := decode(f"{path}: {member.name}", stream.read(member.size)).strip():
                yield key, path, "text", text


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


def _check(path: str, member: tarfile.TarInfo) -> None:
    kind = "a link" if member.issym() or member.islnk() else ""
    kind = kind or ("sparse" if member.issparse() else "" if member.isreg() else "not a file")
    if kind:
        raise ValueError(
            f"{path}: {member.name} is {kind}; expected ordinary files (tar --dereference "
            "--hard-dereference without --sparse)"
        )
