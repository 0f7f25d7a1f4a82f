"""Hugging Face SigLIP v1 folders: config.json and safetensors, read and written.

Also the vision tower of MedGemma / Gemma 3 folders, which has no pooling head.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from medsiglip_jax.model import towers, tree
from medsiglip_jax.model.config import ModelConfig, TextConfig, VisionConfig
from medsiglip_jax.model.weights.checkpoint import (
    PICKLES,
    TOKENIZER,
    Checkpoint,
    CheckpointError,
    Layout,
    Leaf,
    pickle_problem,
    tokenizer_in,
)
from medsiglip_jax.model.weights.names import Entry, entries, tensor_shape

_CONFIG = "config.json"

# ------------------------------------------------------------------------------------ reading


def open_folder(path: Path) -> Checkpoint:
    """Opens a folder that has a config.json; nothing but headers is read."""
    raw = _read_json(path / _CONFIG)
    config, gemma, notes = _parse_config(path, raw)
    files = _weight_files(path)
    handles = _open_files(path, files)
    names = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
    mine, problems, left_out = _select(names, gemma)
    leaves, unused = _leaves(config, mine)
    problems += [f"unexpected tensor {mine[name][0]}" for name in unused]
    if left_out:
        notes = (*notes, f"left out: {', '.join(left_out)}")
    return Checkpoint(
        source=str(path),
        format="huggingface",
        config=config,
        leaves=leaves,
        problems=problems,
        files=tuple(files),
        tokenizer=tokenizer_in(path),
        notes=notes,
    )


def _leaves(config: ModelConfig, tensors: dict[str, tuple]) -> tuple[dict[str, Leaf], list[str]]:
    """Holds every tensor against the architecture.

    Returns:
        The parameters, each with what is wrong with its tensors; the tensors that none needs.
    """
    shapes = tree.flatten(towers.param_shapes(config))
    readers: dict[str, list] = {path: [] for path in shapes}
    problems: dict[str, list[str]] = {path: [] for path in shapes}
    dtypes: dict[str, np.dtype] = {}
    unused = set(tensors)
    for entry in entries(config):
        unused.discard(entry.name)
        shape = shapes[entry.path].shape
        shape = shape if entry.layer is None else shape[1:]
        tensor = tensors.get(entry.name)
        problem, dtypes[entry.path] = _check_tensor(tensor, entry, tensor_shape(entry, shape))
        if problem:
            problems[entry.path].append(problem)
        elif tensor is not None:
            name, handle = tensor
            readers[entry.path].append(partial(_read_tensor, handle, name, entry, shape))
    leaves = {
        path: Leaf(
            shape=shapes[path].shape,
            dtype=dtypes[path],
            parts=tuple(readers[path]),
            stacked="/encoderblock/" in path,
            problems=tuple(problems[path]),
        )
        for path in shapes
    }
    return leaves, sorted(unused)


def _check_tensor(tensor, entry: Entry, want: tuple[int, ...]) -> tuple[str | None, np.dtype]:
    """What is wrong with a tensor's header, if anything, and its dtype."""
    if tensor is None:
        return f"missing tensor {entry.name}", np.dtype("V1")
    name, handle = tensor
    header = handle.get_slice(name)
    got = tuple(header.get_shape())
    wrong = f"{name} has shape {got}, the configuration wants {want}" if got != want else None
    return wrong, _dtype(header.get_dtype())


def _read_tensor(handle, name: str, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    return entry.to_jax(handle.get_tensor(name), shape)


def _dtype(name: str) -> np.dtype:
    if name == "BF16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"F64": "f8", "F32": "f4", "F16": "f2"}.get(name, "V1"))


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(index)
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = [p.name for p in path.iterdir() if p.suffix in PICKLES]
    raise CheckpointError(
        path, [pickle_problem(pickles[0]) if pickles else
               "no weights here; expected model.safetensors or model.safetensors.index.json"]
    )  # fmt: skip


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(index, ["no weight_map of tensor names to file names"])
    names = sorted(set(weight_map.values()))
    problems = [
        f"weight_map names {name!r}; expected a plain file name in the same folder"
        for name in names
        if not re.fullmatch(r"[\w.\-]+\.safetensors", name)
    ]
    problems = problems or [f"{n} is missing" for n in names if not (index.parent / n).is_file()]
    if problems:
        raise CheckpointError(index, problems)
    return [index.parent / name for name in names]


def _open_files(path: Path, files: list[Path]) -> list:
    """Opens every file (the library checks header size, offsets and file length)."""
    handles, problems = [], []
    for file in files:
        try:
            handles.append(safe_open(file, framework="numpy"))
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{file.name} is not a readable safetensors file: {error}")
    seen: set[str] = set()
    for handle, file in zip(handles, files, strict=False):
        twice = seen & set(handle.keys())
        problems += [f"tensor {name} is in two files, also in {file.name}" for name in twice]
        seen |= set(handle.keys())
    if problems:
        raise CheckpointError(path, problems)
    return handles


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(path, [f"not readable as JSON: {error}"]) from None
    if not isinstance(content, dict):
        raise CheckpointError(path, [f"expected a JSON object, got {type(content).__name__}"])
    return content


# Where the SigLIP vision tower sits in a Gemma 3 / MedGemma checkpoint, by transformers version.
_GEMMA_PREFIXES = ("vision_tower.", "model.vision_tower.")
_GEMMA_REST = ("language_model.", "multi_modal_projector.", "model.", "lm_head.")


def _select(names: dict[str, Any], gemma: bool) -> tuple[dict[str, tuple], list[str], list[str]]:
    """Maps SigLIP names to (name in the file, handle); for Gemma only the vision tower's."""
    if not gemma:
        return {name: (name, handle) for name, handle in names.items()}, [], []
    mine: dict[str, tuple] = {}
    rest, problems = set(), []
    for name, handle in names.items():
        prefix = next((p for p in _GEMMA_PREFIXES if name.startswith(p)), None)
        if prefix:
            mine[name.removeprefix(prefix)] = (name, handle)
        elif name.startswith(_GEMMA_REST):
            rest.add(name.removeprefix("model.").split(".")[0])
        else:
            problems.append(f"unexpected tensor {name}")
    return mine, problems, sorted(rest)


# ------------------------------------------------------------------------------ configuration

# Defaults of transformers' SiglipVisionConfig / SiglipTextConfig: config.json omits them.
_VISION_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    num_channels=3, image_size=224, patch_size=16,
    hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=True,
)  # fmt: skip
_TEXT_DEFAULTS = dict(
    vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
    num_attention_heads=12, max_position_embeddings=64,
    hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
)  # fmt: skip


def _parse_config(path: Path, raw: dict[str, Any]) -> tuple[ModelConfig, bool, tuple[str, ...]]:
    """Returns the architecture, whether it is a Gemma checkpoint, and notes."""
    kind, notes = raw.get("model_type"), ()
    try:
        if kind == "siglip":
            config = ModelConfig(
                _vision(raw.get("vision_config") or {}), _text(raw.get("text_config") or {})
            )
        elif kind == "siglip_vision_model":
            config = ModelConfig(_vision(raw), None)
        elif kind in ("gemma3", "paligemma"):
            vision = dict(raw.get("vision_config") or {}, vision_use_head=False)
            config = ModelConfig(_vision(vision), None)
        else:
            raise ValueError(
                f"model_type is {kind!r}; expected 'siglip' (SigLIP v1: MedSigLIP and its kin), "
                "'siglip_vision_model' or 'gemma3' (MedGemma's vision tower)"
            )
    except (ValueError, TypeError) as error:
        raise CheckpointError(path / _CONFIG, [str(error)]) from None
    if config.vision and config.vision.pool == "mean":
        notes = (
            "no pooling head in this checkpoint: encode_image returns the mean of the patch "
            "tokens, which no contrastive training has aligned with any text",
        )
    return config, kind in ("gemma3", "paligemma"), notes


def _complete(raw: Any, defaults: dict[str, Any], tower: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"{tower}_config is a {type(raw).__name__}; expected an object")
    full = {**defaults, **{k: v for k, v in raw.items() if v is not None}}
    if full["hidden_act"] != "gelu_pytorch_tanh":
        raise ValueError(
            f"{tower} hidden_act is {full['hidden_act']!r}; expected 'gelu_pytorch_tanh'"
        )
    if full["layer_norm_eps"] != 1e-6:
        raise ValueError(f"{tower} layer_norm_eps is {full['layer_norm_eps']}; expected 1e-06")
    return full


def _vision(raw: Any) -> VisionConfig:
    full = _complete(raw, _VISION_DEFAULTS, "vision")
    if full["num_channels"] != 3:
        raise ValueError(f"vision num_channels is {full['num_channels']}; expected 3")
    return VisionConfig(
        image_size=full["image_size"],
        patch_size=full["patch_size"],
        width=full["hidden_size"],
        depth=full["num_hidden_layers"],
        mlp_dim=full["intermediate_size"],
        num_heads=full["num_attention_heads"],
        pool="map" if full["vision_use_head"] else "mean",
    )


def _text(raw: Any) -> TextConfig:
    full = _complete(raw, _TEXT_DEFAULTS, "text")
    return TextConfig(
        vocab_size=full["vocab_size"],
        context_length=full["max_position_embeddings"],
        width=full["hidden_size"],
        depth=full["num_hidden_layers"],
        mlp_dim=full["intermediate_size"],
        num_heads=full["num_attention_heads"],
        embed_dim=full.get("projection_size", full["hidden_size"]),
    )


# ------------------------------------------------------------------------------------ writing

_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_folder(
    folder: Path, params: dict[str, Any], config: ModelConfig, tokenizer: bytes | None
) -> None:
    """Writes what `transformers.SiglipModel.from_pretrained` and its processor load.

    Args:
        folder: an existing empty folder.
        params: the model's tree; each leaf's dtype is kept.
        config: the architecture.
        tokenizer: the serialised SentencePiece model, or None.
    """
    dtype = str(next(leaf for _, leaf in tree.items(params)).dtype)
    _write_json(folder / _CONFIG, _config_json(config, dtype))
    if config.vision:
        _write_json(folder / "preprocessor_config.json", _preprocessor_json(config.vision))
    if config.text and tokenizer is not None:
        (folder / TOKENIZER).write_bytes(tokenizer)
        _write_json(folder / "tokenizer_config.json", _tokenizer_json(config.text))
        special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
        _write_json(folder / "special_tokens_map.json", special)
    _write_safetensors(folder / "model.safetensors", params, config)


def _write_safetensors(path: Path, params: dict[str, Any], config: ModelConfig) -> None:
    """Streams tensor by tensor: the library's own writer would hold a second copy of everything."""
    flat = tree.flatten(params)
    groups: dict[str, list[Entry]] = {}
    for entry in entries(config):
        groups.setdefault(entry.name, []).append(entry)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, group in groups.items():
        leaf, first = flat[group[0].path], group[0]
        shape = tensor_shape(first, leaf.shape if first.layer is None else leaf.shape[1:])
        end = offset + int(np.prod(shape)) * leaf.dtype.itemsize
        header[name] = dict(dtype=_CODES[str(leaf.dtype)], shape=shape, data_offsets=[offset, end])
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for group in groups.values():
            for entry in group:
                file.write(np.ascontiguousarray(_tensor(flat, entry)).view(np.uint8).data)


def _tensor(flat: dict[str, Any], entry: Entry) -> np.ndarray:
    leaf = np.asarray(flat[entry.path])
    return entry.to_huggingface(leaf if entry.layer is None else leaf[entry.layer])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    vision = config.vision and dict(
        _tower_json(config.vision),
        model_type="siglip_vision_model",
        image_size=config.vision.image_size,
        patch_size=config.vision.patch_size,
        num_channels=3,
        **({} if config.vision.pool == "map" else {"vision_use_head": False}),
    )
    text = config.text and dict(
        _tower_json(config.text),
        model_type="siglip_text_model",
        vocab_size=config.text.vocab_size,
        max_position_embeddings=config.text.context_length,
        projection_size=config.text.embed_dim,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=1,
    )
    if vision and text:
        both = {"vision_config": vision, "text_config": text}
        return dict(architectures=["SiglipModel"], model_type="siglip", dtype=dtype, **both)
    if vision:
        return dict(vision, architectures=["SiglipVisionModel"], dtype=dtype)
    raise ValueError("the Hugging Face layout needs an image tower; this model has only text")


def _tower_json(tower: VisionConfig | TextConfig) -> dict[str, Any]:
    return dict(
        hidden_size=tower.width,
        intermediate_size=tower.mlp_dim,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.num_heads,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
    )


def _preprocessor_json(vision: VisionConfig) -> dict[str, Any]:
    """As published with SigLIP: squash, PIL bicubic (resample 3), to [-1, 1]."""
    return dict(
        image_processor_type="SiglipImageProcessor",
        processor_class="SiglipProcessor",
        do_resize=True,
        size={"height": vision.image_size, "width": vision.image_size},
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _tokenizer_json(text: TextConfig) -> dict[str, Any]:
    token = dict(lstrip=True, normalized=False, rstrip=True, single_word=False, special=True)
    return dict(
        tokenizer_class="SiglipTokenizer",
        processor_class="SiglipProcessor",
        added_tokens_decoder={"1": dict(token, content="</s>"), "2": dict(token, content="<unk>")},
        additional_special_tokens=[],
        do_lower_case=True,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids"],
        model_max_length=text.context_length,
    )


LAYOUT = Layout(
    name="huggingface",
    marker=_CONFIG,
    recognise=lambda path: (path / _CONFIG).is_file(),
    open=open_folder,
    write=write_folder,
)
