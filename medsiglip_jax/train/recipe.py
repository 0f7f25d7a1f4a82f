"""What a fine-tuning run is: a config turned, once, into frozen dataclasses."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, get_args, get_type_hints

from medsiglip_jax.data.labels import Policy
from medsiglip_jax.files import settings
from medsiglip_jax.model import devices
from medsiglip_jax.model.attention import ATTENTION
from medsiglip_jax.model.config import ModelConfig, named
from medsiglip_jax.model.towers import REMAT
from medsiglip_jax.preprocess.augment import Augment
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import PRESETS
from medsiglip_jax.train.lora import LoRA
from medsiglip_jax.train.objectives.contrastive import Contrastive
from medsiglip_jax.train.objectives.objective import Objective
from medsiglip_jax.train.objectives.table import OBJECTIVES
from medsiglip_jax.train.optim import OptimizerConfig

_SPLIT = settings.Check(
    lambda x: isinstance(x, str) or 0 < x < 1, "a split's name, or a share between 0 and 1"
)
_DECAY = settings.Check(lambda x: 0 < x < 1, "more than 0 and less than 1")
_Count = Annotated[int, settings.at_least(1)]
_Interval = Annotated[int, settings.at_least(0)]
LOADERS = ("auto", "tfdata", "threads", "pil")


@dataclass(frozen=True)
class Data:
    """One source of examples: the arguments of `examples.read`, and its weight in the mixture.

    Attributes:
        path: a CSV, Parquet or JSONL table, a folder of class folders, TFRecord shards, WebDataset
            .tar with captions in .txt or .json (the column "text") and classes in .cls (the column
            "label"), or "tfds:NAME[/CONFIG][:VERSION]", a data set that TFDS has prepared
            (`tfds build NAME`); `image`, `text`, `label` and so on then name its features.
        root: the folder that image paths are relative to, by default that of the table; for
            "tfds:…" the data_dir, by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
        image: the column of image paths.
        text: the column of texts.
        label: the column of class names or numbers; or a tuple of columns of findings: 0, 1, true,
            false, yes, no, and -1 (uncertain).
        uncertain: what -1 is in a finding: "ignore" (like an empty cell), "positive" or "negative",
            for all findings or by finding, such as {"Edema": "positive", "*": "ignore"}.
        label_separator: what stands between the classes in a cell of one column of labels, such as
            "|"; "none" if each cell is one class. Lists need none.
        split: the column that names the split of each row.
        group: the column of patients, cases or studies; a group stays on one side of a split.
        captions: how to make texts of labels: "a photo of {label}", or {class: caption}.
        classes: names and order of the classes; by default those in the data, sorted.
        positives: "text", "label" or a column; rows with equal values are positive pairs.
        all_files: know images in class folders by their content, whatever their suffix.
        weight: share of the mixture; by default in proportion to the number of rows.
    """

    path: str
    root: str | None = None
    image: str = "image"
    text: str = "text"
    label: str | tuple[str, ...] | None = None
    uncertain: str | Mapping[str, str] = "ignore"
    label_separator: str | None = None
    split: str = "split"
    group: str = "group"
    captions: str | Mapping[str, str] | None = None
    classes: tuple[str, ...] | None = None
    positives: str | None = None
    all_files: bool = False
    weight: Annotated[float | None, settings.more_than(0)] = None

    def __post_init__(self):
        Policy(self.uncertain)


@dataclass(frozen=True)
class MeshConfig:
    """The devices of the run.

    Attributes:
        data: number of devices over which batches are split; by default all.
        fsdp: whether large parameters and their optimiser state are split over the devices, too.
    """

    data: Annotated[int | None, settings.at_least(1)] = None
    fsdp: bool = False


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning run.

    Attributes:
        data: one source of examples, or several that are mixed.
        total_steps: number of updates.
        epochs: number of passes over the training examples, instead of total_steps; parts of one
            count.
        init: the checkpoint to start from (anything `load` takes); None starts from random weights.
        model: with init=None, a named size or the dict of a `ModelConfig`.
        tokenizer: the SentencePiece model, if `init` has none.
        batch_size: examples per update, over all hosts.
        seed: of the data order, the augmentation, the adapters and random weights.
        objective: what the model is trained for; its name alone is enough.
        freeze: regexes over the paths of parameters that do not train, such as "img/.*", or
            "img/Transformer/encoderblock_(1?[0-9]|2[0-2])/.*" for the first 23 blocks.
        lora: train adapters only, and what `lora.train` names.
        optimizer: how the weights are updated; its name alone is enough.
        learning_rate: the peak of the schedule.
        ema: decay of a moving average of what trains, such as 0.9999, which is then evaluated and
            exported; after n updates at most n / (9 + n). None keeps none.
        mesh: the devices; None takes all and keeps the parameters whole on each.
        remat: what is recomputed in the backward pass to save memory: "none", "dots" or "block".
        loss_chunk: side of the tiles of the pairwise loss, which bounds its memory.
        dtype: of the arithmetic, "float32", "bfloat16", or "auto" (bfloat16 on accelerators that
            have it, float32 elsewhere); parameters and updates stay float32.
        attention: back end by name; by default "blocked" on a CPU, "splash" on a TPU, "cudnn" on an
            NVIDIA GPU since 2020, else "xla".
        preprocess: name of the preprocessing preset.
        dicom: how DICOM and NIfTI files become pixels; a name alone is enough.
        augment: random changes of the training images.
        validation: the name of a split, a share of the groups to hold out, or None.
        loader: who makes the batches, which are equal to the bit: "tfdata", a tf.data pipeline;
            "threads", with TensorFlow's decoder if it is installed; or "pil", threads without it.
            "auto" is "threads", which take less CPU time than tf.data, or tf.data where there is a
            `data_service`.
        workers: threads that read and decode images, on each host; by default the cores of the
            process, or the CPU quota of its container.
        data_service: the dispatcher of a tf.data service, "grpc://HOST:PORT", whose workers read
            and decode for hosts that are too slow (`python -m medsiglip_jax.data.tf.service`).
        temperature: initial exp(t) of random weights.
        bias: initial b of random weights.
        log_every: steps between lines of metrics.
        tensorboard: whether the metrics are written to `tensorboard/`, too; needs TensorFlow.
        logger: "module:function" or "file.py:function"; the function gets the run's config once
            and returns what is called with (step, {metric: value}), such as `wandb.log`'s.
        eval_every: steps between evaluations; 0 evaluates only after the last step.
        checkpoint_every: steps between checkpoints; 0 saves only after the last step.
        keep: number of latest checkpoints to keep.
        best: the validation metric whose best checkpoint is kept and exported: the lowest if the
            name ends in "loss", else the highest, such as "val_auc".
        max_unreadable: the run ends when more different images than this cannot be read.
        max_skipped: the run ends after so many updates in a row that are not finite.
    """

    data: tuple[Data, ...]
    total_steps: _Count | None = None
    epochs: Annotated[float | None, settings.more_than(0)] = None
    init: str | None = None
    model: str | Mapping[str, Any] | None = None
    tokenizer: str | None = None
    batch_size: _Count = 32
    seed: Annotated[int, settings.at_least(0)] = 0
    objective: Annotated[Objective, settings.Variants(OBJECTIVES)] = Contrastive()
    freeze: tuple[str, ...] = ()
    lora: LoRA | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: Annotated[float, settings.more_than(0)] = 1e-4
    ema: Annotated[float | None, _DECAY] = None
    mesh: MeshConfig | None = None
    remat: Annotated[str, settings.one_of(REMAT)] = "none"
    loss_chunk: Annotated[int | None, settings.at_least(1)] = None
    dtype: Annotated[str, settings.one_of(("float32", "bfloat16", devices.AUTO))] = "float32"
    attention: Annotated[str | None, settings.one_of(ATTENTION)] = None
    preprocess: Annotated[str, settings.one_of(PRESETS)] = "big_vision"
    dicom: Rules = Rules()
    augment: Augment = field(default_factory=Augment)
    validation: Annotated[str | float | None, _SPLIT] = None
    loader: Annotated[str, settings.one_of(LOADERS)] = "auto"
    workers: Annotated[int | None, settings.at_least(1)] = None
    data_service: str | None = None
    temperature: Annotated[float, settings.more_than(0)] = 10.0
    bias: float = -10.0
    log_every: _Count = 10
    tensorboard: bool = False
    logger: str | None = None
    eval_every: _Interval = 0
    checkpoint_every: _Interval = 1000
    keep: _Count = 2
    best: str | None = None
    max_unreadable: Annotated[int, settings.at_least(0)] = 100
    max_skipped: _Count = 10

    def __post_init__(self):
        if problems := list(_contradictions(self)):
            raise ValueError("; ".join(problems))

    @property
    def model_config(self) -> ModelConfig:
        """The architecture of random weights."""
        if isinstance(self.model, str):
            return named(self.model)
        return ModelConfig.from_dict(dict(self.model or {}))


def _contradictions(r: Recipe) -> Iterator[str]:
    """Keys that are right on their own and wrong together."""
    if not r.data:
        yield "data is empty; expected at least one source"
    if r.total_steps is None and r.epochs is None:
        yield "lacks total_steps, or epochs"
    if (r.init is None) == (r.model is None):
        yield f"init is {r.init!r} and model {r.model!r}; expected either init or model, not both"
    if r.best is not None and r.validation is None:
        yield f"best is {r.best!r}; expected no best without validation"
    weights = [data.weight for data in r.data]
    if None in weights and any(weights):
        yield f"data.weight is {weights!r}; expected one for every source, or none"
    if r.batch_size % r.objective.accumulate:
        pieces = r.objective.accumulate
        yield f"objective.accumulate is {pieces}; expected a divisor of batch_size {r.batch_size}"
    if r.data_service is not None and not re.fullmatch(r"grpc://[^/:]+:\d{1,5}", r.data_service):
        yield f"data_service is {r.data_service!r}; expected grpc://HOST:PORT of a dispatcher"
    if r.data_service is not None and r.loader not in ("auto", "tfdata"):
        yield f"data_service is given, and loader is {r.loader!r}; expected loader 'tfdata'"
    if r.lora and r.freeze:
        yield f"freeze is {r.freeze!r}; expected either lora or freeze, not both"


def from_dict(config: Mapping[str, Any]) -> Recipe:
    """A recipe of plain dicts, lists and values, such as `dataclasses.asdict` of one.

    Raises:
        ValueError: all that is wrong with them.
    """
    return settings.build(Recipe, config)


# Key of a recipe -> the dataclasses that it may hold.
GROUPS = {
    name: kinds
    for name, hint in get_type_hints(Recipe, include_extras=True).items()
    if (kinds := settings.tables(hint))
}


def keys() -> list[dict[str, Any]]:
    """Every key as plain values, for JSON.

    Returns:
        For each its `key`, such as "optimizer.b1"; `type`, as Python writes it; whether it is
        `required`; its `default` where that is a plain value, else None; its `meaning`, as the
        docstrings here have it; and `only_with`, the name of the variant that has it, or None.
    """
    groups = {"": (Recipe,), **GROUPS}
    return [key for group, kinds in groups.items() for key in _keys(group, kinds)]


def describe() -> str:
    """Every key with its default and meaning, as text."""
    return "".join(f"  --config.{_titled(key)}\n      {_explained(key)}\n" for key in keys())


def _titled(key: Mapping[str, Any]) -> str:
    default = key["default"]
    return key["key"] + (f" (default {default!r})" if default is not None else "")


def _explained(key: Mapping[str, Any]) -> str:
    return (f"With {key['only_with']}: " if key["only_with"] else "") + key["meaning"]


def _keys(group: str, kinds: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Those of a group, one of several kinds; what they share is the first one's."""
    shared = set.intersection(*({f.name for f in fields(kind)} for kind in kinds))
    for kind in kinds:
        meanings, types = _meanings(kind), get_type_hints(kind)
        for f in fields(kind):
            if f.name in shared and kind is not kinds[0]:
                continue
            plain = isinstance(f.default, (str, int, float, tuple))
            yield {
                "key": f"{group}.{f.name}" if group else f.name,
                "type": _named(types[f.name]),
                "required": f.default is MISSING and f.default_factory is MISSING,
                "default": f.default if plain else None,
                "meaning": meanings[f.name],
                "only_with": None if f.name in shared else kind.name,
            }


def _named(hint: Any) -> str:
    """A type as Python writes it, without the modules of its parts."""
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    name = re.sub(r"\b(?:\w+\.)+(?=\w)", "", name)
    return re.sub(r"Optional\[(.+)\]", r"\1 | None", name)


def _meanings(kind: type) -> dict[str, str]:
    """Field -> its line under "Attributes:" in the docstring of its class or a base."""
    meanings: dict[str, str] = {}
    for base in kind.__mro__[:-1]:
        text = (inspect.getdoc(base) or "").partition("Attributes:\n")[2]
        meanings |= dict(re.findall(r"^    (\w+): ((?:.+\n?(?:        .+\n?)*))", text, re.M))
    return {name: " ".join(meaning.split()) for name, meaning in meanings.items()}
