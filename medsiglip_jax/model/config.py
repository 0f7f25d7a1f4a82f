"""Architectures as frozen dataclasses, and the named ones that need no file."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from medsiglip_jax.files import settings
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.image import preset


@dataclass(frozen=True)
class PixelConfig:
    """What the image tower takes, where it is not SigLIP's [-1, 1] of bicubic pixels.

    Attributes:
        mean: of red, green and blue, subtracted from values in 0..1.
        std: of each, by which the difference is divided.
        resample: how transformers resizes, "bicubic" or "bilinear"; the preset "huggingface" does
            the same, the others resize as their names say.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bicubic"

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"pixels.{name} is {values!r}; expected three finite numbers")
        if not all(self.std):
            raise ValueError(f"pixels.std is {self.std!r}; expected numbers other than 0")
        if self.resample not in ("bicubic", "bilinear"):
            raise ValueError(f"pixels.resample is {self.resample!r}; expected bicubic or bilinear")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"mean": list(self.mean), "std": list(self.std), "resample": self.resample}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "PixelConfig":
        """Inverse of `to_dict`; a ValueError says all that is wrong."""
        return settings.build(cls, tree, "pixels")

    @property
    def plain(self) -> bool:
        """Whether values lie in [-1, 1], as for every released SigLIP."""
        return set(self.mean) == set(self.std) == {0.5}


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: a ViT with learned position embeddings.

    Attributes:
        image_size: side of the square input, pixels.
        patch_size: side of a patch, pixels; border pixels beyond the last full patch are dropped
            (VALID convolution, big_vision models/vit.py:214).
        width: residual stream width; also the embedding size (SigLIP has no image projection).
        depth: number of transformer blocks.
        mlp_dim: hidden width of the MLP blocks.
        num_heads: attention heads; must divide `width`.
        pool: "map" for the attention-pooling head, "mean" for checkpoints that have none
            (MedGemma, Gemma 3), whose embedding is the mean of the patch tokens.
        pixels: normalisation and resampling, if they are not SigLIP's.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    pool: str = "map"
    pixels: PixelConfig = PixelConfig()

    def __post_init__(self):
        _check_tower(self)
        if self.pool not in POOLS:
            raise ValueError(f"vision.pool is {self.pool!r}; expected 'map' or 'mean'")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"vision.image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads


@dataclass(frozen=True)
class TextConfig:
    """The text tower: bidirectional, no mask, pooled at the last position, then a Dense head.

    Attributes:
        vocab_size: SentencePiece pieces.
        context_length: tokens per text; the model accepts exactly this many.
        embed_dim: width of the head's output, equal to the image tower's width.
    """

    vocab_size: int
    context_length: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    embed_dim: int

    def __post_init__(self):
        _check_tower(self)

    @property
    def num_tokens(self) -> int:
        return self.context_length

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads


POOLS = ("map", "mean")


@dataclass(frozen=True)
class ClassifierConfig:
    """A linear classifier on the features of the image tower.

    Attributes:
        labels: names of the classes, or of the findings.
        pool: what it reads: "map", the output of the attention-pooling head, or "mean", the mean of
            the patch tokens, as transformers' SiglipForImageClassification.
        multi_label: several findings per image (sigmoid) instead of one class (softmax).
        thresholds: the probability from which each label counts as positive, None where it was
            not chosen; empty if none was.
        preprocess: the pixel preset that it was trained with.
        dicom: how DICOM files, volumes and 16-bit grey became pixels then.
    """

    labels: tuple[str, ...]
    pool: str = "mean"
    multi_label: bool = False
    thresholds: tuple[float | None, ...] = ()
    preprocess: str = "huggingface"
    dicom: Rules = Rules()

    def __post_init__(self):
        labels, thresholds = self.labels, self.thresholds
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"classifier.labels is {labels!r}; expected names, each once")
        if self.pool not in POOLS:
            raise ValueError(f"classifier.pool is {self.pool!r}; expected 'map' or 'mean'")
        if thresholds and len(thresholds) != len(labels):
            raise ValueError(
                f"classifier.thresholds has {len(thresholds)} numbers for {len(labels)} labels"
            )
        if not all(t is None or isinstance(t, int | float) and t >= 0 for t in thresholds):
            raise ValueError(f"classifier.thresholds is {thresholds!r}; expected probabilities")


@dataclass(frozen=True)
class Preparation:
    """How image files become what the image tower takes.

    Attributes:
        preprocess: the pixel preset.
        dicom: how DICOM files, volumes and 16-bit grey become pixels.
    """

    preprocess: str = "big_vision"
    dicom: Rules = Rules()

    def __post_init__(self):
        preset(self.preprocess)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"preprocess": self.preprocess, "dicom": self.dicom.to_dict()}


@dataclass(frozen=True)
class ModelConfig:
    """Both towers; one of them is None if the checkpoint lacks it. A classifier reads the image
    tower.

    Attributes:
        vision, text, classifier: see there.
        preparation: how images were prepared when the model was fine-tuned here, or None. Of a
            model that has a classifier, the classifier says it.
    """

    vision: VisionConfig | None = None
    text: TextConfig | None = None
    classifier: ClassifierConfig | None = None
    preparation: Preparation | None = None

    def __post_init__(self):
        if self.classifier and not self.vision:
            raise ValueError("a classifier reads the image tower, and this model has none")
        if self.vision is None and self.text is None:
            raise ValueError("a model needs a vision tower, a text tower or both; got neither")
        if self.vision and self.text and self.vision.width != self.text.embed_dim:
            raise ValueError(
                f"the towers must embed into the same space: vision.width is {self.vision.width}, "
                f"text.embed_dim is {self.text.embed_dim}"
            )

    def check_sizes(self) -> None:
        """Raises a ValueError for a number that is larger than any model's could be.

        Where tensors are there, they say more precisely what the numbers should be.
        """
        for tower in filter(None, (self.vision, self.text)):
            for name, largest in _LARGEST.items():
                if (value := getattr(tower, name, 0)) > largest:
                    where = f"{type(tower).__name__}.{name}"
                    raise ValueError(f"{where} is {value}; expected at most {largest:,}")

    @property
    def trained(self) -> Preparation | None:
        """How images were prepared in training, if the checkpoint says so."""
        if self.classifier:
            return Preparation(self.classifier.preprocess, self.classifier.dicom)
        return self.preparation

    def prepared(
        self,
        preprocess: str | None = None,
        dicom: Rules | None = None,
        asked: Collection[str] | None = None,
    ) -> Preparation:
        """How images are prepared: as asked for, else as in training, else by the defaults.

        Args:
            preprocess: the pixel preset that is asked for.
            dicom: the rules that are asked for. Frames, slide labels and limits of sizes are never
                taken from training.
            asked: the names of the fields of `dicom` that are asked for, where not all of them are;
                the others are as in training if they are at their defaults.
        """
        own = self.trained or Preparation()
        if dicom is None:
            dicom, asked = Rules(), ()
        rules = dicom if asked is None else dicom.as_trained(own.dicom, asked)
        return Preparation(preprocess or own.preprocess, rules)

    @property
    def image_size(self) -> int | None:
        return self.vision.image_size if self.vision else None

    @property
    def context_length(self) -> int | None:
        return self.text.context_length if self.text else None

    @property
    def embed_dim(self) -> int:
        if self.vision:
            return self.vision.width
        assert self.text is not None
        return self.text.embed_dim

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`; a ValueError says all that is wrong, such as an unknown key."""
        return settings.build(cls, tree)


# At least ten times as large as in any SigLIP, and small enough to write down shapes with.
_LARGEST = dict(
    image_size=16_384, width=65_536, depth=1_000, mlp_dim=1_048_576, vocab_size=16_777_216,
    context_length=1_048_576, embed_dim=65_536,
)  # fmt: skip


def _check_tower(config: VisionConfig | TextConfig) -> None:
    tower, width, heads = type(config).__name__, config.width, config.num_heads
    for name, value in vars(config).items():
        if name not in ("pool", "pixels") and (type(value) is not int or value < 1):
            raise ValueError(f"{tower}.{name} is {value!r}; expected a positive integer")
    if width % heads:
        raise ValueError(f"{tower}.width {width} is not divisible by num_heads {heads}")


def two_towers(
    *,
    image_size: int,
    patch_size: int,
    width: int,
    depth: int,
    mlp_dim: int,
    num_heads: int,
    vocab_size: int = 32_000,
    context_length: int = 64,
) -> ModelConfig:
    """A model whose towers have the same sizes (as all released SigLIPs)."""
    vision = VisionConfig(image_size, patch_size, width, depth, mlp_dim, num_heads)
    text = TextConfig(vocab_size, context_length, width, depth, mlp_dim, num_heads, width)
    return ModelConfig(vision, text)


_BASE = dict(patch_size=16, width=768, depth=12, mlp_dim=3072, num_heads=12)
_LARGE = dict(patch_size=16, width=1024, depth=24, mlp_dim=4096, num_heads=16)
_SO400M = dict(patch_size=14, width=1152, depth=27, mlp_dim=4304, num_heads=16)

# big_vision models/vit.py:284-303 and the table of SigLIP_demo; "tiny-56" is only for tests and dry
# runs. so400m-448 is MedSigLIP: 878,300,338 parameters.
NAMED = {
    "so400m-448": two_towers(image_size=448, **_SO400M),
    "so400m-384": two_towers(image_size=384, **_SO400M),
    "so400m-224": two_towers(image_size=224, context_length=16, **_SO400M),
    "large-384": two_towers(image_size=384, **_LARGE),
    "large-256": two_towers(image_size=256, **_LARGE),
    "base-512": two_towers(image_size=512, **_BASE),
    "base-384": two_towers(image_size=384, **_BASE),
    "base-256": two_towers(image_size=256, **_BASE),
    "base-224": two_towers(image_size=224, **_BASE),
    "tiny-56": two_towers(
        image_size=56, patch_size=14, width=48, depth=3, mlp_dim=96, num_heads=4, vocab_size=256
    ),
}


def named(name: str) -> ModelConfig:
    """The architecture called `name`; a ValueError that lists all names if it is unknown."""
    if name not in NAMED:
        raise ValueError(f"unknown model size {name!r}; expected one of {', '.join(NAMED)}")
    return NAMED[name]
