"""Writes tests/golden/siglip-tiny/explain.npz: maps by captum, and attention by transformers.

    python scripts/make_goldens_explain.py

For the checkpoint that scripts/make_goldens_model.py wrote. Needs captum, torch and transformers;
the tests that read the result need none of them.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "trust")]


def main() -> None:
    import captum
    import references
    import torch
    import transformers
    from test_captum import GOLDEN, reference_attention, reference_maps

    model = transformers.SiglipModel.from_pretrained(GOLDEN)
    pixels, tokens = references.inputs(references.TINY, images=2, texts=2, seed=9)
    maps = reference_maps(model, pixels, tokens)
    versions = (
        f"captum {captum.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}"
    )
    attention = reference_attention(model, pixels)
    np.savez_compressed(
        GOLDEN / "explain.npz", pixels=pixels, tokens=tokens, versions=versions, maps=maps,
        attention=attention,
    )  # fmt: skip
    print(f"{GOLDEN / 'explain.npz'}: {versions}")


if __name__ == "__main__":
    main()
