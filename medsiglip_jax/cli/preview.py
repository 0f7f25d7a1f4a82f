"""preview: the exact inputs of the model, on a page."""

import argparse
import sys
from typing import Any

from medsiglip_jax.cli.output import add_json, progress_bar, show
from medsiglip_jax.cli.parser import Parser, command
from medsiglip_jax.cli.reading import add_parts, add_preprocess, rules_and_parts


def add(commands) -> None:
    command(
        commands, preview, "draw the exact inputs of the model, each with how it was made",
        "medsiglip-jax preview scans/ --output sheet.html\n"
        "  medsiglip-jax preview cine.dcm --frame every=10 --output sheet.html\n"
        "  medsiglip-jax preview ct/ --ct-window 350/40 --seed 0 --limit 20 --output sheet.png",
        "Needs no model. The pictures in an HTML page are PNGs of exactly the pixels that the "
        "model gets; below each are its original size and the preset, and for DICOM the modality, "
        "the rules, the window and the frame.",
        add_flags=_add_flags,
    )  # fmt: skip


def _add_flags(sub: Parser) -> None:
    sub.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="images, folders, globs, tables and shards, as for embed",
    )  # fmt: skip
    sub.add_argument(
        "--output", required=True, metavar="FILE",
        help="page to write, .html or .png; replaced if it exists",
    )  # fmt: skip
    sub.add_argument(
        "--size", type=int, default=448, metavar="N",
        help="height and width of the model's inputs, default %(default)s",
    )  # fmt: skip
    sub.add_argument(
        "--limit", type=int, default=100, metavar="N",
        help="show the first N images, default %(default)s",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=int, metavar="S", help="show N random images instead, drawn with this seed"
    )
    sub.add_argument(
        "--image-column", default="image", metavar="NAME", help="of tables, default %(default)s"
    )
    sub.add_argument(
        "--root", metavar="DIR", help="folder of relative image paths; default the table's folder"
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
        print(f"{result['left_out']:,} more images are not shown (--limit)", file=sys.stderr)
    return 3 if any("error" in image for image in result["images"]) else 0


def _text(result: dict[str, Any]) -> str:
    unreadable = [image for image in result["images"] if "error" in image]
    lines = [f"{image['source']}: {image['error']}" for image in unreadable]
    count = f"{len(result['images']):,} images, {len(unreadable):,} unreadable"
    return "\n".join([*lines, f"{result['output']}: {count}"])
