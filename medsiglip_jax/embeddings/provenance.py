"""How vectors were made, and whether two kinds of them can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from medsiglip_jax.files import settings
from medsiglip_jax.inference.manifest import UNKNOWN, Manifest
from medsiglip_jax.model.api import Model
from medsiglip_jax.model.config import PixelConfig
from medsiglip_jax.preprocess.dicom.rules import Rules, from_dict, treatment

# Identifies weights that were made in this process and have no files: equal to no file's.
_UNSAVED = "weights never saved"


@dataclass(frozen=True)
class Provenance:
    """How vectors were made. None means unknown, and agrees with everything.

    Attributes:
        dim: numbers per vector.
        model: sha256 of the weights.
        preprocess: pixel preset.
        normalized: unit vectors, or the raw pooled output.
        source: where the model came from, for messages only.
        dicom: `Rules.to_dict` of the rules by which DICOM files became pixels; only what
            `treatment` keeps of them, and `volume`, is compared.
        mpp: micrometres per pixel of tiles of slides.
        pixels: `PixelConfig.to_dict`: equal weights may lie beside another image processor; the
            resampling is compared only for the preset that does it.
    """

    dim: Annotated[int, settings.at_least(1)]
    model: str | None = None
    preprocess: str | None = None
    normalized: bool | None = None
    source: str | None = None
    dicom: Mapping[str, Any] | None = None
    mpp: float | None = None
    pixels: Mapping[str, Any] | None = None

    def __post_init__(self):
        from_dict(self.dicom)  # both raise a ValueError for what is none
        PixelConfig.from_dict(self.pixels or {})

    def check(self, made: "Provenance", what: object = "these vectors") -> None:
        """Raises ValueError, naming both sides, if vectors were not made as they are wanted here.

        Args:
            made: how the vectors were made.
            what: the vectors, for the message.
        """
        theirs = made._compared()
        differ = [
            f"{name} is {theirs[name]!r}, wanted {mine!r}"
            for name, mine in self._compared().items()
            if None not in (mine, theirs[name]) and mine != theirs[name]
        ]
        if differ:
            raise ValueError(
                f"{what}: made with {made.source or 'arrays'}, wanted as with "
                f"{self.source or 'arrays'}: {'; '.join(differ)}; vectors made differently cannot "
                "be compared: embed again, or give the model or probe that goes with them"
            )

    def _compared(self) -> dict[str, Any]:
        huggingface = self.preprocess == "huggingface"  # the only preset that asks
        return {
            "dim": self.dim,
            "sha256 of the model": self.model,
            "preprocess": self.preprocess,
            "normalized": self.normalized,
            "dicom": treatment(self.dicom),
            "volume": (self.dicom or {}).get("volume"),
            "mpp": self.mpp,
            **{name: (self.pixels or {}).get(name) for name in ("mean", "std")},
            "resample": (self.pixels or {}).get("resample") if huggingface else None,
        }


def of_model(
    model: Model,
    preprocess: str | None = None,
    normalized: bool | None = None,
    dicom: Rules | None = None,
) -> Provenance:
    """The provenance of vectors that a model makes now."""
    sha256, source = model.sha256 or _UNSAVED, model.source or _UNSAVED
    rules, vision = dicom.to_dict() if dicom else None, model.config.vision
    return Provenance(
        model.config.embed_dim, sha256, preprocess, normalized, source, rules,
        pixels=vision.pixels.to_dict() if vision else None,
    )  # fmt: skip


def of_run(manifest: Manifest) -> Provenance:
    """The provenance of the vectors that `embed` wrote, or another program (`elsewhere`)."""
    if manifest.preprocess == UNKNOWN:
        return Provenance(manifest.dim, normalized=manifest.normalized, source="another program")
    return Provenance(
        manifest.dim, manifest.model.sha256 or _UNSAVED, manifest.preprocess, manifest.normalized,
        manifest.model.source or _UNSAVED, manifest.dicom, manifest.expansion.get("mpp"),
        manifest.pixels or PixelConfig().to_dict(),
    )  # fmt: skip
