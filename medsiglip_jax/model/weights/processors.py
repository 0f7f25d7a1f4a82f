"""The files beside the weights: what they say about pixels, and which of them `save` keeps."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from medsiglip_jax.files import json as json_files
from medsiglip_jax.files import settings
from medsiglip_jax.model.config import ModelConfig, PixelConfig, Preparation
from medsiglip_jax.model.weights import huggingface_config
from medsiglip_jax.model.weights.checkpoint import explained

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_KEPT = {".json", ".txt", ".md", ".model", ".jinja", ".yaml", ".yml", ""}
# Of the layouts themselves, which write them anew.
PREPARATION = "preparation.json"
_OWN = (
    PREPARATION, huggingface_config.SENTENCE_MODULES, huggingface_config.SENTENCE_MODULE,
    "config.json", "adapter_config.json", "medsiglip_jax.json", ".index.json",
)  # fmt: skip


def companions(folder: Path) -> tuple[Path, ...]:
    """The files of a checkpoint's folder that are neither weights nor architecture."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple(
        path
        for path in files
        if path.suffix in _KEPT and path.name[0] != "."
        and path.name not in _OWN and not path.name.endswith(_OWN[-1])
    )  # fmt: skip


def image_processors(folder: Path) -> dict[str, dict[str, Any]]:
    """The descriptions of an image processor in a folder, by file, in transformers' order.

    `processor_config.json` comes first if it has one (transformers image_processing_base.py,
    `get_image_processor_dict`).

    Raises:
        CheckpointError: a file is not a JSON object.
    """
    found = {}
    for name in (PROCESSOR, PREPROCESSOR):
        if not (folder / name).is_file():
            continue
        with explained(folder / name, "not a JSON object"):
            content = json_files.parse((folder / name).read_bytes())
            content = content.get("image_processor") if name == PROCESSOR else content
            if content is not None:
                found[name] = dict(content)
    return found


def with_pixels(config: ModelConfig, folder: Path) -> ModelConfig:
    """The architecture with the normalisation and resampling that the files in a folder ask for.

    Raises:
        CheckpointError: they ask for something that is not done here.
    """
    found = image_processors(folder)
    if config.vision is None or not found:
        return config
    name, raw = next(iter(found.items()))
    with explained(folder / name, "not a SigLIP image processor"):
        pixels = huggingface_config.pixels(raw, config.vision.image_size)
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, pixels=pixels))


def with_preparation(config: ModelConfig, folder: Path) -> ModelConfig:
    """The architecture with how images were prepared in training, if a file in a folder says so.

    Raises:
        CheckpointError: the file says something that is not done here.
    """
    if not (folder / PREPARATION).is_file() or config.classifier:
        return config
    with explained(folder / PREPARATION, "not how images were prepared in training"):
        content = json_files.parse((folder / PREPARATION).read_bytes())
        made = settings.build(Preparation, content, PREPARATION)
    return dataclasses.replace(config, preparation=made)


def write_preparation(folder: Path, config: ModelConfig) -> None:
    """Writes that file for a model that says so, and not in its classifier."""
    if config.preparation and not config.classifier:
        json_files.write(folder / PREPARATION, config.preparation.to_dict())


def complete(folder: Path, config: ModelConfig) -> None:
    """Makes the image processors in a folder those of a model, which may have another resolution.

    Writes one if there is none and the model's pixels are not SigLIP's; and how images were
    prepared in training.
    """
    write_preparation(folder, config)
    if config.vision is None:
        return
    found, side = image_processors(folder), config.vision.image_size
    if not found and config.vision.pixels != PixelConfig():
        json_files.write(folder / PREPROCESSOR, huggingface_config.preprocessor(config.vision))
    for name in found:
        content = json_files.read(folder / name)
        part = content["image_processor"] if name == PROCESSOR else content
        size = {"height": side, "width": side}
        if part.get("size") != size:
            part["size"] = size
            json_files.write(folder / name, content)


def check_plain(config: ModelConfig) -> None:
    """Raises an error for a model whose pixels a file of weights alone cannot describe."""
    if config.vision and config.vision.pixels != PixelConfig():
        raise ValueError(
            "an .npz file cannot say that this model's pixels are normalised or resampled in its "
            "own way; write a folder instead (a path without .npz)"
        )
    if config.trained:
        warnings.warn(
            f"an .npz file cannot say that images were prepared with {config.trained.preprocess!r} "
            "when this model was trained; write a folder to keep that (a path without .npz)",
            stacklevel=3,
        )
