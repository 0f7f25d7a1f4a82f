"""The JSON files of Hugging Face SigLIP folders: architecture, image processor, tokenizer."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from medsiglip_jax.files import settings
from medsiglip_jax.model.config import (
    ClassifierConfig,
    ModelConfig,
    PixelConfig,
    Preparation,
    TextConfig,
    VisionConfig,
)

# ------------------------------------------------------------------------------------ reading

# Keys of config.json, and the fields of `VisionConfig` and `TextConfig` that they set.
_TOWER = {
    "hidden_size": "width",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
}
_VISION = _TOWER | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT = _TOWER | {"vocab_size": "vocab_size", "max_position_embeddings": "context_length"}

# What the towers have built in, whatever config.json says.
_FIXED = dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
# Defaults of transformers' SiglipVisionConfig / SiglipTextConfig: config.json omits them.
_SIZES = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
_VISION_DEFAULTS = dict(image_size=224, patch_size=16, num_channels=3, vision_use_head=True)
_TEXT_DEFAULTS = dict(vocab_size=32000, max_position_embeddings=64)

# Model types that hold the SigLIP vision tower of a Gemma model.
GEMMA = ("gemma3", "paligemma")


def is_classifier(raw: dict[str, Any]) -> bool:
    """Whether a checkpoint has an image tower and a linear head; its config is of both towers."""
    kinds = raw.get("architectures") or ()
    return raw.get("model_type") == "siglip" and "SiglipForImageClassification" in kinds


def parse(raw: dict[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes; ValueError or TypeError if it is no SigLIP."""
    kind, vision = raw.get("model_type"), raw.get("vision_config") or {}
    if is_classifier(raw):
        return ModelConfig(_vision(vision), None, _classifier(raw))
    if kind == "siglip":
        return ModelConfig(_vision(vision), _text(raw.get("text_config") or {}))
    if kind == "siglip_vision_model":
        return ModelConfig(_vision(raw), None)
    if kind == "siglip_text_model":
        return ModelConfig(None, _text(raw))
    if kind in GEMMA:
        return ModelConfig(_vision(dict(vision, vision_use_head=False)), None)
    if str(kind).startswith("siglip2"):
        raise ValueError(
            f"model_type is {kind!r}: a SigLIP 2 NaFlex model, whose images keep their aspect "
            "ratio, is not supported; those of a fixed resolution are, such as "
            "google/siglip2-so400m-patch14-384"
        )
    raise ValueError(
        f"model_type is {kind!r}; expected 'siglip' (SigLIP v1, such as MedSigLIP), "
        "'siglip_vision_model', 'siglip_text_model' or 'gemma3' (MedGemma's vision tower)"
    )


_OURS = "medsiglip_jax"  # key of config.json for what transformers has no key for
_FINDINGS = "multi_label_classification"
_MOST_LABELS = 100_000  # which are named here one by one, before the tensors say how many there are


def _classifier(raw: dict[str, Any]) -> ClassifierConfig | None:
    """The classifier of a SiglipForImageClassification; None if its head has no outputs.

    transformers leaves out the names of two labels that are "LABEL_0" and "LABEL_1". Its pipeline
    takes the sigmoid of a single label, too.
    """
    names = raw.get("id2label")
    if names is None:
        if type(count := raw.get("num_labels") or 2) is not int or not 0 < count <= _MOST_LABELS:
            raise ValueError(f"num_labels is {settings.shown(count)}; expected 1 to {_MOST_LABELS}")
        names = {i: f"LABEL_{i}" for i in range(count)}
    try:
        numbered = {int(i): str(label) for i, label in names.items()}
        labels = tuple(numbered[i] for i in range(len(names)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"id2label is {settings.shown(names)}; expected the numbers from 0 on with their labels"
        ) from None
    if not labels:
        return None
    if (kind := raw.get("problem_type")) == "regression":
        raise ValueError(f"problem_type is {kind!r}: its outputs are no probabilities of labels")
    findings = kind == _FINDINGS or len(labels) == 1
    given = dict(labels=labels, pool="mean", multi_label=findings)
    return settings.build(ClassifierConfig, raw.get(_OURS) or {}, _OURS, **given)


def _complete(raw: Any, defaults: dict[str, Any], tower: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"{tower}_config is a {type(raw).__name__}; expected an object")
    full: dict[str, Any] = (
        _FIXED | _SIZES | defaults | {k: v for k, v in raw.items() if v is not None}
    )
    for key, value in _FIXED.items():
        if full[key] != value:
            shown = settings.shown(full[key])
            raise ValueError(f"{tower} {key} is {shown}; expected {value!r}")
    for key in (*_VISION, *_TEXT):
        if key in full and (type(full[key]) is not int or full[key] < 1):
            shown = settings.shown(full[key])
            raise ValueError(f"{tower} {key} is {shown}; expected a positive integer")
    return full


def _vision(raw: Any) -> VisionConfig:
    full = _complete(raw, _VISION_DEFAULTS, "vision")
    if full["num_channels"] != 3:
        raise ValueError(f"vision num_channels is {full['num_channels']}; expected 3")
    fields = {ours: full[key] for key, ours in _VISION.items()}
    return VisionConfig(**fields, pool="map" if full["vision_use_head"] else "mean")


def _text(raw: Any) -> TextConfig:
    full = _complete(raw, _TEXT_DEFAULTS, "text")
    fields = {ours: full[key] for key, ours in _TEXT.items()}
    return TextConfig(**fields, embed_dim=full.get("projection_size", full["hidden_size"]))


# Numbers of the architecture: the key in config.json, and the tensor and axis that say them, too.
_SIZED = {
    "width": ("hidden_size", "encoder.layers.0.mlp.fc1.weight", 1),
    "mlp_dim": ("intermediate_size", "encoder.layers.0.mlp.fc1.weight", 0),
    "patch_size": ("patch_size", "embeddings.patch_embedding.weight", 2),
    "vocab_size": ("vocab_size", "embeddings.token_embedding.weight", 0),
    "context_length": ("max_position_embeddings", "embeddings.position_embedding.weight", 0),
    "embed_dim": ("projection_size", "head.weight", 0),
}


def contradictions(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Which numbers of config.json are not those of the tensors.

    To be asked before anything of these sizes is made: a million layers took three minutes, and a
    billion pixels ended the process.

    Args:
        config: the architecture.
        shapes: of the tensors, by their names in a SiglipModel; what is missing is not compared.
    """
    problems: list[str] = []
    for name, tower in (("vision", config.vision), ("text", config.text)):
        if tower is not None:
            whole = f"{name}_model."
            own = {n.removeprefix(whole): s for n, s in shapes.items() if n.startswith(whole)}
            problems += [f"{name} {text}" for text in _contradictions(tower, own)]
    return problems


_LISTED = 100  # layers


def _contradictions(
    tower: VisionConfig | TextConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    layers = {m[1] for name in shapes if (m := re.match(r"encoder\.layers\.(\d+)\.", name))}
    # Without any of them the missing tensors are listed, unless there were far too many.
    if tower.depth != len(layers) and (layers or tower.depth > _LISTED):
        yield f"num_hidden_layers is {tower.depth}, and there are tensors of {len(layers)}"
    for field, (key, name, axis) in _SIZED.items():
        value, shape = getattr(tower, field, None), shapes.get(name, ())
        if value is not None and axis < len(shape) and shape[axis] != value:
            yield f"{key} is {value}, and the tensor {name} has shape {shape}"
    positions = shapes.get("embeddings.position_embedding.weight")
    if isinstance(tower, VisionConfig) and positions and positions[0] != tower.num_tokens:
        yield (
            f"image_size is {tower.image_size} with patches of {tower.patch_size}, which makes "
            f"{tower.num_tokens} tokens, and the tensors have {positions[0]} positions"
        )


# Of transformers' SiglipImageProcessor: preprocessor_config.json may omit them.
_PIXELS = dict(
    do_resize=True,
    size={"height": 224, "width": 224},
    resample=3,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5],
)
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
# Steps that no SigLIP has and the presets do not do.
_NO_STEPS = ("do_center_crop", "do_pad", "do_pan_and_scan", "do_thumbnail", "do_align_long_axis")


def pixels(raw: dict[str, Any], image_size: int) -> PixelConfig:
    """What an image processor of transformers makes of pixels.

    Args:
        raw: `preprocessor_config.json`, or the same in `processor_config.json`.
        image_size: of the tower, in pixels.

    Raises:
        ValueError: it does something that is not done here; the message lists everything.
    """
    # A step that is null is not done; any other null is the default.
    given = {k: v for k, v in raw.items() if v is not None or k.startswith("do_")}
    full: dict[str, Any] = _PIXELS | given
    kind = str(full.get("image_processor_type", "SiglipImageProcessor"))
    problems = [f"{step} is true, which is not supported" for step in _NO_STEPS if full.get(step)]
    if not kind.startswith(("SiglipImageProcessor", "Gemma3ImageProcessor")):
        problems.append(f"image_processor_type is {kind!r}; expected 'SiglipImageProcessor'")
    if not full["do_resize"]:
        problems.append(f"do_resize is {full['do_resize']}, and images are always resized here")
    if full["size"] != {"height": image_size, "width": image_size}:  # a number: the shorter edge
        problems.append(
            f"size is {settings.shown(full['size'])}, and the image tower takes {image_size} x "
            f'{image_size} pixels ({{"height": {image_size}, "width": {image_size}}})'
        )
    if full["resample"] not in list(_RESAMPLE):
        problems.append(
            f"resample is {settings.shown(full['resample'])}; expected 2 (bilinear) or 3 (bicubic)"
        )
    for key in ("rescale_factor", "image_mean", "image_std"):
        values = full[key] if isinstance(full[key], list | tuple) else [full[key]]
        numbers = all(type(x) in (int, float) and math.isfinite(x) for x in values)
        if not numbers or (key != "image_mean" and 0 in values):
            shown, but = settings.shown(full[key]), "" if key == "image_mean" else " other than 0"
            problems.append(f"{key} is {shown}; expected finite numbers{but}")
    if problems:
        raise ValueError("; ".join(problems))
    scale = 255.0 * (full["rescale_factor"] if full["do_rescale"] else 1.0)
    mean, std = (full["image_mean"], full["image_std"]) if full["do_normalize"] else (0.0, 1.0)
    mean, std = (x if isinstance(x, list | tuple) else [x] * 3 for x in (mean, std))
    # Of values in 0..1; rounded, since 255 * 0.00392156862745098 is not quite 1.
    mean, std = (tuple(round(x / scale, 12) for x in values) for values in (mean, std))
    return PixelConfig(mean, std, _RESAMPLE[full["resample"]])


# ------------------------------------------------------------------------------------ writing

# Of sentence-transformers: the modules of a model, and the settings of its first one.
SENTENCE_MODULES, SENTENCE_MODULE = "modules.json", "sentence_bert_config.json"


def model(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json; ValueError for a model that the layout cannot hold."""
    vision = config.vision and dict(
        _written(config.vision, _VISION),
        model_type="siglip_vision_model",
        num_channels=3,
        **({} if config.vision.pool == "map" else {"vision_use_head": False}),
    )
    text = config.text and dict(
        _written(config.text, _TEXT),
        model_type="siglip_text_model",
        projection_size=config.text.embed_dim,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=1,
    )
    if config.classifier:
        return _written_classifier(config, config.classifier, vision, dtype)
    if vision and text:
        both = {"vision_config": vision, "text_config": text}
        return dict(architectures=["SiglipModel"], model_type="siglip", dtype=dtype, **both)
    if vision:
        return dict(vision, architectures=["SiglipVisionModel"], dtype=dtype)
    raise ValueError("the Hugging Face layout needs an image tower; this model has only text")


def _written_classifier(
    config: ModelConfig, classifier: ClassifierConfig, vision: Any, dtype: str
) -> dict[str, Any]:
    if classifier.pool != "mean":
        raise ValueError(
            f"a classifier with pool={classifier.pool!r} cannot be a Hugging Face folder: "
            "SiglipForImageClassification reads the mean of the patch tokens; write --format orbax"
        )
    if config.text:
        raise ValueError("a Hugging Face folder holds a classifier without a text tower")
    names = dict(enumerate(classifier.labels))
    return dict(
        architectures=["SiglipForImageClassification"],
        model_type="siglip",
        dtype=dtype,
        id2label={str(i): label for i, label in names.items()},
        label2id={label: i for i, label in names.items()},
        problem_type=_FINDINGS if classifier.multi_label else "single_label_classification",
        vision_config=vision,
        **{_OURS: _written_ours(classifier)},
    )


def _written_ours(classifier: ClassifierConfig) -> dict[str, Any]:
    how = Preparation(classifier.preprocess, classifier.dicom)
    return {"thresholds": list(classifier.thresholds), **how.to_dict()}


def _written(tower: VisionConfig | TextConfig, fields: dict[str, str]) -> dict[str, Any]:
    return dict(
        {key: getattr(tower, ours) for key, ours in fields.items()},
        **_FIXED,
        attention_dropout=0.0,
    )


def preprocessor(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json, as published: squash, PIL bicubic (resample 3), to [-1, 1]; or
    with the normalisation and resampling of the model."""
    codes = {name: code for code, name in _RESAMPLE.items()}
    return dict(
        image_processor_type="SiglipImageProcessor",
        processor_class="SiglipProcessor",
        do_resize=True,
        size={"height": vision.image_size, "width": vision.image_size},
        resample=codes[vision.pixels.resample],
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(vision.pixels.mean),
        image_std=list(vision.pixels.std),
    )


def sentence_transformers(text: TextConfig) -> dict[str, Any]:
    """The files of a folder with both towers that sentence-transformers 6 reads.

    It pads texts to the longest of a batch unless it is told otherwise, and a SigLIP pools at the
    last position, whatever token is there.
    """
    padded = dict(padding="max_length", max_length=text.context_length, return_attention_mask=False)
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    return {
        SENTENCE_MODULES: [dict(idx=0, name="0", path="", type=kind)],
        SENTENCE_MODULE: dict(
            transformer_task="feature-extraction",
            modality_config={
                kind: dict(method=f"get_{kind}_features", method_output_name="pooler_output")
                for kind in ("text", "image")
            },
            module_output_name="sentence_embedding",
            processing_kwargs={"text": padded},
        ),
    }


def tokenizer(text: TextConfig) -> dict[str, Any]:
    """tokenizer_config.json, as published with SigLIP."""
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
