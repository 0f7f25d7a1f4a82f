"""A model as one line of text, and as something that can be pickled and sent to other machines."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from medsiglip_jax.model import attention, devices, tree
from medsiglip_jax.model.config import NAMED
from medsiglip_jax.model.towers import Compute


class HeldFile(NamedTuple):
    """The content of a file that lay beside the weights, where they were loaded."""

    name: str
    content: bytes

    def read_bytes(self) -> bytes:
        return self.content

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.content.decode(encoding, errors)


Companion = Path | HeldFile


def line(model: Any) -> str:
    """What `repr` says: name, parameters, bytes, dtype, inputs and devices."""
    leaves = [leaf for _, leaf in tree.items(model.params)]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    dtypes = "+".join(sorted({str(leaf.dtype) for leaf in leaves}))
    where = {str(d) for leaf in leaves if isinstance(leaf, jax.Array) for d in leaf.devices()}
    config = model.config
    parts = [
        f"{sum(leaf.size for leaf in leaves):,} parameters, {size / 2**20:,.1f} MiB {dtypes}",
        *([f"images of {config.image_size} px"] if config.vision else []),
        *([f"texts of {config.context_length} tokens"] if config.text else []),
        *([f"{len(config.classifier.labels)} labels"] if config.classifier else []),
        f"on {', '.join(sorted(where)) or 'the host'}",
    ]
    return f"<Model {_name(model)}: {', '.join(parts)}>"


def _name(model: Any) -> str:
    """Where it is from, or which of the named sizes it has."""
    sizes = (name for name, config in NAMED.items() if config == model.config)
    return model.source or f"{next(sizes, 'of its own size')}, not from a file"


def state(model: Any) -> dict[str, Any]:
    """The arguments of `Model` that make it again without the files that it was loaded from.

    Parameters become numpy arrays, so that they can go to other devices; a mesh stays behind.
    """
    source, checkpoint = model.processor.tokenizer_source, model.checkpoint
    if checkpoint is not None:
        checkpoint = dataclasses.replace(checkpoint, leaves={}, tokenizer=None, companions=())
    return {
        "params": jax.tree.map(np.asarray, model.params),
        "config": model.config,
        "tokenizer": None if source is None else model.processor.tokenizer_files(),
        "compute": dataclasses.replace(model.compute, rows=None),
        "checkpoint": checkpoint,
        "companions": [HeldFile(file.name, file.read_bytes()) for file in model.companions],
        "sha256": sha256(model),
    }


def sha256(model: Any) -> str | None:
    """The hash of the weights, or None where their files are gone and nobody has asked before."""
    try:
        return model.sha256
    except FileNotFoundError:
        return None


def compute_here(compute: Compute, config: Any) -> Compute:
    """The same arithmetic on this process's device, whose attention back ends may be others."""
    device = devices.default()
    wide = devices.wide_products(device, compute.dtype)
    compute = dataclasses.replace(compute, wide=wide)
    try:
        attention.check(compute.attention, device, compute.dtype, config.vision)
    except ValueError:
        return dataclasses.replace(compute, attention=attention.default(device, 1))
    return compute
