"""preview."""

import argparse
import sys
from typing import Any

from medsiglip_jax.cli.common import (
    add_json,
    add_parts,
    add_preprocess,
    command,
    progress_bar,
    rules_and_parts,
    show,
)


def add(commands) -> None:
    sub = command(
        commands, preview, "draw the exact inputs of the model, each with how it was made",
        "medsiglip-jax preview scans/ --output sheet.html\n"
        "  medsiglip-jax preview cine.dcm --frame every=10 --output sheet.html\n"
        "  medsiglip-jax preview ct/ --ct-window 350/40 --seed 0 --limit 20 --output sheet.png",
        "Needs no model. Pictures in HTML are PNG of exactly the pixels that the model gets; under "
        "each stand its size before, the preset, and of DICOM modality, rules, window and frame.",
    )  # fmt: skip
    sub.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="images, folders, globs, manifests and shards, as for embed",
    )  # fmt: skip
    sub.add_argument(
        "--output", required=True, metavar="FILE", help="ends in .html or .png; replaced if there"
    )
    sub.add_argument(
        "--size", type=int, default=448, metavar="N",
        help="height and width of the model's inputs, default 448",
    )  # fmt: skip
    sub.add_argument(
        "--limit", type=int, default=100, metavar="N", help="show the first N, default 100"
    )
    sub.add_argument("--seed", type=int, metavar="S", help="show N at random instead")
    sub.add_argument(
        "--image-column", default="image", metavar="NAME", help="of manifests, default image"
    )
    sub.add_argument(
        "--root", metavar="DIR", help="what image paths are relative to; default the manifest's"
    )
    add_preprocess(sub)
    add_parts(sub)
    add_json(sub)


def preview(args: argparse.Namespace) -> int:
    from medsiglip_jax.data import inputs
    from medsiglip_jax.inference.preview import PreviewOptions
    from medsiglip_jax.inference.preview import preview as run
    from medsiglip_jax.pages import contact_sheet

    contact_sheet.check(args.output)
    dicom, parts = rules_and_parts(args)
    options = PreviewOptions(args.size, args.preprocess, dicom, args.limit, args.seed)
    with progress_bar("file", delay=2.0) as bar:
        rows = inputs.rows(
            args.inputs, root=args.root, image=args.image_column, text=None, parts=parts,
            on_file=bar.update,
        )  # fmt: skip
    with progress_bar("image") as bar:
        result = run(rows, args.output, options, bar.update)
    show(result, args.json, _text)
    if result["left_out"]:
        print(f"{result['left_out']:,} more images are left out (--limit)", file=sys.stderr)
    return 3 if any("error" in image for image in result["images"]) else 0


def _text(result: dict[str, Any]) -> str:
    unreadable = [image for image in result["images"] if "error" in image]
    lines = [f"{image['source']}: {image['error']}" for image in unreadable]
    count = f"{len(result['images']):,} images, {len(unreadable):,} unreadable"
    return "\n".join([*lines, f"{result['output']}: {count}"])
