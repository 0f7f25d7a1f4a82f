"""convert: a checkpoint in another layout, dtype or resolution."""

import argparse
from typing import Any

from medsiglip_jax.cli import loading, output
from medsiglip_jax.cli.parser import REQUIRED, Parser, add_flags


def define_flags(sub: Parser) -> None:
    from medsiglip_jax.model.weights import checkpoint, layouts

    flags = {
        "source SRC": "folder, .npz or Hugging Face repo id",
        "destination DST": "new folder (big_vision: also a new .npz)",
        "--format": "layout of DST",
        "--resolution N": "new image size in pixels; position embeddings are resampled as "
        "big_vision does: bilinear, aligned corners, no antialias (scipy.ndimage.zoom of order 1)",
        "--dtype T": f"{', '.join(checkpoint.DTYPES)}; default: as stored",
        "--tokenizer PATH": "spiece.model, tokenizer.json or a folder with one, to put into DST",
    }
    add_flags(sub, flags, format={"choices": tuple(layouts.WRITABLE), **REQUIRED}, resolution=int)


def convert(args: argparse.Namespace) -> int:
    """Rewrite a checkpoint in another layout, dtype or resolution.

    example:
      medsiglip-jax convert google/medsiglip-448 medsiglip-bf16 --format orbax --dtype bfloat16
    """
    from medsiglip_jax.files import places, storage
    from medsiglip_jax.model import api
    from medsiglip_jax.model.weights import checkpoint, layouts
    from medsiglip_jax.model.weights.positions import resize_positions

    storage.check_new(places.at(args.destination))
    stored = layouts.open_checkpoint(args.source).dtype
    if args.dtype:
        checkpoint.dtype_of(args.dtype)
    dtype = args.dtype or (stored if stored in checkpoint.DTYPES else "float32")
    model = api.load(args.source, dtype=dtype, tokenizer=args.tokenizer)
    loading.note_export(model)
    if args.tokenizer and model.config.text:
        model.processor.tokenizer  # noqa: B018  one of another model is refused before it is written
    if args.resolution is not None:
        model.params, model.config = resize_positions(model.params, model.config, args.resolution)
    api.save(model, args.destination, format=args.format)
    result = {
        "source": args.source,
        "destination": args.destination,
        "format": args.format,
        "dtype": dtype,
        "image_size": model.config.vision and model.config.vision.image_size,
        "parameters": api.tree.size(model.params),
    }
    output.show(result, args.json, _text)
    return 0


def _text(result: dict[str, Any]) -> str:
    return "{destination}: {format}, {dtype}, {parameters:,} parameters".format(**result)
