"""big_vision .npz checkpoints: scanned or unrolled, with or without a "params/" prefix."""

import contextlib
import math
import mmap
import re
import zipfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from medsiglip_jax.files import arrays
from medsiglip_jax.files.failures import reason
from medsiglip_jax.model import tree
from medsiglip_jax.model.config import NAMED, ModelConfig, TextConfig, VisionConfig
from medsiglip_jax.model.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    Layout,
    Leaf,
    explained,
)

_LAYER = re.compile(r"(.*/encoderblock)_(\d+)(/.*)")


def open_npz(path: Path) -> Checkpoint:
    """Opens an .npz; only array headers are read, and nothing is unpickled."""
    file = _Arrays(path)
    keys, notes = _unwrap(file.kinds)
    leaves = _leaves(file, keys)
    sound = {name: leaf.shape for name, leaf in leaves.items() if not leaf.problems}
    try:
        config = infer_config(sound)
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        problems = [problem for leaf in leaves.values() for problem in leaf.problems]
        why = f"not a two-tower SigLIP: cannot infer the architecture ({reason(error)})"
        raise CheckpointError(path, [why, *problems]) from None
    return Checkpoint(str(path), config, leaves, files=(path,), notes=notes)


class _Arrays:
    """An .npz that stays open, so that its directory is read once, and mapped.

    Attributes:
        kinds: key -> (shape, dtype), from the .npy headers alone.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        with explained(path, "not a readable .npz"), contextlib.ExitStack() as opened:
            self._npz = opened.enter_context(arrays.opened(path))
            self.kinds = {
                key: (header.shape, _as_bfloat16(header.dtype))
                for key, header in self._npz.headers.items()
            }
            with open(path, "rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._opened = opened.pop_all()

    def read(self, key: str) -> np.ndarray:
        """A view of the file, or an array of what is compressed."""
        array = self._npz.view(key, self._mapped)
        return array.view(_as_bfloat16(array.dtype))


def _as_bfloat16(dtype: np.dtype) -> np.dtype:
    """npz has no bfloat16: big_vision stores it as 2-byte void (utils.py:827-833)."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype


def _unwrap(headers: Collection[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Parameter name -> key in the file; and notes on the parts of a train state left out."""
    for prefix in ("params/", "opt/target/"):
        keys = {key.removeprefix(prefix): key for key in headers if key.startswith(prefix)}
        if keys:
            rest = sorted({key.split("/")[0] for key in headers if not key.startswith(prefix)})
            return keys, (f"left out: {', '.join(rest)}",) if rest else ()
    return {key: key for key in headers}, ()


def _leaves(file: _Arrays, keys: dict[str, str]) -> dict[str, Leaf]:
    """Every parameter; one whose layers do not make a stack says so in its `problems`."""
    leaves: dict[str, Leaf] = {}
    stacks: dict[str, dict[int, str]] = {}
    for name, key in keys.items():
        if match := _LAYER.fullmatch(name):
            block, layer, rest = match.groups()
            stacks.setdefault(f"{block}{rest}", {})[int(layer)] = key
        else:
            shape, dtype = file.kinds[key]
            leaves[name] = Leaf(shape, dtype, (partial(file.read, key),))
    for name, layers in stacks.items():
        kinds = {file.kinds[key] for key in layers.values()}
        shape, dtype = next(iter(kinds))
        problems = ()
        if sorted(layers) != list(range(len(layers))) or len(kinds) != 1 or name in leaves:
            problems = (f"{name}: layers {sorted(layers)} do not make one stack: {kinds}",)
        readers = tuple(partial(file.read, layers[i]) for i in sorted(layers))
        leaves[name] = Leaf((len(layers), *shape), dtype, readers, problems)
    return leaves


def infer_config(shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """The architecture that parameters of these shapes belong to."""
    vision = text = None
    if any(name.startswith("img/") for name in shapes):
        patch, _, _, width = shapes["img/embedding/kernel"]
        grid = math.isqrt(shapes["img/pos_embedding"][1])
        image_size = _image_size(grid, patch)
        pool = "map" if "img/MAPHead_0/probe" in shapes else "mean"
        vision = VisionConfig(image_size, patch, width, *_encoder(shapes, "img/Transformer"), pool)
    if any(name.startswith("txt/") for name in shapes):
        vocab_size, width = shapes["txt/Embed_0/embedding"]
        length, embed_dim = shapes["txt/pos_embedding"][1], shapes["txt/head/kernel"][1]
        text = TextConfig(vocab_size, length, width, *_encoder(shapes, "txt/Encoder_0"), embed_dim)
    return ModelConfig(vision, text)


def _encoder(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, int, int]:
    """Depth, width of the MLP and number of heads."""
    block = f"{name}/encoderblock"
    depth, _, num_heads, _ = shapes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"]
    mlp_dim = shapes[f"{block}/MlpBlock_0/Dense_0/kernel"][-1]
    return depth, mlp_dim, num_heads


def contradictions(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Which numbers of an architecture are not those of parameters of these shapes; none where
    parameters are missing, which is found later."""
    with contextlib.suppress(KeyError, ValueError, IndexError):
        told = infer_config(shapes)
        towers = ("vision", config.vision, told.vision), ("text", config.text, told.text)
        return [
            f"{name}.{field} is {value}, and the parameters are of {getattr(theirs, field)}"
            for name, ours, theirs in towers
            if ours and theirs
            for field, value in vars(ours).items()
            if field not in _UNTOLD and value != getattr(theirs, field)
            if field != "image_size" or ours.num_tokens != theirs.num_tokens
        ]
    return []


# What shapes do not tell. Of the size of images they tell only how many patches fit into it.
_UNTOLD = ("pool", "pixels")


def _image_size(grid: int, patch: int) -> int:
    """Side of the images: that of a released model with this grid (27 patches of 14 px: 384 px, not
    378), else grid * patch."""
    sizes = [c.vision for c in NAMED.values() if c.vision and c.vision.patch_size == patch]
    return next((v.image_size for v in sizes if v.grid == grid), grid * patch)


def write_npz(path: Path, params: dict[str, Any]) -> None:
    """Writes the unrolled layout of the released SigLIP checkpoints, under "params/"."""
    if "classifier" in params:
        raise ValueError("an .npz cannot hold the labels of a classifier; write --format orbax")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for key, leaf in tree.items(params):
            names, array = tree.layer_paths(key, leaf), np.asarray(leaf)
            if array.dtype == np.dtype(ml_dtypes.bfloat16):
                array = array.view("V2")
            for name, layer in zip(names, array if tree.STACK in key else [array], strict=True):
                with archive.open(f"params/{name}.npy", "w", force_zip64=True) as file:
                    npy.write_array(file, np.ascontiguousarray(layer), allow_pickle=False)


_FILE = "params.npz"


def _npz_in(path: Path) -> list[Path]:
    return [path] if path.suffix == ".npz" else sorted(path.glob("*.npz"))


LAYOUT = Layout(
    "big_vision",
    marker=_FILE,
    recognise=lambda path: len(_npz_in(path)) == 1,
    open=lambda path: open_npz(_npz_in(path)[0]),
    write=lambda folder, params, config: write_npz(folder / _FILE, params),
    write_file=write_npz,
)
