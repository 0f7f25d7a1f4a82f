"""Folders of PEFT (huggingface.co/docs/peft): LoRA adapters, merged with their base as it is read.

Names and numbers are peft's (0.21: tuners/lora/layer.py, `update_layer` and `get_delta_weight`;
utils/other.py, `get_pattern_key`).
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medsiglip_jax.files import json as json_files
from medsiglip_jax.model import towers, tree
from medsiglip_jax.model.config import ModelConfig
from medsiglip_jax.model.weights import huggingface, safetensors
from medsiglip_jax.model.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    Layout,
    Leaf,
    why_unreadable,
)
from medsiglip_jax.model.weights.names import MHA, Entry, tensor_shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what peft puts before the names of the model that it wraps
_BASE = "base_model_name_or_path"

Shape = tuple[int, ...]
Read = Callable[[], np.ndarray]

# ------------------------------------------------------------------------------------ settings

# Keys of adapter_config.json that are honoured here, that only training needs, or that say what the
# names of the tensors say, too. Any other key that is set may change what the adapter computes.
_KNOWN = frozenset(
    "peft_type base_model_name_or_path r lora_alpha use_rslora rank_pattern alpha_pattern bias "
    "modules_to_save auto_mapping init_lora_weights target_modules exclude_modules "
    "layers_to_transform layers_pattern lora_dropout task_type inference_mode peft_version "
    "loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size "
    "ensure_weight_tying runtime_config".split()
)
# The ways to begin that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def base_of(folder: Path) -> str:
    """The checkpoint that an adapter is for: a path below `folder` if it is there, else as named.

    Raises:
        CheckpointError: none is named, or the adapter is of a kind that is not read, which is said
            before its base is fetched.
    """
    named = _settings(folder / CONFIG).get(_BASE)
    _check_weights(folder)
    if not isinstance(named, str) or not named:
        problem = f"{_BASE} is {named!r}; expected the folder or repo id of the model to adapt"
        raise CheckpointError(folder / CONFIG, [problem])
    return str(folder / named) if (folder / named).exists() else named


def _settings(file: Path) -> dict[str, Any]:
    """adapter_config.json; an error of one line if it asks for what is not merged here."""
    settings = huggingface.read_json(file)
    unknown = {key: value for key, value in settings.items() if value and key not in _KNOWN}
    if unknown.get("revision") == "main":  # of the base: the one that is fetched
        del unknown["revision"]
    wrong = [f"{key} is {value!r}" for key, value in unknown.items()]
    if (kind := settings.get("peft_type")) != "LORA":
        wrong = [f"peft_type is {kind!r}, not 'LORA'"]
    if (beginning := settings.get("init_lora_weights")) not in _BEGINNINGS:
        wrong.append(f"init_lora_weights is {beginning!r}, which changes the base")
    if wrong:
        problem = f"{', '.join(wrong)}: such adapters are not read here; let peft merge it"
        raise CheckpointError(file, [f"{problem} (merge_and_unload) and save the whole model"])
    return settings


def _check_weights(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        pickled, problem = folder / "adapter_model.bin", f"{WEIGHTS} is missing"
        problem = why_unreadable(pickled, problem) if pickled.exists() else problem
        raise CheckpointError(folder, [problem])


def _rank_and_scale(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Of an adapted module: what the first pattern says that its name ends with, or the default."""

    def value(key: str, patterns: str) -> Any:
        for pattern, special in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return special
        return settings.get(key, 8)  # peft's default of both

    rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"{CONFIG} has rank {rank!r} and alpha {alpha!r} for {module}")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


# ------------------------------------------------------------------------------------ tensors

# A part of an adapter: "A" and "B" of a module, or "whole" of a tensor, and how each is read.
Part = dict[str, tuple[Shape, Read]]
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


def _parts(folder: Path) -> dict[str, Part]:
    """The adapted modules and the tensors that were saved whole, by their names in the model."""
    parts: dict[str, Part] = {}
    for name, file in huggingface.open_files(folder, [folder / WEIGHTS]).items():
        shape, read = file.shape(name), partial(file.read, name)
        # What a layer had before it was wrapped, such as its bias, is under base_layer.
        plain = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        match = _FACTOR.fullmatch(plain)
        owner, role = match.groups() if match else (plain, "whole")
        if match and "lora_embedding" in plain:  # of the transposed table
            shape, read = shape[::-1], partial(_transposed, read)
            role = {"A": "B", "B": "A"}[role]
        parts.setdefault(owner, {})[role] = shape, read
    return parts


def _transposed(read: Read) -> np.ndarray:
    return read().T


def _misfits(name: str, part: Part, shape: Shape, rank: int) -> list[str]:
    """Why a part does not fit a tensor of the base of this shape."""
    expected = {"A": (rank, math.prod(shape[1:])), "B": (shape[0], rank)}
    got = {role: (s[0], math.prod(s[1:])) for role, (s, _) in part.items()}
    if "whole" in part:
        expected, got = {"whole": shape}, {"whole": part["whole"][0]}
    wrong = f"{name} has the shapes {got}; its base and {CONFIG} want {expected}"
    return [] if got == expected else [wrong]


def _product(part: Part, scale: float) -> np.ndarray:
    """scale * B @ A in float32. The A of a convolution has the axes of its kernel."""
    a, b = (part[role][1]().astype(np.float32) for role in "AB")
    return scale * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))


# ------------------------------------------------------------------------------------ the base


def _tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    shapes = tree.flatten(towers.param_shapes(config))
    groups = huggingface.grouped(config, "name").items()
    return {name: tensor_shape(e, e.part(shapes[e.path].shape)) for name, (e, *_) in groups}


def _split(names: Collection[str], config: ModelConfig) -> tuple[dict[str, str], list[str]]:
    """Name -> the same without the first parts of MedGemma's names; and what is none of a SigLIP:
    a classifier, or the language model of MedGemma."""
    gemma = bool(config.vision and config.vision.pool == "mean")
    ours, left_out = {}, set()
    for name in names:
        prefix = next((p for p in huggingface.GEMMA_PREFIXES if gemma and name.startswith(p)), "")
        others = huggingface.GEMMA_OTHERS if gemma else ()
        others = others if config.classifier else ("classifier.", *others)
        if not prefix and name.startswith(others):
            left_out.add(name.removeprefix("model.").split(".")[0])
        else:
            ours[name] = name.removeprefix(prefix)
    return ours, sorted(left_out)


# What transformers 5 leaves out of the names in a tower by itself, and the tower's class.
_ALONE = {"vision_model.": "SiglipVision", "text_model.": "SiglipText"}


def _placed(
    names: Mapping[str, str], settings: Mapping[str, Any], known: Collection[str]
) -> dict[str, str]:
    """Name -> the tensor of the base that it changes."""
    kind = str((settings.get("auto_mapping") or {}).get("base_model_class", ""))
    alone = [p for p, tower in _ALONE.items() if kind.startswith(tower)] or list(_ALONE)
    found, lost = [], []
    for prefix in ("", *alone):
        tensors = {name: _tensor(prefix + plain, known) for name, plain in names.items()}
        found.append({name: tensor for name, tensor in tensors.items() if tensor})
        lost.append([name for name in names if name not in found[-1]])
    if missing := min(lost, key=len):
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise ValueError(f"the adapter changes {missing[0]}{others}, which its base does not have")
    complete = [tensors for tensors in found if len(tensors) == len(names)]
    if names and len(complete) > 1:
        raise ValueError(
            f"{next(iter(names))} may be of either tower; write into {CONFIG} of which: "
            '"auto_mapping": {"base_model_class": "SiglipVisionModel"}, or "SiglipTextModel"'
        )
    return complete[0]


def _tensor(name: str, known: Collection[str]) -> str | None:
    """The tensor of that name, or the weight of that module."""
    return next((candidate for candidate in (name, f"{name}.weight") if candidate in known), None)


# ------------------------------------------------------------------------------------ merging


def open_folder(folder: Path, base: Checkpoint) -> Checkpoint:
    """The base with an adapter merged into it; nothing but headers is read.

    What an adapter changes is computed in float32. Tensors that were saved whole (biases,
    `modules_to_save`) replace those of the base.

    Raises:
        CheckpointError: the adapter is of another kind, or of another base.
    """
    settings, parts = _settings(folder / CONFIG), _parts(folder)
    try:
        _refuse_attention(parts)
        names, left_out = _split(parts, base.config)
        tensors = _placed(names, settings, _tensor_shapes(base.config))
        changes = _changes(parts, tensors, settings, base)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(folder, [str(error)]) from None
    notes = [f"a LoRA adapter of {len(changes)} tensors, merged with its base {base.source}"]
    notes += [f"left out of the adapter: {', '.join(left_out)}"] if left_out else []
    notes += [_ONLY_MERGED] if "added" in changes.get(f"{_ATTENTION}.out_proj.weight", ()) else []
    return replace(
        base,
        source=str(folder),
        repo=None,
        leaves=_merged(base, changes),
        files=(*base.files, folder / CONFIG, folder / WEIGHTS),
        notes=[*notes, *base.notes],
    )


_ATTENTION = "vision_model.head.attention"
_ONLY_MERGED = (
    f"the adapter of {_ATTENTION}.out_proj counts here, as after peft's merge_and_unload; until "
    "then peft computes without it (and trains nothing in it)"
)


def _changes(
    parts: Mapping[str, Part],
    tensors: Mapping[str, str],
    settings: Mapping[str, Any],
    base: Checkpoint,
) -> dict[str, dict[str, Read]]:
    """Tensor of the base -> "whole", what it is replaced with, and "added", what is added to it."""
    shapes, changes = _tensor_shapes(base.config), {}
    problems = [
        f"modules_to_save names {name!r}, of which {WEIGHTS} holds nothing"
        for name in settings.get("modules_to_save") or ()
        if not any(f".{name}." in f".{saved}." for saved in parts)
    ]
    for name, tensor in tensors.items():
        rank, scale = _rank_and_scale(settings, name)
        problems += _misfits(name, parts[name], shapes[tensor], rank)
        whole = parts[name].get("whole")
        read = {"whole": whole[1]} if whole else {"added": partial(_product, parts[name], scale)}
        changes.setdefault(tensor, {}).update(read)
    if base.format == "orbax":  # which reads a stack of layers as one
        problems = [f"its base {base.source} is an orbax folder; convert it to huggingface first"]
    if not parts:
        problems = [f"{WEIGHTS} holds no tensors"]
    if problems:
        raise ValueError(problems[0] + (f" (and {len(problems) - 1} more)" * (len(problems) > 1)))
    return changes


def _refuse_attention(parts: Mapping[str, Part]) -> None:
    """An adapter of torch's MultiheadAttention, whose numbers depend on the version of peft: up to
    0.21 it adds that of out_proj twice (`MultiheadAttention.merge`)."""
    if wrong := [n for n, part in parts.items() if n.endswith("head.attention") and "A" in part]:
        raise ValueError(
            f"the adapter of {wrong[0]} is not read here, because peft adds its out_proj twice; "
            "let peft merge it (merge_and_unload) and save the whole model"
        )


def _merged(base: Checkpoint, changes: Mapping[str, Mapping[str, Read]]) -> dict[str, Leaf]:
    leaves, shapes = dict(base.leaves), tree.flatten(towers.param_shapes(base.config))
    for path, group in huggingface.grouped(base.config, "path").items():
        leaf = leaves.get(path)
        if leaf is None or leaf.problems:
            continue  # which `layouts.check` reports
        reads = [
            partial(_read, entry, entry.part(shapes[path].shape), read, changes[entry.name])
            if entry.name in changes
            else read
            for entry, read in zip(group, leaf.parts, strict=True)
        ]
        leaves[path] = replace(leaf, parts=tuple(reads))
    return leaves


def _read(entry: Entry, shape: Shape, base: Read, change: Mapping[str, Read]) -> np.ndarray:
    """A tensor of the base after the change, in the axis order of its parameter."""
    value = entry.to_jax(change["whole"](), shape) if "whole" in change else base()
    if "added" not in change:
        return value
    return value.astype(np.float32) + entry.to_jax(change["added"](), shape)


LAYOUT = Layout("peft", CONFIG, open=open_folder, base=base_of)


# ------------------------------------------------------------------------------------ writing


def adapts(path: str) -> bool:
    """Whether peft can adapt a kernel by itself: those of the pooling head's attention lie in one
    tensor, or are used behind the back of the layer that peft would wrap."""
    return f"MAPHead_0/{MHA}/" not in path


def together(paths: Collection[str], config: ModelConfig) -> set[str]:
    """The parameters that lie in the tensors of these."""
    groups = huggingface.grouped(config, "name").values()
    return {e.path for group in groups if any(e.path in paths for e in group) for e in group}


def write_folder(
    folder: Path,
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    whole: Mapping[str, np.ndarray],
    config: ModelConfig,
    settings: Mapping[str, Any],
) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads.

    Args:
        folder: an empty folder.
        factors: path of a kernel that `adapts` -> (a, b), float32 [layers, in, r] and
            [layers, r, out], without the first axis where there is no stack.
        whole: path -> other parameters that are not as in the base, `together`. peft replaces
            tensors by their names, even the temperature, which is in none of the modules.
        config: the architecture.
        settings: keys of adapter_config.json: the base, `r` and `lora_alpha`.
    """
    tensors, modules = {}, []
    # transformers 5 leaves the first part of the names out in a tower by itself.
    alone = not (config.classifier or (config.vision and config.text))
    tower = "vision_model." if alone else ""
    for path, group in huggingface.grouped(config, "path").items():
        for entry in group if path in factors else ():
            a, b = (x if entry.layer is None else x[entry.layer] for x in factors[path])
            module = entry.name.removesuffix(".weight").removeprefix(tower)
            modules.append(module)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.T
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.T
    for name, group in huggingface.grouped(config, "name").items():
        if group[0].path in whole:
            module, _, last = name.removeprefix(tower).rpartition(".")
            wrapped = "base_layer." if module in modules else ""
            where = f"{module}.{wrapped}{last}".lstrip(".")
            tensors[_PREFIX + where] = huggingface.tensor(group, whole)
    kind = "SiglipVisionModel" if alone else "SiglipModel"
    kind = "SiglipForImageClassification" if config.classifier else kind
    fixed = dict(
        peft_type="LORA",
        auto_mapping=dict(
            base_model_class=kind,
            parent_library="transformers.models.siglip.modeling_siglip",
        ),
        target_modules=modules,
        bias="none",
        inference_mode=True,
        **({"modules_to_save": ["classifier"]} if config.classifier else {}),
    )
    safetensors.write(folder / WEIGHTS, tensors)
    json_files.write(folder / CONFIG, fixed | dict(settings))
