"""quickstart: the whole loop on real data that ships with a dependency."""

import argparse
from typing import Any

from medsiglip_jax.cli import output, parser

_FLAGS = {
    "--workdir D": "folder for results; default ./%(default)s",
    "--seed N": "default %(default)s",
}


def define_flags(sub: parser.Parser) -> None:
    parser.add_flags(sub, _FLAGS, workdir="quickstart", seed=0)


def quickstart(args: argparse.Namespace) -> int:
    """Train, save, load and evaluate a small model on real digits. Runs the whole loop
    on the CPU in about a minute, without a download.

    example:
      medsiglip-jax quickstart --workdir quickstart
    """
    from medsiglip_jax.train.quickstart import run

    output.show(run(args.workdir, seed=args.seed), args.json, _text)
    return 0


def _text(result: dict[str, Any]) -> str:
    return f"""\
held-out accuracy  {result["held_out_accuracy"]:.4f}   (1.0 is perfect, chance is 0.1)
macro AUC          {result["macro_auc"]:.4f}
model              {result["model"]}
picture            {result["picture"]}
seconds            {result["seconds"]:.1f}

Next, with the real weights (accept the terms at https://huggingface.co/google/medsiglip-448,
then `hf auth login`):
  medsiglip-jax classify --model google/medsiglip-448 \\
    --text "a chest X-ray with pneumonia" --text "a normal chest X-ray" YOUR_IMAGE.png"""
