"""How a task is run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from medsiglip_jax.data.labels import Policy
from medsiglip_jax.embeddings.probe import learning
from medsiglip_jax.evaluate import zero_shot
from medsiglip_jax.evaluate.units import Unit
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import preset
from medsiglip_jax.trust.explanation import ExplainOptions

AS_GIVEN, DEFAULT = "as given", "big_vision"
# What is learned -> the parts of the data set that it needs.
LEARN = {"": (), "thresholds": ("validation",), "probe": ("train", "validation")}


@dataclass(frozen=True)
class Draws:
    """How learning curves are drawn.

    Attributes:
        sizes: numbers of training images; all of them are always the last point.
        seeds: draws of each size.

    Raises:
        ValueError: a number is below 1.
    """

    sizes: tuple[int, ...] = learning.SIZES
    seeds: int = 3

    def __post_init__(self):
        if self.seeds < 1 or not all(size > 0 for size in self.sizes):
            raise ValueError(
                f"sizes are {list(self.sizes)} and seeds {self.seeds}; expected at least 1 each"
            )


@dataclass(frozen=True)
class EvaluateOptions:
    """How a task is run.

    Attributes:
        preprocess: pixel preset; None is that of the given embeddings, or of the model's
            training, or "big_vision".
        score: a rule of `zero_shot.RULES`; None is the task's own.
        reading: a name in the task's `readings`, or "as given".
        over_prompts: how several prompts of a class become one; see `zero_shot.class_prompts`.
        temperature: softmax rules multiply cosines by exp(t) ("logit_scale") or by 1 ("none").
        policy: what labels mean that are neither 0 nor 1.
        part_policies: "train", "validation" or "test" -> its policy, where it has another.
        allow_missing: go on without images that are missing or unreadable.
        prefer: which of several files of one image is read: "largest", or a folder below the data.
        allow_leaks: go on with parts that are not disjoint; the report says so.
        resamples: the number of resamples of bootstraps, at least 1.
        seed: the seed of bootstraps, and of splits that have to be drawn; at least 0.
        batch_size: images per call of the encoder.
        grid: also run every preset, every reading of the prompts and, for a softmax over classes,
            every temperature.
        learn: "thresholds": operating points and calibration, from validation images; "probe": also
            a linear probe, nearest neighbours and learning curves, from training images; "" is
            nothing.
        draws: how learning curves are drawn.
        prevalence: a share of positives, in (0, 1), for which predictive values are stated, too,
            besides that of the test images.
        dicom: how DICOM files become pixels.
        asked: which fields of `dicom` are asked for; the others are as in the model's training
            where that is known and they are at their defaults.
        export: also write every table and figure of the report as a file.
        by: columns of the tables, such as hospitals, to compare subgroups by besides those of the
            task.
        unit: what is judged instead of single images.
        explain: a method of `trust.explanation.METHODS`: maps of the classes are made for the
            images in which the data set says where they lie, and measured by that; "" is none.
        explain_images: at most so many of these images; None is all.

    Raises:
        ValueError: an option is none of those that there are, out of range, or needs another one.
    """

    preprocess: str | None = None
    score: str | None = None
    reading: str = AS_GIVEN
    temperature: str = "logit_scale"
    over_prompts: str = "embedding"
    policy: Policy = Policy()
    part_policies: Mapping[str, Policy] = field(default_factory=dict)
    allow_missing: bool = False
    prefer: str = ""
    allow_leaks: bool = False
    resamples: int = 2000
    seed: int = 0
    batch_size: int = 8
    grid: bool = False
    learn: str = ""
    draws: Draws = Draws()
    prevalence: float | None = None
    dicom: Rules = Rules()
    asked: frozenset[str] = frozenset()
    export: bool = False
    by: tuple[str, ...] = ()
    unit: Unit | None = None
    explain: str = ""
    explain_images: int | None = None

    def policy_of(self, part: str) -> Policy:
        """What labels of a part mean."""
        return self.part_policies.get(part, self.policy)

    def __post_init__(self):
        preset(self.preprocess or DEFAULT)
        if self.score is not None:
            zero_shot.rule(self.score)
        zero_shot.check_temperature(self.temperature)
        if self.over_prompts not in zero_shot.OVER_PROMPTS:
            choices = ", ".join(zero_shot.OVER_PROMPTS)
            raise ValueError(f"over_prompts is {self.over_prompts!r}; expected one of {choices}")
        for name, least in (("resamples", 1), ("batch_size", 1), ("seed", 0)):
            if (number := getattr(self, name)) < least:
                raise ValueError(f"{name} is {number}; expected at least {least}")
        if self.learn not in LEARN:
            choices = ", ".join(filter(None, LEARN))
            raise ValueError(f"learn is {self.learn!r}; expected one of {choices}")
        if self.explain:
            ExplainOptions(self.explain)
        if self.explain_images is not None and not (self.explain and self.explain_images > 0):
            raise ValueError(
                f"explain_images is {self.explain_images}; expected at least 1, together with "
                "--explain"
            )
        if self.prevalence is not None and not (self.learn and 0 < self.prevalence < 1):
            raise ValueError(
                f"prevalence is {self.prevalence}; expected a share between 0 and 1, together with "
                "--learn, which fixes the thresholds that predictive values need"
            )


@dataclass(frozen=True)
class GridCell:
    """One variant: a pixel preset, a reading of the prompts, a temperature of the softmax."""

    preprocess: str
    reading: str
    temperature: str

    @property
    def file(self) -> str:
        """The name of the file of its scores."""
        return "-".join(asdict(self).values()).replace(" ", "_") + ".parquet"
