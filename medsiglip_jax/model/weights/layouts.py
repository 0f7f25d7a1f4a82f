"""Opens checkpoints of every layout, checks them in full, and then reads them.

A layout (one file each, one row of `LAYOUTS`) turns a path into a `Checkpoint`: the architecture,
and for every parameter its shape, its dtype and a way to read it. `load_params` checks these
against the architecture, strictly in both directions, and then reads one parameter at a time.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medsiglip_jax.files import places, threads
from medsiglip_jax.files.credentials import without
from medsiglip_jax.model import towers, tree
from medsiglip_jax.model.weights import (
    big_vision,
    hub,
    huggingface,
    orbax,
    outputs,
    peft,
    processors,
)
from medsiglip_jax.model.weights.checkpoint import (
    FLOATS,
    Checkpoint,
    CheckpointError,
    copy,
    dtype_of,
    explained,
    not_finite,
    release,
    why_unreadable,
)
from medsiglip_jax.preprocess import tokenizer_files

# A path is opened by the first of them that recognises it.
LAYOUTS = {
    layout.name: layout
    for layout in (orbax.LAYOUT, peft.LAYOUT, huggingface.LAYOUT, big_vision.LAYOUT)
}
WRITABLE = {name: layout for name, layout in LAYOUTS.items() if layout.write}


def open_checkpoint(source: str | os.PathLike, token: str | None = None) -> Checkpoint:
    """Finds out which layout `source` has, and opens it without reading the weights.

    Args:
        source: a Hugging Face repo id, a checkpoint folder in HF layout, a folder of a PEFT
            adapter, a big_vision .npz, or a folder this project wrote; a local path or a URI
            (gs://…).
        token: Hugging Face access token; by default the user's stored login.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: something is there, but not a checkpoint that can be read here.
    """
    with places.in_words(str(source)):
        return _open_source(source, token, ())


def _open_source(source: str | os.PathLike, token: str | None, adapters: tuple) -> Checkpoint:
    """Opens the base of `adapters`, which are not opened as such again, or any checkpoint."""
    place, path = places.at(source), Path(source)
    remote = places.is_remote(source)
    if not remote and not path.exists() and path.suffix != ".npz" and hub.is_repo_id(str(source)):
        opened = _open(hub.download(str(source), token), source, token, adapters)
        return replace(opened, source=str(source), repo=str(source))
    if problem := outputs.explained(place):
        raise CheckpointError(source, [problem])
    if export := outputs.exported(place):
        opened = _open_source(str(export[0]), token, adapters)
        return replace(opened, notes=(export[1], *opened.notes))
    if remote:
        opened = _open(hub.fetch(str(source)), source, token, adapters)
        return replace(opened, source=without(str(source)))
    return _open(path, source, token, adapters)


def _open(path: Path, source: object, token: str | None, adapters: tuple) -> Checkpoint:
    for layout in LAYOUTS.values():
        if not layout.matches(path) or (layout.base and path.resolve() in adapters):
            continue
        if layout.base is None:
            return _with_companions(layout.open(path), layout.name, path)
        base = _open_base(layout.base(path), source, token, (*adapters, path.resolve()))
        return _of_adapter(layout.open(path, base), layout.name, path, base)
    expected = (
        "expected a checkpoint folder (config.json + *.safetensors), a big_vision .npz, a folder "
        "this project wrote, or a Hugging Face repo id like google/medsiglip-448"
    )
    if path.is_dir():
        problem = f"no config.json here, nor a single .npz; {_below(path) or expected}"
        raise CheckpointError(path, [why_unreadable(path, problem)])
    if path.suffix == ".safetensors" and path.exists():
        problem = "give the folder, not the file: config.json beside it holds the architecture"
        raise CheckpointError(source, [problem])
    if path.exists():
        raise CheckpointError(source, [why_unreadable(path, f"not a checkpoint; {expected}")])
    raise FileNotFoundError(f"{source}: no such file or folder; {expected}")


def _with_companions(checkpoint: Checkpoint, format: str, path: Path) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    config = processors.with_pixels(checkpoint.config, folder)
    return replace(
        checkpoint,
        format=format,
        config=processors.with_preparation(config, path),
        tokenizer=tokenizer_files.main_file(folder),
        companions=processors.companions(path) if path.is_dir() else (),
    )


def _of_adapter(checkpoint: Checkpoint, format: str, path: Path, base: Checkpoint) -> Checkpoint:
    """With the processor files of the adapter where it has some, and else those of its base."""
    opened = _with_companions(checkpoint, format, path)
    own = {file.name for file in opened.companions}
    own |= set(tokenizer_files.NAMES) if opened.tokenizer else set()
    others = [file for file in base.companions if file.name not in own]
    return replace(
        opened, tokenizer=opened.tokenizer or base.tokenizer,
        companions=(*opened.companions, *others),
    )  # fmt: skip


def _open_base(base: str, adapter: object, token: str | None, adapters: tuple) -> Checkpoint:
    try:
        return _open_source(base, token, adapters)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{adapter}: the base of this adapter is not there. Put it at {base}, or change "
            f"base_model_name_or_path in {peft.CONFIG} to where it is ({error})"
        ) from None


def _below(folder: Path) -> str | None:
    """Names the checkpoints that a folder holds, such as the model of a quickstart."""
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    found = [p for p in folders if any(layout.matches(p) for layout in LAYOUTS.values())]
    return f"give {' or '.join(map(str, found))}" if found else None


def check(checkpoint: Checkpoint) -> dict[str, Any]:
    """Checks a checkpoint against its architecture: every parameter present, every shape right.

    Returns:
        The tree of `jax.ShapeDtypeStruct` (float32) to fill.

    Raises:
        CheckpointError: lists every problem, those found while opening included.
    """
    shapes = towers.param_shapes(checkpoint.config)
    expected, problems = tree.flatten(shapes), list(checkpoint.problems)
    for path, want in expected.items():
        leaf = checkpoint.leaves.get(path)
        if leaf is None:
            problems.append(f"missing parameter {path} {want.shape}")
        elif leaf.problems:
            problems += leaf.problems
        elif leaf.shape != want.shape:
            problems.append(f"{path} has shape {leaf.shape}, the configuration wants {want.shape}")
        elif leaf.dtype not in FLOATS:
            problems.append(f"{path} is {leaf.dtype}; expected a float type")
    problems += [f"unexpected parameter {p}" for p in checkpoint.leaves if p not in expected]
    if problems:  # several parameters may share a tensor, which is named once
        raise CheckpointError(checkpoint.source, list(dict.fromkeys(problems)))
    return shapes


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the names and contents of the weight files, which identifies these weights."""
    total = hashlib.sha256()
    for path in checkpoint.files:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {content}\n".encode())
    return total.hexdigest()


def load_params(
    checkpoint: Checkpoint, dtype: str = "float32", shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reads a checkpoint into device arrays, one parameter at a time.

    Peak host memory is one parameter; on a CPU, where the result lies in host memory too, the
    result plus one parameter.

    Args:
        checkpoint: from `open_checkpoint`.
        dtype: storage type of the result, a key of `DTYPES`.
        shardings: tree of `jax.sharding.Sharding`, one per parameter; default: one device.

    Raises:
        CheckpointError: anything missing, unexpected, misshapen or unreadable, before or while
            reading; nothing is returned then.
    """
    target, shapes = dtype_of(dtype), check(checkpoint)
    flat_shardings = tree.flatten(shardings or {})

    def placed(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, target, sharding=flat_shardings.get(path))

    if checkpoint.restore:
        params = checkpoint.restore(tree.map_with_path(placed, shapes))
        for path, leaf in tree.items(params):
            _check_finite(checkpoint, path, int((~jnp.isfinite(leaf)).sum()))
        return params
    params = {}
    with ThreadPoolExecutor(max_workers=min(8, threads.processors())) as pool:
        for path, leaf in checkpoint.leaves.items():
            host = _read(checkpoint, path, leaf, target, pool)
            if (sharding := flat_shardings.get(path)) is None:
                params[path] = jax.device_put(host)
            else:
                params[path] = jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
    return tree.unflatten(params)


def _read(checkpoint, path, leaf, dtype, pool) -> np.ndarray:
    out = _aligned_empty(leaf.shape, dtype)
    targets = list(out) if len(leaf.parts) > 1 else [out]

    def fill(target, read) -> int:
        values = read()
        with np.errstate(over="ignore"):  # what does not fit is infinite, and counted
            wrong = copy(target, values.reshape(target.shape))  # a stack of one may lack axis 0
        release(values)
        return wrong

    with explained(checkpoint.source, f"{path} cannot be read"):
        wrong = sum(pool.map(fill, targets, leaf.parts))
    _check_finite(checkpoint, path, wrong)
    return out


def check_values(checkpoint: Checkpoint, shapes: dict[str, Any]) -> None:
    """Reads all parameters as they are stored, and keeps none.

    Args:
        checkpoint: from `open_checkpoint`.
        shapes: what `check` has returned for it.

    Raises:
        CheckpointError: one cannot be read, or has values that are NaN or infinite.
    """
    if checkpoint.restore:
        stored = {p: jax.ShapeDtypeStruct(leaf.shape, checkpoint.leaves[p].dtype)
                  for p, leaf in tree.items(shapes)}  # fmt: skip
        for path, leaf in tree.items(checkpoint.restore(tree.unflatten(stored))):
            _check_finite(checkpoint, path, not_finite(np.asarray(leaf)))
        return
    for path, leaf in checkpoint.leaves.items():
        with explained(checkpoint.source, f"{path} cannot be read"):
            wrong = sum(_count_not_finite(read()) for read in leaf.parts)
        _check_finite(checkpoint, path, wrong)


def _count_not_finite(values: np.ndarray) -> int:
    wrong = not_finite(values)
    release(values)
    return wrong


def _check_finite(checkpoint: Checkpoint, path: str, wrong: int) -> None:
    if wrong:
        problem = (
            f"{path} has {wrong:,} values that are NaN or infinite: the training that made it has "
            "diverged, the file is damaged, or the dtype asked for cannot hold them"
        )
        raise CheckpointError(checkpoint.source, [problem])


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a 64-byte boundary: XLA's CPU client adopts such memory without a
    copy, which is what keeps the peak at one times the result."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes].view(dtype).reshape(shape)
