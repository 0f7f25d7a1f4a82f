"""What a fine-tuning run is: a config file turned, once, into frozen dataclasses."""

import ast
import dataclasses
import importlib.util
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsiglip_jax.model.attention import ATTENTION
from medsiglip_jax.model.config import ModelConfig, named
from medsiglip_jax.model.towers import REMAT
from medsiglip_jax.preprocess.augment import Augment
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import PRESETS
from medsiglip_jax.train.lora import LoRA
from medsiglip_jax.train.objectives import NEGATIVES, POOLS


@dataclass(frozen=True)
class Data:
    """One source of examples; the arguments of `examples.read`, and its share of the mixture.

    Attributes:
        path: CSV, Parquet or JSONL manifest, folder of class folders, TFRecord shards, or
            "tfds:NAME[/CONFIG][:VERSION]", a data set that TFDS has prepared (`tfds build NAME`);
            `image`, `text`, `label` and so on then name its features.
        root: folder that image paths are relative to, default the manifest's; of "tfds:…" the
            data_dir, default $TFDS_DATA_DIR or ~/tensorflow_datasets.
        image: column of image paths.
        text: column of texts.
        label: column of class names or numbers, or several columns of 0/1.
        split: column that says to which split a row belongs.
        group: column of the patient, case or study: its rows stay on one side of a split.
        captions: makes texts of labels: "a photo of {label}", or {class: caption}.
        classes: names and order of the classes; default those found, sorted.
        positives: "text", "label" or a column: rows with equal values are positive pairs.
        weight: share of the mixture; default by size.
    """

    path: str
    root: str | None = None
    image: str = "image"
    text: str = "text"
    label: str | tuple[str, ...] | None = None
    split: str = "split"
    group: str = "group"
    captions: str | Mapping[str, str] | None = None
    classes: tuple[str, ...] | None = None
    positives: str | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Objective:
    """What is trained for.

    Attributes:
        name: "contrastive" or "classification".
        accumulate: pieces of a batch that are encoded one after the other, to save memory.
        negatives: with `accumulate`, "batch" or "piece", see `step.make_train_step`.
        pool: for classification, "map" or "mean".
        pos_weight: for multi-label classification, None, "balanced" (negatives / positives of the
            training rows) or one number per class.
    """

    name: str = "contrastive"
    accumulate: int = 1
    negatives: str = "batch"
    pool: str = "map"
    pos_weight: str | tuple[float, ...] | None = None


@dataclass(frozen=True)
class Optimizer:
    """How it is trained; see `medsiglip_jax.train.optim`.

    Attributes:
        name: "adamw" or "adafactor".
        schedule: "cosine", "rsqrt", "linear" or "constant".
        warmup_steps: of linear warm-up.
        cooldown_steps: of linear cool-down.
        weight_decay: share of a kernel taken off in a step at the peak of the schedule; not
            multiplied by the learning rate (torch's value is ours divided by the rate).
        b1: AdamW's.
        b2: AdamW's; for adafactor the cap of beta2.
        clip_norm: of the whole gradient.
        rates: (regex, factor on the learning rate) over paths, first match wins.
        layer_decay: factor on the learning rate from each block to the one below it; embeddings
            are below the first.
    """

    name: str = "adamw"
    schedule: str = "cosine"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    rates: tuple[tuple[str, float], ...] = ()
    layer_decay: float = 1.0


@dataclass(frozen=True)
class Mesh:
    """Where it is trained.

    Attributes:
        data: devices over which batches are split; default all.
        model: devices of the second axis; nothing is split over it yet, they repeat the same work.
        fsdp: split large parameters and their optimiser state over "data", too.
    """

    data: int | None = None
    model: int = 1
    fsdp: bool = False


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning run.

    Attributes:
        data: one source or several, mixed.
        total_steps: updates.
        init: checkpoint to start from (anything `load` takes); None starts from random weights.
        model: with init=None, a named size or the dict of a `ModelConfig`.
        tokenizer: SentencePiece model, where `init` has none.
        batch_size: examples per update, over all hosts.
        seed: of the order, the augmentation, the adapters and random weights.
        objective: see `Objective`; a name alone works.
        freeze: regexes over parameter paths of what does not train, e.g. "img/.*", or
            "img/Transformer/encoderblock_(1?[0-9]|2[0-2])/.*" for the first 23 blocks.
        lora: see `lora.LoRA`; only adapters (and its `train`) train then.
        optimizer: see `Optimizer`; a name alone works.
        learning_rate: peak.
        mesh: see `Mesh`; None: all devices, parameters whole on each.
        remat: "none", "dots" or "block": what is computed again to save memory.
        loss_chunk: side of the tiles of the pairwise loss; bounds its memory.
        dtype: of the arithmetic: "float32" or "bfloat16"; parameters and updates stay float32.
        attention: back end by name; default "blocked" on a CPU, "splash" on TPUs, else "xla".
        preprocess: pixel preset.
        dicom: see `preprocess.dicom.rules.Rules`; a name alone works.
        augment: see `preprocess.augment.Augment`.
        validation: a split's name, or a share of the groups to hold out, or None.
        loader: "auto" (TensorFlow's kernels where it is installed), "tf" or "pil"; equal pixels.
        temperature: initial exp(t) of random weights.
        bias: initial b of random weights.
        log_every: steps between lines of metrics.
        tensorboard: write the metrics to `tensorboard/`, too; needs TensorFlow.
        eval_every: steps between evaluations; 0 only after the last.
        checkpoint_every: steps between checkpoints; 0 only at the end.
        keep: latest checkpoints kept.
        best: validation metric ("val_auc", or "val_loss": the lowest) whose best checkpoint is
            saved when it is found, kept and exported.
        max_unreadable: more different images than this that cannot be read end the run.
        max_skipped: updates in a row that are not finite that end the run.
    """

    data: tuple[Data, ...]
    total_steps: int
    init: str | None = None
    model: str | Mapping[str, Any] | None = None
    tokenizer: str | None = None
    batch_size: int = 32
    seed: int = 0
    objective: Objective = Objective()
    freeze: tuple[str, ...] = ()
    lora: LoRA | None = None
    optimizer: Optimizer = Optimizer()
    learning_rate: float = 1e-4
    mesh: Mesh | None = None
    remat: str = "none"
    loss_chunk: int | None = None
    dtype: str = "float32"
    attention: str | None = None
    preprocess: str = "big_vision"
    dicom: Rules = Rules()
    augment: Augment = field(default_factory=Augment)
    validation: str | float | None = None
    loader: str = "auto"
    temperature: float = 10.0
    bias: float = -10.0
    log_every: int = 10
    tensorboard: bool = False
    eval_every: int = 0
    checkpoint_every: int = 1000
    keep: int = 2
    best: str | None = None
    max_unreadable: int = 100
    max_skipped: int = 10

    def __post_init__(self):
        problems = [
            f"{name} is {value!r}; expected {expected}"
            for name, value, ok, expected in _constraints(self)
            if not ok
        ]
        if problems:
            raise ValueError("config: " + "; ".join(problems))

    @property
    def model_config(self) -> ModelConfig:
        """Of random weights."""
        return named(self.model) if isinstance(self.model, str) else ModelConfig.from_dict(
            dict(self.model or {})
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)


def _constraints(r: Recipe):
    """(key, value, whether it is right, what is expected)"""
    yield "data", r.data, len(r.data) > 0, "at least one source"
    yield "init", r.init, (r.init is None) != (r.model is None), "either init or model, not both"
    for name in ("total_steps", "batch_size", "log_every", "keep", "max_skipped"):
        value = getattr(r, name)
        yield name, value, value >= 1, "at least 1"
    for name in ("seed", "eval_every", "checkpoint_every", "max_unreadable"):
        value = getattr(r, name)
        yield name, value, value >= 0, "at least 0"
    for name, value in (("learning_rate", r.learning_rate), ("temperature", r.temperature),
                        ("optimizer.clip_norm", r.optimizer.clip_norm)):  # fmt: skip
        yield name, value, value > 0, "more than 0"
    for name, value in (("optimizer.b1", r.optimizer.b1), ("optimizer.b2", r.optimizer.b2)):
        yield name, value, 0 <= value < 1, "at least 0 and less than 1"
    for name, value in (("loss_chunk", r.loss_chunk), *vars(r.mesh or Mesh(model=1)).items()):
        yield name, value, value is None or value >= 1 or name == "fsdp", "at least 1"
    weight = r.objective.pos_weight
    right = not isinstance(weight, str) or weight == "balanced"
    yield "objective.pos_weight", weight, right, "'balanced', or one number per class"
    right = r.best is None or r.validation is not None
    yield "best", r.best, right, "no best without validation"
    names = ("contrastive", "classification")
    for name, value, allowed in (
        ("objective.name", r.objective.name, names),
        ("objective.negatives", r.objective.negatives, NEGATIVES),
        ("objective.pool", r.objective.pool, POOLS),
        ("optimizer.name", r.optimizer.name, ("adamw", "adafactor")),
        ("optimizer.schedule", r.optimizer.schedule, ("cosine", "rsqrt", "linear", "constant")),
        ("remat", r.remat, tuple(REMAT)),
        ("attention", r.attention, (None, *ATTENTION)),
        ("dtype", r.dtype, ("float32", "bfloat16")),
        ("preprocess", r.preprocess, tuple(PRESETS)),
        ("loader", r.loader, ("auto", "tf", "pil")),
    ):
        yield name, value, value in allowed, f"one of {', '.join(map(str, allowed))}"
    share = r.validation
    right = 0 < share < 1 if isinstance(share, float) else isinstance(share, str | None)
    yield "validation", share, right, "a split's name, or a share between 0 and 1"
    weights = [data.weight for data in r.data]
    right = None not in weights or not any(weights)
    yield "data.weight", weights, right, "one for every source, or none"
    pieces = r.objective.accumulate
    right = pieces >= 1 and r.batch_size % pieces == 0
    yield "objective.accumulate", pieces, right, f"a divisor of batch_size {r.batch_size}"
    yield "lora", r.lora, not (r.lora and r.freeze), "either lora or freeze, not both"


# ---------------------------------------------------------------------------- from config files

_NESTED = {
    "data": Data, "objective": Objective, "optimizer": Optimizer, "mesh": Mesh, "lora": LoRA,
    "augment": Augment, "dicom": Rules,
}  # fmt: skip


def from_dict(config: Mapping[str, Any]) -> Recipe:
    """A recipe of plain dicts, lists and values; every problem in one ValueError."""
    values, problems = dict(config), []
    if isinstance(values.get("data"), Mapping):
        values["data"] = (values["data"],)
    for key, kind in _NESTED.items():
        value = values.get(key)
        if key == "data" and value is not None:
            values[key] = tuple(_build(Data, x, "data", problems) for x in value)
        elif value is not None:
            if isinstance(value, str):
                value = {"name": value}
            values[key] = _build(kind, value, key, problems)
        else:
            values.pop(key, None)
    recipe = _build(Recipe, values, "config", problems)
    if problems:
        raise ValueError("; ".join(problems))
    return recipe


def _build(kind: type, values: Any, where: str, problems: list[str]) -> Any:
    fields, hints = {f.name: f for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    if not isinstance(values, Mapping):
        problems.append(f"{where} is {values!r}; expected a dict of {', '.join(fields)}")
        return None
    if unknown := sorted(set(values) - set(fields)):
        problems.append(f"{where} has no key {', '.join(unknown)}; there are {', '.join(fields)}")
    required = [n for n, f in fields.items() if f.default is f.default_factory]
    if missing := [name for name in required if values.get(name) is None]:
        problems.append(f"{where} lacks {', '.join(missing)}")
    wrong = [
        f"{name if kind is Recipe else f'{where}.{name}'} is {value!r}; expected {_said(hint)}"
        for name, hint in hints.items()
        if name in values and not _fits(value := _frozen(values[name]), hint)
    ]
    problems += wrong
    if unknown or missing or wrong:
        return None
    try:
        return kind(**{name: _cast(_frozen(x), hints[name]) for name, x in values.items()})
    except ValueError as error:
        problems.append(str(error) if kind is Recipe else f"{where}: {error}")
        return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; an int is a float, too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint) if hint is not Any else True


def _cast(value: Any, hint: Any) -> Any:
    """Ints that stand where floats are meant as floats."""
    arguments = typing.get_args(hint)
    if isinstance(value, tuple):
        kinds = [x for x in (hint, *arguments) if typing.get_origin(x) is tuple]
        inner = typing.get_args(kinds[0]) if kinds else ()
        inner = inner[:1] * len(value) if inner[-1:] == (...,) else inner
        return tuple(map(_cast, value, inner)) if inner else value
    meant = float in (hint, *arguments) and int not in (hint, *arguments)
    return float(value) if meant and isinstance(value, int) else value


def _said(hint: Any) -> str:
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", hint.__name__ if type(hint) is type else str(hint))


def _frozen(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_frozen(x) for x in value)
    return value


def describe() -> str:
    """Every key with its default and meaning, as the docstrings here have them."""
    parts = []
    for prefix, kind in (("", Recipe), *((f"{key}.", kind) for key, kind in _NESTED.items())):
        text = (inspect.getdoc(kind) or "").split("Attributes:\n")[1]
        meanings = dict(re.findall(r"^    (\w+): ((?:.+\n?(?:        .+\n?)*))", text, re.M))
        for f in dataclasses.fields(kind):
            meaning = " ".join(meanings[f.name].split())
            plain = isinstance(f.default, (str, int, float, tuple))
            default = f" (default {f.default!r})" if plain else ""
            parts.append(f"  --config.{prefix}{f.name}{default}\n      {meaning}\n")
    return "".join(parts)


def read(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Runs a config file and applies overrides.

    Args:
        path: a Python file with `get_config(arg=None)` -> ml_collections.ConfigDict; "FILE:arg"
            passes the argument.
        overrides: "--config.key=value", for any key of a recipe, also those that the file leaves
            at their defaults; values are Python literals, or else strings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a wrong key or value, or a file that is no config.
    """
    config = _plain(_run(path))
    for override in overrides:
        _apply(config, override)
    return from_dict(config)


def _run(path: str) -> Any:
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such config file")
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: not a Python file; expected one with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(argument) if argument else module.get_config()
    except Exception as error:  # whatever a config file may do wrong
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error


def _apply(config: dict[str, Any], override: str) -> None:
    """Sets one key, in place."""
    path, equals, text = override.removeprefix("--config.").partition("=")
    if not equals:
        raise ValueError(f"{override}: no value; write {override}=VALUE")
    *groups, key = path.split(".")
    for group in groups:
        nested = config.get(group)
        if isinstance(nested, str) and group in _NESTED:
            nested = {"name": nested}  # the short form
        if nested is None:
            nested = {}
        if not isinstance(nested, dict):
            raise ValueError(
                f"{override}: {group} is {nested!r}, not a dict of keys; change the file"
            )
        config[group] = config = nested
    try:
        config[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        config[key] = text


def _plain(value: Any) -> Any:
    """ConfigDicts, and placeholders in them, as plain Python."""
    from ml_collections import ConfigDict, FieldReference

    if isinstance(value, (ConfigDict, dict)):
        return {key: _plain(value[key]) for key in value}
    if isinstance(value, FieldReference):
        return _plain(value.get())
    if isinstance(value, (list, tuple)):
        return tuple(_plain(x) for x in value)
    return value
