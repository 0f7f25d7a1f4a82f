"""convert: a checkpoint in another layout, dtype or resolution."""

import argparse

from medsiglip_jax.cli.parser import Parser, command


def add(commands) -> None:
    command(
        commands, convert, "rewrite a checkpoint in another layout, dtype or resolution",
        "medsiglip-jax convert google/medsiglip-448 medsiglip-bf16 --format orbax --dtype bfloat16",
        add_flags=_add_flags,
    )  # fmt: skip


def _add_flags(sub: Parser) -> None:
    from medsiglip_jax.model.weights.checkpoint import DTYPES
    from medsiglip_jax.model.weights.layouts import LAYOUTS

    sub.add_argument("source", metavar="SRC", help="folder, .npz or Hugging Face repo id")
    sub.add_argument("destination", metavar="DST", help="new folder (big_vision: also a new .npz)")
    sub.add_argument("--format", required=True, choices=tuple(LAYOUTS), help="layout of DST")
    sub.add_argument(
        "--resolution", type=int, metavar="N",
        help="new image size in pixels; position embeddings are resampled as big_vision does: "
        "bilinear, aligned corners, no antialias (scipy.ndimage.zoom of order 1)",
    )  # fmt: skip
    sub.add_argument("--dtype", metavar="T", help=f"{', '.join(DTYPES)}; default: as stored")
    sub.add_argument("--tokenizer", metavar="PATH", help="SentencePiece model to put into DST")


def convert(args: argparse.Namespace) -> int:
    from medsiglip_jax.files import places
    from medsiglip_jax.model import api
    from medsiglip_jax.model.weights import layouts
    from medsiglip_jax.model.weights.checkpoint import DTYPES
    from medsiglip_jax.model.weights.positions import resize_positions

    places.check_new(places.at(args.destination))
    stored = layouts.open_checkpoint(args.source).dtype
    dtype = args.dtype or (stored if stored in DTYPES else "float32")
    model = api.load(args.source, dtype=dtype, tokenizer=args.tokenizer)
    if args.resolution is not None:
        model.params, model.config = resize_positions(model.params, model.config, args.resolution)
    api.save(model, args.destination, format=args.format)
    print(f"{args.destination}: {args.format}, {dtype}, {api.tree.size(model.params):,} parameters")
    return 0
