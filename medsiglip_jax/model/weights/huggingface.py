"""Hugging Face SigLIP v1 folders: config.json and safetensors, read and written.

Also the vision tower of MedGemma / Gemma 3 folders, which has no pooling head.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import places
from medsiglip_jax.files.failures import reason
from medsiglip_jax.model import towers, tree
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.weights import huggingface_config, processors
from medsiglip_jax.model.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    Layout,
    Leaf,
    explained,
    why_unreadable,
)
from medsiglip_jax.model.weights.names import Entry, entries, tensor_shape
from medsiglip_jax.model.weights.safetensors import DTYPES, Tensors
from medsiglip_jax.preprocess import tokenizer_files

_CONFIG = "config.json"

# ------------------------------------------------------------------------------------ reading


def open_folder(path: Path) -> Checkpoint:
    """Opens a folder that has a config.json; nothing but headers is read."""
    raw = read_json(path / _CONFIG)
    with explained(path / _CONFIG, "not an architecture that is supported"):
        config = huggingface_config.parse(raw)
    files, notes = _weight_files(path, raw.get("transformers_weights"))
    names = open_files(path, files)
    _check_prefix(path, names, config)
    if raw["model_type"] in huggingface_config.GEMMA:
        tensors, problems, left_out = _select_of_gemma(names)
    else:
        tensors, problems, left_out = _select(names, raw["model_type"]), [], []
    shapes = {name: file.shape(stored) for name, (stored, file) in tensors.items()}
    if wrong := huggingface_config.contradictions(config, shapes):
        raise CheckpointError(path / _CONFIG, wrong)
    leaves, unused = _leaves(config, tensors)
    problems += [f"unexpected tensor {tensors[name][0]}" for name in unused]
    notes += [_NO_POOLING] if config.vision and config.vision.pool == "mean" else []
    notes += [f"left out: {', '.join(left_out)}"] if left_out else []
    return Checkpoint(str(path), config, leaves, tuple(files), problems, notes)


_NO_POOLING = (
    "no pooling head in this checkpoint: encode_image returns the mean of the patch tokens, "
    "which no contrastive training has aligned with any text"
)


def _leaves(config: ModelConfig, tensors: dict[str, tuple]) -> tuple[dict[str, Leaf], list[str]]:
    """Checks every tensor against the architecture.

    Returns:
        The parameters, each with the problems of its tensors; and the tensors that are not needed.
    """
    leaves, unused, groups = {}, set(tensors), grouped(config, "path")
    for path, parameter in tree.items(towers.param_shapes(config)):
        readers, problems, dtype = [], [], np.dtype("f4")
        for entry in groups[path]:
            unused.discard(entry.name)
            if entry.name not in tensors:
                problems.append(f"missing tensor {entry.name}")
                continue
            name, file = tensors[entry.name]
            stored, shape = file.stored(name), entry.part(parameter.shape)
            dtype = DTYPES.get(stored, dtype)
            got, want = file.shape(name), tensor_shape(entry, shape)
            if stored not in DTYPES:
                expected = f"expected a float type, {', '.join(DTYPES)}"
                problems.append(f"{name} is {stored}; {expected}")
            elif got != want:
                problems.append(f"{name} has shape {got}, the configuration wants {want}")
            readers.append(partial(_read_tensor, file, name, entry, shape))
        leaves[path] = Leaf(parameter.shape, dtype, tuple(readers), tuple(problems))
    return leaves, sorted(unused)


def grouped(config: ModelConfig, key: str) -> dict[str, list[Entry]]:
    """The entries by their "path", or by their "name"."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries(config):
        groups.setdefault(getattr(entry, key), []).append(entry)
    return groups


def _read_tensor(file: Tensors, name: str, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    return entry.to_jax(file.read(name), shape)


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def _weight_files(path: Path, named: Any) -> tuple[list[Path], list[str]]:
    """The files that transformers would read, and notes about those it would ignore.

    A single file comes before an index (transformers modeling_utils.py,
    `_get_resolved_checkpoint_files`); config.json may name another file as `transformers_weights`.
    """
    if named is not None and not _is_weights(named, ".safetensors", ".safetensors.index.json"):
        problem = f"transformers_weights is {named!r}; expected a plain .safetensors file name"
        raise CheckpointError(path / _CONFIG, [problem])
    there = [name for name in (named, _SINGLE, _INDEX) if name and (path / name).is_file()]
    if not there or (named and there[0] != named):
        problem = f"no weights here; expected {named or f'{_SINGLE} or {_INDEX}'}"
        raise CheckpointError(path, [why_unreadable(path, problem)])
    chosen = path / there[0]
    files = _indexed_files(chosen) if chosen.suffix == ".json" else [chosen]
    ignored = [name for name in there[1:] if path / name not in [chosen, *files]]
    note = f"ignored, as by transformers, which reads {there[0]}: {', '.join(ignored)}"
    return files, [note] if ignored else []


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(index, ["no weight_map of tensor names to file names"])
    names = sorted(set(weight_map.values()))
    problems = [
        f"weight_map names {name!r}; expected a plain file name in the same folder"
        for name in names
        if not _is_weights(name, ".safetensors")
    ]
    problems = problems or [f"{n} is missing" for n in names if not (index.parent / n).is_file()]
    if problems:
        raise CheckpointError(index, problems)
    return [index.parent / name for name in names]


def _is_weights(name: Any, *suffixes: str) -> bool:
    return places.is_plain_name(name) and name.endswith(suffixes)


def open_files(path: Path, files: list[Path]) -> dict[str, Tensors]:
    """Tensor -> its open file."""
    found: dict[str, Tensors] = {}
    problems = []
    for file in files:
        try:
            opened = Tensors(file)
        except (OSError, ValueError) as error:
            problems.append(f"{file.name} is not a readable safetensors file: {reason(error)}")
            continue
        twice = found.keys() & set(opened.names())
        problems += [f"tensor {name} is in two files, also in {file.name}" for name in twice]
        found |= dict.fromkeys(opened.names(), opened)
    if problems:
        raise CheckpointError(path, problems)
    return found


def read_json(path: Path) -> dict[str, Any]:
    with explained(path, "not a JSON object"):
        return json_files.parse(path.read_text(encoding="utf-8"))


# Where the SigLIP vision tower sits in a Gemma 3 / MedGemma checkpoint, by transformers version.
GEMMA_PREFIXES = ("vision_tower.", "model.vision_tower.")
GEMMA_OTHERS = ("language_model.", "multi_modal_projector.", "model.", "lm_head.")


# A tower that was saved by itself has names with the first part (transformers 4) or without it.
_ALONE = {"siglip_vision_model": "vision_model.", "siglip_text_model": "text_model."}
# A buffer that older versions of transformers saved: 0, 1, 2, …
_POSITION_IDS = "embeddings.position_ids"


def _check_prefix(path: Path, names: dict[str, Any], config: ModelConfig) -> None:
    """Raises an error of one line if all names begin with what a wrapper has added to them."""
    wanted = next(entries(config)).name
    found = next((name for name in names if name.endswith(f".{wanted}")), "")
    prefix = found.removesuffix(wanted)
    if found and prefix not in GEMMA_PREFIXES and all(name.startswith(prefix) for name in names):
        raise CheckpointError(path, [
            f"all {len(names)} tensor names begin with {prefix!r}, which DataParallel ('module.'), "
            "torch.compile ('_orig_mod.') or another wrapper adds; save the model inside of it "
            "(model.module, model._orig_mod), or remove it from the names"
        ])  # fmt: skip


def _select(names: dict[str, Any], kind: str) -> dict[str, tuple]:
    """SigLIP name -> (name in the file, the file)."""
    alone = _ALONE.get(kind, "")
    tensors: dict[str, tuple] = {}
    for name, file in names.items():
        if not name.endswith(_POSITION_IDS):
            tensors[name if name.startswith(alone) else alone + name] = (name, file)
    return tensors


def _select_of_gemma(names: dict[str, Any]) -> tuple[dict[str, tuple], list[str], list[str]]:
    """Finds the tensors of the SigLIP vision tower in a Gemma checkpoint.

    Returns:
        SigLIP name -> (name in the file, the file); problems; the parts that were left out.
    """
    tensors: dict[str, tuple] = {}
    left_out, problems, tower = set(), [], _ALONE["siglip_vision_model"]
    for name, file in names.items():
        prefix = next((p for p in GEMMA_PREFIXES if name.startswith(p)), None)
        if prefix:  # transformers 5 writes it without the tower's own first part
            plain = name.removeprefix(prefix).removeprefix(tower)
            if plain.startswith("head."):  # Gemma reads the patch tokens, whatever pools them
                left_out.add("the tower's pooling head, which Gemma does not use")
            else:
                tensors[tower + plain] = (name, file)
        elif name.startswith(GEMMA_OTHERS):
            left_out.add(name.removeprefix("model.").split(".")[0])
        else:
            problems.append(f"unexpected tensor {name}")
    return tensors, problems, sorted(left_out)


# ------------------------------------------------------------------------------------ writing


def write_folder(folder: Path, params: dict[str, Any], config: ModelConfig) -> None:
    """Writes what `transformers.SiglipModel.from_pretrained` and its processor load.

    Args:
        folder: a folder that holds the processor files, if there are any, and nothing else.
        params: the model's tree; each leaf's dtype is kept.
        config: the architecture.
    """
    dtype = str(next(leaf for _, leaf in tree.items(params)).dtype)
    files = {_CONFIG: huggingface_config.model(config, dtype)}
    if config.vision and not processors.image_processors(folder):
        files[processors.PREPROCESSOR] = huggingface_config.preprocessor(config.vision)
    alone = {name for name in tokenizer_files.NAMES if (folder / name).is_file()}
    if config.text and alone == {tokenizer_files.SENTENCEPIECE}:
        files[tokenizer_files.CONFIG] = huggingface_config.tokenizer(config.text)
        special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
        files[tokenizer_files.SPECIAL_MAP] = special
    if config.vision and config.text:
        files |= huggingface_config.sentence_transformers(config.text)
    for name, content in files.items():
        json_files.write(folder / name, content)
    _write_safetensors(folder / "model.safetensors", params, config)


def tensor(group: list[Entry], flat: Mapping[str, Any]) -> np.ndarray:
    """The tensor that holds the parameters of these entries, path -> array."""
    leaves = [np.asarray(flat[entry.path]) for entry in group]
    shape = tensor_shape(group[0], group[0].part(leaves[0].shape))
    layers = [x if e.layer is None else x[e.layer] for e, x in zip(group, leaves, strict=True)]
    parts = [e.to_huggingface(x).ravel() for e, x in zip(group, layers, strict=True)]
    return np.concatenate(parts).reshape(shape)


def _write_safetensors(path: Path, params: dict[str, Any], config: ModelConfig) -> None:
    """Streams tensor by tensor: the library's own writer would hold a second copy of everything."""
    flat, groups = tree.flatten(params), grouped(config, "name")
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, group in groups.items():
        leaf, first = flat[group[0].path], group[0]
        shape = tensor_shape(first, first.part(leaf.shape))
        end = offset + int(np.prod(shape)) * leaf.dtype.itemsize
        header[name] = dict(dtype=codes[leaf.dtype], shape=shape, data_offsets=[offset, end])
        offset = end
    encoded = json_files.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for group in groups.values():
            for entry in group:
                leaf = np.asarray(flat[entry.path])
                tensor = entry.to_huggingface(leaf if entry.layer is None else leaf[entry.layer])
                file.write(np.ascontiguousarray(tensor).view(np.uint8).data)


LAYOUT = Layout("huggingface", _CONFIG, open=open_folder, write=write_folder)
