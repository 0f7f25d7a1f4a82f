"""info: what a checkpoint holds."""

import argparse
from typing import Any

from medsiglip_jax.cli import output, parser


def define_flags(sub: parser.Parser) -> None:
    parser.add_flags(sub, {"source SRC": "folder, .npz or Hugging Face repo id"})


def info(args: argparse.Namespace) -> int:
    """Show what a checkpoint holds, without loading it.

    example:
      medsiglip-jax info google/medsiglip-448 --json
    """
    from medsiglip_jax.model.api import describe

    output.show(describe(args.source), args.json, _text)
    return 0


def _text(content: dict[str, Any]) -> str:
    lines = [
        f"source      {content['source']}",
        f"format      {content['format']}",
        f"parameters  {content['parameters']:,}",
        f"dtype       {content['dtype']}",
        f"sha256      {content['sha256']}",
        f"tokenizer   {content['tokenizer'] or 'none beside the weights; pass --tokenizer'}",
    ]
    for tower, fields in content["config"].items():
        text = ", ".join(f"{k} {v}" for k, v in fields.items()) if fields else "none"
        lines.append(f"{tower:<11} {text}")
    lines += [
        f"contains    {top}: {size:,} parameters" for top, size in content["contains"].items()
    ]
    return "\n".join(lines + [f"note        {note}" for note in content["notes"]])
