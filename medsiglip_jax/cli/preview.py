"""preview: the exact inputs of the model, on a page."""

import argparse
from typing import Any

from medsiglip_jax.cli import loading, output, outputs, reading
from medsiglip_jax.cli.parser import REQUIRED, Parser, add_flags

_FLAGS = {
    "inputs INPUT...": "images, folders, globs, tables and shards, as for embed",
    "--output FILE": "page to write, .html or .png; an earlier one is replaced",
    "--size N": "height and width of the model's inputs, default %(default)s",
    "--limit N": "show the first N images, default %(default)s",
    "--seed S": "show N random images instead, drawn with this seed",
    "--image-column NAME": "of tables, default %(default)s, or what others call it, such as "
    "file_name or path",
    "--root DIR": "folder of relative image paths; default the table's folder",
}


def define_flags(sub: Parser) -> None:
    add_flags(sub, _FLAGS, output=REQUIRED, size=448, limit=100, seed=int, image_column="image")
    reading.add_preprocess(sub, "big_vision")
    reading.add_parts(sub)
    loading.add_workers(sub)
    outputs.add_overwrite(sub, output=outputs.is_picture)


def preview(args: argparse.Namespace) -> int:
    """Draw the exact inputs of the model, each with how it was made. Needs no model.
    The pictures in an HTML page are PNGs of exactly the pixels that the model gets;
    below each are its original size and the preset, and for DICOM the modality, the
    rules, the window and the frame.

    example:
      medsiglip-jax preview scans/ --output sheet.html
      medsiglip-jax preview cine.dcm --frame every=10 --output sheet.html
      medsiglip-jax preview ct/ --ct-window 350/40 --seed 0 --limit 20 --output sheet.png
    """
    from medsiglip_jax.data import expansion, inputs
    from medsiglip_jax.files import places
    from medsiglip_jax.inference import preview as previews
    from medsiglip_jax.pages import contact_sheet
    from medsiglip_jax.preprocess.facts import DARK

    places.check_suffix(args.output, *contact_sheet.SUFFIXES)
    dicom, parts = reading.rules_and_parts(args)
    options = previews.PreviewOptions(args.size, args.preprocess, dicom, args.limit, args.seed)
    rows = reading.listed(lambda on_file: inputs.rows(
        args.inputs, root=args.root, image=args.image_column, text=None, parts=parts,
        all_files=args.all_files, on_file=on_file,
    ))  # fmt: skip
    expansion.warn_of_unused(dicom, rows.images)
    with output.progress_bar("image") as bar:
        result = previews.preview(rows, args.output, options, bar.update)
    output.show(result, args.json, _text)
    reading.note_skipped(rows.skipped, args)
    if result["left_out"]:
        output.note(f"{result['left_out']:,} more images are not shown (--limit)")
    if dark := sum(image.get("dark", False) for image in result["images"]):
        output.note(f"{dark:,} {DARK}")
    return 3 if any("error" in image for image in result["images"]) else 0


def _text(result: dict[str, Any]) -> str:
    from medsiglip_jax.preprocess.facts import describe

    unreadable = [image for image in result["images"] if "error" in image]
    lines = [f"{describe(image['source'])}: {image['error']}" for image in unreadable]
    count = f"{len(result['images']):,} images, {len(unreadable):,} unreadable"
    return "\n".join([*lines, f"{result['output']}: {count}"])
