"""How a task is run."""

from dataclasses import asdict, dataclass

from medsiglip_jax.data.labels import Policy
from medsiglip_jax.evaluate import zero_shot
from medsiglip_jax.evaluate.learned import Draws
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import preset

AS_GIVEN, DEFAULT = "as given", "big_vision"
# What is learned from -> the parts that it needs.
LEARN = {"": (), "thresholds": ("validation",), "probe": ("train", "validation")}


@dataclass(frozen=True)
class Options:
    """How a task is run.

    Attributes:
        preprocess: pixel preset; None is that of the given embeddings, or "big_vision".
        score: a rule of `zero_shot.RULES`; None is the task's own.
        reading: of the task's `readings`, or "as given".
        temperature: what softmax rules multiply cosines with: "logit_scale" or "none".
        policy: what labels that are neither 0 nor 1 mean.
        allow_missing: go on without images that are missing or unreadable.
        resamples: of bootstraps.
        seed: of bootstraps, and of parts that have to be drawn.
        batch_size: images per call of the encoder.
        grid: also every preset, reading of the prompts and, for softmax over classes, temperature.
        learn: "thresholds" (and calibration) from validation images; "probe", also a linear probe,
            neighbours and learning curves from training images; or "", nothing.
        draws: of learning curves.
        prevalence: at which predictive values are stated, besides that of the test images.
        dicom: how DICOM files become pixels.
    """

    preprocess: str | None = None
    score: str | None = None
    reading: str = AS_GIVEN
    temperature: str = "logit_scale"
    policy: Policy = Policy()
    allow_missing: bool = False
    resamples: int = 2000
    seed: int = 0
    batch_size: int = 8
    grid: bool = False
    learn: str = ""
    draws: Draws = Draws()
    prevalence: float | None = None
    dicom: Rules = Rules()

    def __post_init__(self):
        preset(self.preprocess or DEFAULT)
        if self.score is not None:
            zero_shot.rule(self.score)
        zero_shot.check_temperature(self.temperature)
        if self.resamples < 1:
            raise ValueError(f"resamples is {self.resamples}; expected at least 1")
        if self.learn not in LEARN:
            named = ", ".join(filter(None, LEARN))
            raise ValueError(f"learn is {self.learn!r}; expected one of {named}")
        if self.prevalence is not None and not (self.learn and 0 < self.prevalence < 1):
            raise ValueError(
                f"prevalence is {self.prevalence}; expected a share between 0 and 1, and what "
                "thresholds are learned by (--learn)"
            )


@dataclass(frozen=True)
class Cell:
    """One variant: a preset, a reading of the prompts, a temperature of the softmax."""

    preprocess: str
    reading: str
    temperature: str

    @property
    def file(self) -> str:
        return "-".join(asdict(self).values()).replace(" ", "_") + ".parquet"
