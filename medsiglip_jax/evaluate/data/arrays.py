"""The adapters "npz" and "h5": images inside arrays, which the embedding engine reads like files.

An image has the address `array:///data/x.npz/test_images/17`. A file system of fsspec answers with
image 17 of that array as a portable pixmap: a header, then the bytes as they are. Nothing is
written, no pixel is changed, and batches, resuming and provenance are those of files.
"""

import functools
import gzip
import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.spec import AbstractFileSystem
from jaxtyping import Float32

from medsiglip_jax.data.labels import Policy
from medsiglip_jax.evaluate.data.dataset import Dataset, where_to_get
from medsiglip_jax.evaluate.data.layout import ArrayData, ArrayName
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files import arrays, limits, places, storage
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.places import Place, refuse_remote

PROTOCOL = "array"
# Bytes of an unpacked file: nine times the images of PatchCamelyon's training part, 7,247,757,312.
_MOST = 64 << 30
_BLOCK = 1 << 20


class Arrays(AbstractFileSystem):
    """Serves /FILE/KEY/NUMBER as a portable pixmap."""

    protocol = PROTOCOL

    def cat_file(self, path: str, start=None, end=None, **kwargs) -> bytes:
        name, key, number = path.rsplit("/", 2)
        return pixmap(_array(name, key)[int(number)])[start:end]

    def _open(self, path: str, *args, **kwargs) -> Any:
        return io.BytesIO(self.cat_file(path))


def pixmap(pixels: np.ndarray) -> bytes:
    """uint8 [H, W], [H, W, 1] or [H, W, 3] as PGM or PPM.

    Raises:
        ValueError: other pixels.
    """
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(f"{pixels.dtype} {pixels.shape}; expected uint8 [H, W] or [H, W, 3]")
    kind = b"P5" if pixels.ndim == 2 else b"P6"
    return b"%s %d %d 255\n" % (kind, pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def read(task: Task, layout: ArrayData, root: Place, policy: Policy, prefer: str = "") -> Dataset:
    """Reads labels; images stay where they are until they are embedded.

    Raises:
        FileNotFoundError: a file is missing.
        ModuleNotFoundError: .h5 needs h5py.
        ValueError: arrays are missing, or have other shapes.
    """
    refuse_remote(root)
    both = layout.images, layout.labels
    images, file = (_first_file(task, Path(str(root)), array, layout) for array in both)
    key, pixels = layout.images.key, _array(str(images), layout.images.key)
    shape, labels = pixels.shape, np.asarray(_array(str(file), layout.labels.key))
    if pixels.dtype != np.uint8:
        raise ValueError(f"{images}: {key} is {pixels.dtype}; expected uint8")
    if labels.dtype.kind not in "biuf" or not np.isfinite(labels).all():
        what = "finite numbers" if labels.dtype.kind == "f" else "numbers"
        raise ValueError(f"{file}: {layout.labels.key} is {labels.dtype}; expected {what}")
    if len(labels) != shape[0] or len(shape) not in (3, 4):
        raise ValueError(
            f"{images}: {key} has shape {shape} and {layout.labels.key} {labels.shape}; expected "
            "[n, H, W] or [n, H, W, channels], and one label for each image"
        )
    fsspec.register_implementation(PROTOCOL, Arrays, clobber=True)
    limits.allow(PROTOCOL)
    address = f"{PROTOCOL}://{images}/{key}"
    ids = [f"{images.name}/{key}/{i}" for i in range(len(labels))]  # parts may differ in the file
    sources = [f"{address}/{i}" for i in range(len(labels))]
    of_classes = _labels(task, file, labels.reshape(len(labels), -1))
    return Dataset(ids, sources, of_classes, tuple(c.value for c in task.classes), files=[file])


def fits(task: Task, layout: ArrayData, root: Place) -> bool:
    """Whether a folder has the files of both arrays."""
    both = layout.images, layout.labels
    return isinstance(root, Path) and all(first_file(root, array, layout) for array in both)


def _labels(task: Task, file: Path, stored: np.ndarray) -> Float32[np.ndarray, "n c"]:
    count = len(task.classes)
    if task.kind == "multi_label" and stored.shape[1] == count and np.isin(stored, (0, 1)).all():
        return stored.astype(np.float32)
    numbers = {c.value: i for i, c in enumerate(task.classes)}
    index = [numbers.get(str(int(x)), -1) if x == int(x) else -1 for x in stored[:, 0].tolist()]
    if task.exclusive and stored.shape[1] == 1 and -1 not in index:
        return np.eye(count, dtype=np.float32)[index]
    raise ValueError(
        f"{file}: labels have shape {stored.shape} and values {np.unique(stored)[:8].tolist()}; "
        f"task {task.name} is {task.kind} with {count} classes: {', '.join(numbers)}"
    )


def _first_file(task: Task, root: Path, array: ArrayName, layout: ArrayData) -> Path:
    path = first_file(root, array, layout)
    if path is None:
        names = " or ".join(Path(name).name for name in array.file or layout.file)
        raise FileNotFoundError(f"{root}: no {names}{where_to_get(task)}")
    return unpacked(path) if path.suffix == ".gz" else path.absolute()


def first_file(root: Path, array: ArrayName, layout: ArrayData) -> Path | None:
    """The file of an array, compressed or not; None if there is none."""
    paths = (root / (name + gz) for name in array.file or layout.file for gz in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def unpacked(path: Path) -> Path:
    """A copy in the cache of what a .gz holds, which is made once.

    Arrays are read at any place, and gzip only from the start.

    Raises:
        ValueError: it is not gzip, or holds more than `_MOST` bytes.
    """
    path, status = path.absolute(), path.stat()
    identity = f"{path} {status.st_size} {status.st_mtime_ns}"
    folder = places.cache() / "unpacked" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    copy = folder / path.stem
    if copy.is_file():
        return copy
    with storage.new_file(copy) as partial, open(partial, "wb") as file:
        with explained(path, "not readable as gzip"), gzip.open(path) as stream:
            while data := stream.read(_BLOCK):
                if file.tell() + len(data) > _MOST:
                    raise ValueError(f"{path}: holds more than {_MOST:,} bytes; unpack it yourself")
                file.write(data)
        size = file.tell()
    warnings.warn(
        f"{path}: unpacked once to {copy}, {size:,} bytes, which may be deleted later", stacklevel=2
    )
    return copy


def _array(path: str, key: str) -> Any:
    """The array: of .npz in memory, of .h5 in the file."""
    status = os.stat(path)
    return _opened(path, key, (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _opened(path: str, key: str, version: tuple[int, ...]) -> Any:
    """The array of the file as it is now: `version` tells it from an earlier one of that name."""
    if not path.endswith(".npz"):
        return _h5(path, key)
    with explained(path, "not arrays that can be read"), arrays.opened(path) as file:
        if key not in file.headers:
            raise ValueError(f"no array {key!r}; there are {', '.join(file.headers)}")
        return file.read(key)


def _h5(path: str, key: str) -> Any:
    try:
        import h5py
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: reading HDF5 needs h5py: pip install 'medsiglip-jax[evaluate]'"
        ) from None
    with explained(path, "not readable as HDF5"):
        # A chunk holds many images and is decompressed as a whole: keep the last ones.
        file = h5py.File(path, "r", rdcc_nbytes=64 << 20)
    if key not in file:
        raise ValueError(f"{path}: no array {key!r}; there are {', '.join(file)}")
    array = file[key]
    if not isinstance(array, h5py.Dataset):
        raise ValueError(f"{path}: {key!r} is no array")
    if array.file.filename != path or array.external or array.is_virtual:
        raise ValueError(f"{path}: the array {key!r} lies in another file; copy it into this one")
    return array
