"""NumPy's .npz and .npy files of unknown origin: sizes are known before anything is unpacked, and
nothing is ever unpickled."""

import contextlib
import math
import mmap
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy

from medsiglip_jax.files import places
from medsiglip_jax.files.failures import explained

# zlib packs up to 1,032 to one, but weights hardly at all and images far below 100 to one. What
# unpacks to more than so many bytes and is packed more tightly was made to fill the memory.
_TIGHTEST, _HARMLESS = 100, 256 << 20


@dataclass(frozen=True)
class Header:
    """What the header of an array says.

    Attributes:
        shape: its shape.
        dtype: its element type.
        order: "C" or "F", in which its values lie.
        size: of the header itself, in bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]
    size: int

    @property
    def nbytes(self) -> int:
        """The size of the array in memory, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Npz:
    """An open .npz.

    Attributes:
        headers: name of an array -> its header.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int):
        """Reads and checks all headers; `size` is that of the file, in bytes.

        Raises:
            ValueError: an array holds Python objects or is not as large as its header says, or all
                are packed so tightly that they can only have been made to fill the memory.
        """
        self._archive, members = archive, archive.infolist()
        if sum(member.compress_size for member in members) > size:
            raise ValueError("its arrays overlap: together they are larger than the file")
        self._members = {_name(member): member for member in members}
        self.headers = {_name(member): _member(archive, member) for member in members}
        if len(self.headers) < len(members):
            raise ValueError("two of its arrays have the same name")
        if (total := sum(h.nbytes for h in self.headers.values())) > max(
            _HARMLESS, _TIGHTEST * size
        ):
            raise ValueError(
                f"its {size:,} bytes would unpack to {total:,}; write it anew with numpy.savez, "
                "which does not compress, if it really holds so much"
            )

    def read(self, name: str) -> np.ndarray:
        """The array of that name; KeyError if there is none."""
        if name not in self.headers:
            raise KeyError(name)
        with self._archive.open(self._members[name]) as file:
            return npy.read_array(file, allow_pickle=False)

    def view(self, name: str, mapped: mmap.mmap) -> np.ndarray:
        """The array of that name as a view of the file, whose values have been compared with their
        checksum; of one that is compressed, what `read` gives.

        Args:
            name: one of `headers`.
            mapped: the whole file.

        Raises:
            ValueError: it is damaged.
        """
        member, header = self._members[name], self.headers[name]
        if member.compress_type != zipfile.ZIP_STORED:
            return self.read(name)
        start = _start(member, mapped)
        content = memoryview(mapped)[start : start + member.file_size]
        if len(content) < member.file_size or zlib.crc32(content) != member.CRC:
            raise ValueError(f"{member.filename} is damaged: its checksum (CRC-32) is another one")
        flat = np.frombuffer(content[header.size :], header.dtype)
        return flat.reshape(header.shape, order=header.order)


class Npy:
    """An open .npy.

    Attributes:
        header: of its array.
    """

    def __init__(self, file: Any):
        """Reads and checks the header in an open file.

        Raises:
            ValueError: it is no .npy, holds Python objects, or is not as large as its header says.
        """
        self._file, self.header = file, _checked("its array", file, _size(file))

    def read(self) -> np.ndarray:
        """The array."""
        self._file.seek(0)
        return npy.read_array(self._file, allow_pickle=False)


def _name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


def _start(member: zipfile.ZipInfo, mapped: mmap.mmap) -> int:
    """Where the content of a member begins, after its local header, which may differ in length from
    what the directory of the archive says (APPNOTE.TXT 4.3.7)."""
    at = member.header_offset + 26
    name, extra = (int.from_bytes(mapped[i : i + 2], "little") for i in (at, at + 2))
    return at + 4 + name + extra


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    with archive.open(member) as file:
        return _checked(_name(member), file, member.file_size)


def _checked(name: str, file: Any, size: int) -> Header:
    header = _header(file)
    start = header.size
    if header.dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which could run code and are not read")
    if start + header.nbytes != size:
        raise ValueError(
            f"{name} has {size - start:,} bytes, and its header says {header.shape} "
            f"of {header.dtype}, which are {header.nbytes:,}"
        )
    return header


def _header(file: Any) -> Header:
    version = npy.read_magic(file)
    read: Any = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array has the format {version}; expected that of numpy.savez")
    shape, fortran, dtype = read(file)
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"an array has the shape {shape}")
    return Header(shape, dtype, "F" if fortran else "C", file.tell())


@contextlib.contextmanager
def opened_file(path: places.Given, problem: str, advice: str = "") -> Iterator[Npz]:
    """Opens a file of ours; what is wrong with it is explained, see `failures.explained`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no .npz, or one that `Npz` refuses.
    """
    place = places.at(path)
    if not place.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with explained(path, problem, advice), place.open("rb") as file, opened(file) as content:
        yield content


@contextlib.contextmanager
def opened(file: Any) -> Iterator[Npz]:
    """Opens an .npz, a path or an open file.

    Raises:
        ValueError: as `Npz`; for what is no archive at all, the error of zipfile.
    """
    with zipfile.ZipFile(file) as archive:
        assert archive.fp
        yield Npz(archive, _size(archive.fp))


def _size(file: Any) -> int:
    position = file.tell()
    size = file.seek(0, 2)
    file.seek(position)
    return size
