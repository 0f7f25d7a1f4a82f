"""What a source names, a file or a part of one: its bytes, and its pixels.

* FILE#frame=N: frame N of a DICOM file, from 0; axial slice N of a NIfTI volume, from the feet up.
* FILE#tile=X,Y,LEVEL,SIZE: of a slide, SIZE x SIZE pixels of that level whose upper left is (X, Y)
  in pixels of level 0; of size 0 where the slide cannot be cut, which says why when it is read.
* FILE#OFFSET:LENGTH: bytes of a file, such as an image in a shard. FILE above may be these, too.

What exists under such a name is that file.
"""

import errno
import io
import os
import re
import stat
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from medsiglip_jax.files import opener
from medsiglip_jax.preprocess import handles
from medsiglip_jax.preprocess.decode import (
    Facts,
    ToArray,
    UnreadableImage,
    decode_with_facts,
    describe,
    needing,
    spread,
)
from medsiglip_jax.preprocess.dicom import sniff
from medsiglip_jax.preprocess.dicom.rules import MIDDLE, Rules
from medsiglip_jax.preprocess.dicom.series import Plane

T = TypeVar("T")

VOLUME_SUFFIXES = (".nii", ".nii.gz")
# Of OpenSlide, but for .tif and .dcm.
SLIDE_SUFFIXES = (".bif", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".vms", ".vmu")

_NUMBERS = {"frame": r"frame=(\d+)", "tile": r"tile=(-?\d+),(-?\d+),(\d+),(\d+)"}
_PART = re.compile(rf"(.*)#(?:{_NUMBERS['frame']}|{_NUMBERS['tile']}|(\d+):(\d+))", re.DOTALL)
# What the system says of one file, and not of the disk it lies on.
_OF_THE_FILE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
)
# Seconds between tries of a network that fails.
_PAUSES = (0.5, 2.0, 8.0)


class Outage(OSError):
    """Reading failed for a reason that lies not in the file; it may work when tried again."""


class NoSuchFile(UnreadableImage, FileNotFoundError):
    """Unreadable to who embeds a million, not found to who names one."""


class Frame(NamedTuple):
    """A frame or slice, from 0."""

    number: int

    def __str__(self) -> str:
        return f"frame={self.number}"


class Tile(NamedTuple):
    """A square of a slide; see the table above."""

    x: int
    y: int
    level: int
    size: int

    def __str__(self) -> str:
        return "tile={},{},{},{}".format(*self)


class Range(NamedTuple):
    """Bytes of a file."""

    offset: int
    length: int

    def __str__(self) -> str:
        return "{}:{}".format(*self)


Part = Frame | Tile | Range


def parse(source: str) -> tuple[str, Part | None]:
    """The file that a source names, and which part of it; None is the whole."""
    if "#" not in source or os.path.exists(source):
        return source, None
    match = _PART.fullmatch(source)
    if match is None:
        return source, None
    file, *numbers = match.groups()
    frame, tile, span = numbers[:1], numbers[1:5], numbers[5:]
    if frame[0] is not None:
        return file, Frame(int(frame[0]))
    if tile[0] is not None:
        return file, Tile(*map(int, tile))
    return file, Range(*map(int, span))


def part_of(file: str, part: Part) -> str:
    """The source that names a part of a file; `parse` takes it apart again."""
    return f"{file}#{part}"


def is_volume(file: str) -> bool:
    """Whether it is a NIfTI file, by its name, which says so for every program that reads them."""
    return file.lower().endswith(VOLUME_SUFFIXES)


def check_volume(file: str, rules: Rules) -> None:
    """Raises ValueError if the rules do not say what the values of a NIfTI file are."""
    if rules.volume is None:
        raise ValueError(
            f"{describe(file)}: NIfTI does not say what its values are; expected --volume ct "
            "(Hounsfield units) or --volume percentile (MR and others)"
        )


def read(
    source: str,
    to_array: ToArray = np.asarray,
    rules: Rules = Rules(),
    decode: Callable[[bytes], tuple[Any, Facts]] | None = None,
) -> tuple[Any, Facts]:
    """The pixels of a source: the one way from what is named to what the model sees.

    Args:
        source: local path or URI, or a part of one.
        to_array: PIL image of mode RGB -> uint8 [H, W, 3].
        rules: of DICOM files and volumes.
        decode: what makes pixels of the bytes of an image; default `decode_with_facts`.

    Returns:
        uint8 [H, W, 3], which may be read-only, or what `decode` made; and facts.

    Raises:
        UnreadableImage: one line, with the source and the reason; `NoSuchFile` if that is it.
        Outage: the disk or the network fails, which says nothing about the file.
        ModuleNotFoundError: what reads such files is not installed; no other can be read, either.
        ValueError: the rules do not say how volumes are read; no other can be read, either.
    """
    file, part = parse(source)
    data = b""
    try:
        if isinstance(part, Tile):
            return _tile(file, part, to_array), Facts()
        if is_volume(file) and not isinstance(part, Range):
            return _slice(file, part, rules)
        if isinstance(part, Frame):
            return _frame(file, part, to_array, rules)
        if part is None and file.lower().endswith(SLIDE_SUFFIXES):
            raise _whole_slide(file)
        data = read_bytes(source)
        return decode(data) if decode else decode_with_facts(data, to_array, rules)
    except UnreadableImage as error:
        reason = str(error).removeprefix(f"{describe(data)}: ")
        raise type(error)(f"{describe(source)}: {reason}") from error


def _tile(file: str, tile: Tile, to_array: ToArray) -> np.ndarray:
    with needing("slides", "slides"):
        from medsiglip_jax.preprocess import slides
    return spread(slides.read(file, *tile), to_array)


def _whole_slide(file: str) -> UnreadableImage:
    """Why it is no image, without reading gigabytes of it."""
    with needing("slides", "slides"):
        from medsiglip_jax.preprocess import slides
    slides.check(file)
    return UnreadableImage(
        "a whole slide; expected tiles of it: --mpp, or FILE#tile=X,Y,LEVEL,SIZE"
    )


def _slice(file: str, part: Part | None, rules: Rules) -> tuple[np.ndarray, Facts]:
    check_volume(file, rules)
    with needing("NIfTI", "volumes"):
        from medsiglip_jax.preprocess import volumes
    volume = handles.opened(file, volumes.open_volume)
    if isinstance(part, Frame):
        return volume.render(part.number, rules)
    return volume.render(volume.slices // 2 if rules.frame == MIDDLE else int(rules.frame), rules)


def _frame(file: str, part: Frame, to_array: ToArray, rules: Rules) -> tuple[np.ndarray, Facts]:
    with needing("DICOM", "dicom"):
        from medsiglip_jax.preprocess.dicom import pixels
    rgb, facts = pixels.decode_frame(handles.opened(file, _open_dicom), part.number, rules)
    return spread(rgb, to_array), facts


def _open_dicom(file: str) -> Any:
    from medsiglip_jax.preprocess.dicom import pixels

    data = read_bytes(file)
    if not sniff.is_dicom(data[: sniff.START]):
        raise UnreadableImage("neither DICOM nor a NIfTI volume, and so without frames")
    return pixels.opened(data)


def frames(source: str) -> int:
    """How many frames or slices a file has, from its header; 1 of what is no DICOM file or volume.

    Raises:
        UnreadableImage: the file cannot be opened, or is damaged; the reason, without the path.
        Outage: the disk or the network fails, which says nothing about the file.
    """
    file, part = parse(source)
    if is_volume(file) and part is None:
        with needing("NIfTI", "volumes"):
            from medsiglip_jax.preprocess import volumes
        return looked_at(file, volumes.slices)

    def count(stream: Any) -> int:
        parser = _parser(stream)
        return parser.frames(stream) if parser else 1

    return looked_at(source, count)


def planes(source: str) -> list[Plane]:
    """Where each frame of a DICOM file belongs, from its header; none of what is none.

    Raises:
        UnreadableImage, Outage: as `frames`.
    """

    def list_planes(stream: Any) -> list[Plane]:
        parser = _parser(stream)
        return parser.planes(stream) if parser else []

    return looked_at(source, list_planes)


def _parser(stream: Any) -> Any:
    """The module that reads a stream, if it is DICOM."""
    if not sniff.is_dicom(stream.read(sniff.START)):
        return None
    with needing("DICOM", "dicom"):
        from medsiglip_jax.preprocess.dicom import file
    return file


def looked_at(source: str, look: Callable[[Any], T]) -> T:
    """What `look` makes of a stream of the bytes that a source names; of a remote one patiently."""

    def once() -> T:
        with open_binary(source) as stream:
            return look(stream)

    file, part = parse(source)
    return _patiently(once) if "://" in file and part is None else once()


def open_binary(source: str) -> Any:
    """A stream of the bytes that a source names; raises as `read_bytes` does, also at its end."""
    if parse(source)[1] is not None:
        return io.BytesIO(read_bytes(source))
    try:
        if "://" not in source:
            _check_regular(source)
        return _Stream(source, opener.open_binary(source))
    except Exception as error:
        raise _told(source, error) from error


class _Stream:
    """A stream that raises its failure once more when it is closed.

    Parsers take whatever is raised for damage, and some say nothing at all.
    """

    def __init__(self, source: str, stream: Any):
        self._source, self._stream = source, stream
        self._failure: Exception | None = None
        self.tell = stream.tell

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stream.close()
        if self._failure is not None:
            raise self._failure

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except MemoryError:  # so much was asked for
            raise
        except Exception as error:
            self._failure = _told(self._source, error)
            raise self._failure from error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._stream.seek(offset, whence)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a place before the start
                raise
            self._failure = _told(self._source, error)
            raise self._failure from error


# ------------------------------------------------------------------------------------------- bytes


def read_bytes(source: str) -> bytes:
    """The content of a file, or of the part of it that "FILE#OFFSET:LENGTH" names.

    Raises:
        UnreadableImage: there is no such file, or it may not be read; the reason, without the path.
        Outage: the disk or the network fails, which says nothing about the file.
    """
    file, part = parse(source)
    if part is not None and not isinstance(part, Range):
        raise UnreadableImage("part of an image, which has no bytes of its own")
    start, length = part or (0, None)
    remote = "://" in file

    def once() -> bytes:
        try:
            return (_read_remote if remote else _read)(file, start, length)
        except Exception as error:
            raise _told(source, error) from error

    data = _patiently(once) if remote else once()
    if length is not None and len(data) < length:
        raise UnreadableImage(f"the file ends before byte {start + length}")
    return data


def _check_regular(file: str) -> None:
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):  # a pipe or device may never end
        raise UnreadableImage("a folder" if stat.S_ISDIR(mode) else "not a file")


def _read(file: str, start: int, length: int | None) -> bytes:
    _check_regular(file)
    with open(file, "rb") as stream:
        stream.seek(start)
        return stream.read(length)


def _told(source: str, error: Exception) -> Exception:
    """What is told of an error of reading; remote file systems raise types of their own."""
    if isinstance(error, UnreadableImage):
        return type(error)(str(error))
    if isinstance(error, FileNotFoundError):
        return NoSuchFile("no such file")
    if isinstance(error, IsADirectoryError):
        return UnreadableImage("a folder")
    said = getattr(error, "strerror", None)
    if "://" not in source and getattr(error, "errno", None) in _OF_THE_FILE:
        return UnreadableImage(said or str(error))
    reason = said or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Outage(f"{describe(source)}: cannot be read: {reason}")


def _patiently(make: Callable[[], T]) -> T:
    """What it gives, after an outage tried again."""
    for pause in (*_PAUSES, None):
        try:
            return make()
        except Outage:
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError


def _read_remote(file: str, start: int, length: int | None) -> bytes:
    system, name = opener.file_system(file)
    if length is None:
        return system.cat_file(name)
    return system.cat_file(name, start=start, end=start + length)  # one request
