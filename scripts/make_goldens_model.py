"""Writes tests/golden/siglip-tiny: a random checkpoint and what transformers computes from it.

    python scripts/make_goldens_model.py

Needs torch and transformers; the tests that read the result need neither.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    import references
    import torch
    import transformers

    folder = ROOT / "tests" / "golden" / "siglip-tiny"
    model = references.siglip(references.TINY, seed=7)
    references.save(model, folder)
    pixels, tokens = references.inputs(references.TINY, images=3, texts=4, seed=7)
    expected = references.run(model, pixels, tokens)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez(folder / "expected.npz", pixels=pixels, tokens=tokens, versions=versions, **expected)
    print(f"{folder}: {versions}")


if __name__ == "__main__":
    main()
