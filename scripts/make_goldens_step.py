"""Writes tests/golden/siglip-tiny/step.npz: a loss and its gradients by torch autograd.

    python scripts/make_goldens_step.py

For the checkpoint that scripts/make_goldens_model.py wrote. Needs torch and transformers; the
tests that read the result need neither.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    import references
    import torch
    import transformers
    from test_step_parity import GOLDEN, reference_step

    model = transformers.SiglipModel.from_pretrained(GOLDEN)
    pixels, tokens = references.inputs(references.TINY, images=4, texts=4, seed=8)
    loss, gradients = reference_step(model, pixels, tokens)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez_compressed(
        GOLDEN / "step.npz", pixels=pixels, tokens=tokens, versions=versions, loss=loss, **gradients
    )
    print(f"{GOLDEN / 'step.npz'}: {versions}")


if __name__ == "__main__":
    main()
