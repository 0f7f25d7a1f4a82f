"""The tensors of a safetensors file, as views of the file."""

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medsiglip_jax.files import json as json_files

# The names of `checkpoint.FLOATS` in safetensors.
DTYPES = {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2")}
DTYPES["BF16"] = np.dtype(ml_dtypes.bfloat16)


class Tensors:
    """An open safetensors file.

    The library's own reader copies every tensor, and pages of the file that were read stay in the
    memory of the process. A view of a mapped file costs neither: see `copies.release`.
    """

    def __init__(self, path: Path):
        """Opens and maps the file.

        Raises:
            OSError, ValueError: it is no safetensors file; the library has checked the size of the
                header, the offsets and the length of the file.
        """
        try:
            safe_open(path, framework="numpy").keys()
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json_files.parse(file.read(length))
            size = os.fstat(file.fileno()).st_size
            self._mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        self._entries, self._start = header, 8 + length

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def stored(self, name: str) -> str:
        """The name of its element type, a key of `DTYPES` if that is a float."""
        return self._entries[name]["dtype"]

    def read(self, name: str) -> np.ndarray:
        """A view of the file.

        Raises:
            ValueError: its element type is none of `DTYPES`.
        """
        if self.stored(name) not in DTYPES:
            raise ValueError(f"{name} is {self.stored(name)}; expected {', '.join(DTYPES)}")
        start, end = self._entries[name]["data_offsets"]
        dtype = DTYPES[self.stored(name)]
        count = (end - start) // dtype.itemsize
        flat = np.frombuffer(self._mapped, dtype, count, self._start + start)
        return flat.reshape(self.shape(name))


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file as torch's users read it."""
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
