"""Vectors in HDF5."""

from typing import Any

import numpy as np

from medsiglip_jax.embeddings.elsewhere import found
from medsiglip_jax.files import places

_MOST_ARRAYS = 1000
_BLOCK = 1024  # names, each of any length, that are read at once
# As in `files.arrays`: what unpacks to more and is packed more tightly was made to fill the memory.
_TIGHTEST, _HARMLESS = 100, 256 << 20


def read(path: places.Place) -> found.Found:
    """The vectors and their names; see `formats`."""
    import h5py

    with path.open("rb") as stream, h5py.File(stream, "r") as file:
        datasets = _datasets(file)
        floats = [n for n, d in datasets.items() if d.ndim == 2 and d.dtype.kind == "f"]
        vectors = datasets[found.pick_vectors(floats)]
        names = {n: d for n, d in datasets.items() if _are_names(d, len(vectors))}
        for dataset in (vectors, *names.values()):
            _check(dataset)
        columns = {n: _texts(dataset) for n, dataset in names.items()}
        return found.named(path, vectors[:], columns)


def _datasets(file: Any) -> dict[str, Any]:
    import h5py

    datasets: dict[str, Any] = {}

    def visit(name: str, item: Any) -> bool | None:  # links into other files are not followed
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            datasets[name] = item
        return True if len(datasets) > _MOST_ARRAYS else None

    if file.visititems(visit):
        raise ValueError(f"more than {_MOST_ARRAYS:,} arrays")
    return datasets


def _is_text(dataset: Any) -> bool:
    import h5py

    return h5py.check_string_dtype(dataset.dtype) is not None


def _are_names(dataset: Any, count: int) -> bool:
    is_text = _is_text(dataset) and dataset.shape == (count,)
    return is_text or found.are_names(dataset.shape, dataset.dtype, count)


def _check(dataset: Any) -> None:
    """Raises ValueError for an array that lies in another file, or would fill the memory."""
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} lies in another file; copy it into this one")
    found.check_bytes(dataset.nbytes)
    if dataset.nbytes > max(_HARMLESS, _TIGHTEST * dataset.id.get_storage_size()):
        raise ValueError(
            f"{dataset.name}: {dataset.id.get_storage_size():,} bytes would unpack to "
            f"{dataset.nbytes:,}; write it anew without compression, if it really holds so much"
        )


def _texts(dataset: Any) -> list[str]:
    if not _is_text(dataset):
        return found.texts(np.asarray(dataset[:]))
    texts, size = [], 0
    for start in range(0, len(dataset), _BLOCK):
        block = dataset.asstr("utf-8")[start : start + _BLOCK].tolist()
        size += sum(map(len, block))
        found.check_bytes(size)
        texts += block
    return texts
