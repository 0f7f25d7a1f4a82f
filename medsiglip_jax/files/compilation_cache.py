"""JAX's persistent compilation cache, as a folder that survives kills, full disks and damage.

JAX's own writes entries in place. One that a signal or a full disk has cut short is never replaced:
every start warns of it and compiles its program again. Where zstandard compresses the entries,
which checks no sum, flipped bits would be run as machine code.
"""

import contextlib
import hashlib
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from medsiglip_jax.files import cpu, storage, threads

# A command needs 10 to 40 programs of 2 to 60 kB on CPUs, of up to 10 MB on accelerators.
MOST = 1 << 30
_DIGEST = hashlib.sha256().digest_size
_SUFFIX = ".medsiglip-jax"
# The folder may be any that the user has named: of its files these are ours.
_PROGRAM = re.compile(rf".+-[0-9a-f]{{8}}{re.escape(_SUFFIX)}")
_TEMPORARY = re.compile(rf"\..+{re.escape(_SUFFIX)}\.[0-9a-f]{{8}}-\d+-[0-9a-f]{{8}}\.partial")
_OF_JAX = re.compile(r".+-(cache|atime)")
_LOOKS = 16  # times that a process looks at all entries while it writes as much as is kept
_ABANDONED = 3600.0  # seconds after which a temporary file is one of a writer that was killed


class CompilationCache:
    """Programs by key, as `jax._src.compilation_cache` asks for them.

    An entry is whole, or it is not there: what is damaged counts as missing, and is replaced. Of
    several processes that write one entry the last wins. No error of the disk is one of the
    command; the first that keeps an entry from being written is a warning.
    """

    def __init__(self, folder: str | os.PathLike, most: int = MOST, own: bool = False):
        """About `most` bytes are kept, of what was used last; 0 keeps nothing. In a folder that is
        our `own`, what jax's cache has written there counts, too."""
        self._folder, self._most, self._machine = Path(folder), most, machine()
        self._own, self._room, self._failed = own, -1, False  # bytes until it looks for room

    def get(self, key: str) -> bytes | None:
        """What was put under a key on a machine such as this one, or None."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        value = data[_DIGEST:]
        if hashlib.sha256(value).digest() != data[:_DIGEST]:
            return None
        with contextlib.suppress(OSError):  # a folder of someone else
            os.utime(path)
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keeps a value under a key, or warns that it cannot."""
        if self._failed or len(value) > self._most:
            return
        try:
            if len(value) > self._room:
                self._folder.mkdir(0o700, parents=True, exist_ok=True)  # it holds machine code
                self._make_room()
                self._room = max(len(value), self._most // _LOOKS)
            storage.replace(self._path(key), hashlib.sha256(value).digest() + value)
            self._room -= len(value)
        except OSError as error:
            self._failed = True
            warnings.warn(
                f"{self._folder}: compiled programs cannot be kept there, so that every start "
                f"compiles them again ({error.strerror or error}); JAX_COMPILATION_CACHE_DIR names "
                "another folder",
                stacklevel=2,
            )

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}-{self._machine}{_SUFFIX}"

    def _make_room(self) -> None:
        """Removes what was used longest ago, and what killed writers have left."""
        total, abandoned = 0, time.time() - _ABANDONED
        for path, used, size in sorted(self._files(), key=lambda file: -file[1]):
            is_temporary = _TEMPORARY.fullmatch(path.name)
            total += 0 if is_temporary else size
            if (used < abandoned) if is_temporary else (total > self._most):
                path.unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        """Path, time of the last use and bytes of our files in the folder."""
        names = (_PROGRAM, _TEMPORARY, *([_OF_JAX] if self._own else []))
        for entry in os.scandir(self._folder):
            if any(name.fullmatch(entry.name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                    found = entry.stat()
                    yield Path(entry.path), found.st_mtime, found.st_size


def machine() -> str:
    """8 hexadecimal digits of what a program is compiled for: the features and the number of cores.

    XLA runs what was compiled for others, up to illegal instructions. Its own key has the features,
    but not the number of cores, which goes into the program.
    """
    features = " ".join(sorted(cpu.features())) or platform.processor()
    parts = [platform.machine(), features, str(threads.processors())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
