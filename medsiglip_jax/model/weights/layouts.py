"""Opens checkpoints of every layout, and checks them against their architecture.

A layout (one file each, one row of `LAYOUTS`) turns a path into a `Checkpoint`: the architecture,
and for every parameter its shape, its dtype and a way to read it. `check` compares these with the
architecture, strictly in both directions; `reading` then reads the values.
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from medsiglip_jax.files import places
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
