"""Vectors that were made differently are not compared."""

from dataclasses import replace

import pytest

from medsiglip_jax.embeddings.provenance import of_run
from medsiglip_jax.inference.manifest import Manifest, Weights
from medsiglip_jax.model.config import PixelConfig
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.parts import Parts


def test_what_is_not_known_demands_nothing():
    fine = of_run(
        Manifest(
            model=Weights("m", "5a1"), preprocess="serving", dim=3, normalized=True, parts=(),
            dicom=Rules(volume="ct").to_dict(), expansion=Parts(mpp=0.5).to_dict(),
        )
    )  # fmt: skip
    assert fine.mpp == 0.5
    coarse = replace(fine, mpp=2.0, dicom=Rules(volume="percentile", frame=3).to_dict())
    with pytest.raises(ValueError, match="volume is 'perc.*', wanted 'ct'; mpp is 2.0, wanted 0.5"):
        fine.check(coarse)
    for silent in (replace(fine, mpp=None, dicom=Rules().to_dict()), replace(fine, dicom=None)):
        fine.check(silent)
        silent.check(fine)


@pytest.mark.parametrize("preset, change, differs", [
    ("serving", {"mean": [0.48, 0.46, 0.41]}, "mean is"),
    ("big_vision", {"std": [0.3, 0.3, 0.3]}, "std is"),
    ("huggingface", {"resample": "bilinear"}, "resample is 'bilinear', wanted 'bicubic'"),
    ("big_vision", {"resample": "bilinear"}, None),
])  # fmt: skip
def test_equal_weights_beside_another_image_processor(preset, change, differs):
    """A manifest says nothing of pixels that are SigLIP's."""
    usual, other = (
        of_run(Manifest(model=Weights("m", "5a1"), preprocess=preset, dim=3, normalized=True,
                        pixels=pixels, parts=()))
        for pixels in (None, PixelConfig().to_dict() | change)
    )  # fmt: skip
    if differs is None:
        usual.check(other)
    else:
        with pytest.raises(ValueError, match=differs):
            usual.check(other)
