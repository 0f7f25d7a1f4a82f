"""info: what a checkpoint holds."""

import argparse
from typing import Any

from medsiglip_jax.cli import output, parser


def define_flags(sub: parser.Parser) -> None:
    parser.add_flags(sub, {"source SRC": "folder, .npz or Hugging Face repo id"})


def info(args: argparse.Namespace) -> int:
    """Show what a checkpoint holds, without loading it. All of it is read, to name
    values that are not finite.

    example:
      medsiglip-jax info google/medsiglip-448 --json
    """
    from medsiglip_jax.model.api import describe

    output.show(describe(args.source), args.json, _text)
    return 0


def _text(content: dict[str, Any]) -> str:
    named = {name: content[name] for name in ("source", "format", "parameters", "dtype", "sha256")}
    named["parameters"] = f"{content['parameters']:,}"
    named["tokenizer"] = content["tokenizer"] or "none beside the weights; pass --tokenizer"
    for tower, fields in content["config"].items():
        named[tower] = ", ".join(f"{k} {v}" for k, v in (fields or {}).items()) or "none"
    lines = [f"{name:<11} {value}" for name, value in named.items()]
    lines += [
        f"contains    {top}: {size:,} parameters" for top, size in content["contains"].items()
    ]
    return "\n".join(lines + [f"note        {note}" for note in content["notes"]])
