"""How a command reads image files: the preset, DICOM, volumes, series and slides."""

import argparse

from medsiglip_jax.cli.parser import Parser, refuse_unused

# Names of the flags of `add_dicom` and of `add_queries`.
DICOM = ("dicom_rules", "ct_window", "window", "volume", "frame")
QUERIES = ("frame", "volume", "series")


def preset_help() -> str:
    """The name of each preset, with the first sentence of its docstring."""
    from medsiglip_jax.preprocess.image import PRESETS

    said = {name: (make.__doc__ or "").split("\n\n")[0] for name, make in PRESETS.items()}
    return "how an image becomes a square. " + " ".join(
        f"{name}: {sentence}" for name, sentence in said.items()
    )


def add_preprocess(sub: Parser) -> None:
    sub.add_argument(
        "--preprocess", default="big_vision", metavar="P",
        help=f"default %(default)s; {preset_help()}",
    )  # fmt: skip


def add_dicom(sub: Parser, frames: str = "or middle (default)") -> None:
    """Flags of `dicom_rules`; with `add_parts`, those of `rules_and_parts`."""
    group = sub.add_argument_group("DICOM files and NIfTI volumes")
    group.add_argument(
        "--dicom-rules", default="dicom", metavar="R",
        help="dicom (default) applies the standard's windows, and three windows to CT as in "
        "training; official gives the pixels of the official container, for the modalities that "
        "it serves",
    )  # fmt: skip
    group.add_argument(
        "--ct-window", metavar="W/L",
        help="show CT in one window of this width and level in HU, such as 350/40 or 1500/-600",
    )  # fmt: skip
    group.add_argument(
        "--window", type=int, default=0, metavar="N",
        help="which window to apply where a file has several, from 0; default the first",
    )  # fmt: skip
    group.add_argument(
        "--volume", metavar="V",
        help="what the values of NIfTI volumes are, since the files do not say: ct for Hounsfield "
        "units; percentile for MR and others, scaled from the volume's 0.5th to its 99.5th "
        "percentile",
    )  # fmt: skip
    group.add_argument(
        "--frame", default="middle", metavar="N",
        help=f"which frame or slice of a file to take, from 0; {frames}. Ignored for files of one",
    )  # fmt: skip


def dicom_rules(args: argparse.Namespace):
    """The `Rules` that the flags of `add_dicom` ask for."""
    from medsiglip_jax.preprocess.dicom.rules import parse

    return parse(args.dicom_rules, args.ct_window, args.window, args.frame, args.volume)


def add_parts(sub: Parser) -> None:
    """Flags of files that hold more than one image, with those of `add_dicom`."""
    add_dicom(sub, "middle (default) takes one per file; all takes every one, every=K every K-th")
    group = sub.add_argument_group("series and slides")
    group.add_argument(
        "--series", action="store_true",
        help="group DICOM files by series and sort their slices by position; --frame then selects "
        "slices of each series, by default the middle one",
    )  # fmt: skip
    group.add_argument(
        "--mpp", type=float, metavar="M",
        help="cut slides into tiles at M micrometres per pixel, such as 0.5, 1 or 2",
    )  # fmt: skip
    group.add_argument(
        "--slide-mpp", type=float, metavar="M",
        help="micrometres per pixel of the finest level, for slides that do not record it",
    )  # fmt: skip
    group.add_argument(
        "--tissue", type=float, default=0.25, metavar="X",
        help="minimum tissue fraction of a tile, default %(default)s; 0 keeps all tiles",
    )  # fmt: skip


def rules_and_parts(args: argparse.Namespace):
    """The `Rules` and the `Parts` that the flags of `add_parts` ask for."""
    from medsiglip_jax.preprocess.dicom.rules import parse, parse_frame
    from medsiglip_jax.preprocess.parts import Parts

    if args.mpp is None:
        refuse_unused(args, "without --mpp", ("slide_mpp", "tissue"))
    parts = Parts(parse_frame(args.frame), args.series, args.mpp, args.slide_mpp, args.tissue)
    frame = str(parts.single_frame)
    rules = parse(args.dicom_rules, args.ct_window, args.window, frame, args.volume)
    return rules, parts


def add_queries(sub: Parser) -> None:
    """Flags of images that are read like those that they are compared with; see `queries`."""
    group = sub.add_argument_group("DICOM files and NIfTI volumes")
    group.add_argument(
        "--frame", metavar="N",
        help="which frame or slice of a file to take, from 0; middle, all or every=K; by default "
        "as recorded with the embeddings, or the middle one",
    )  # fmt: skip
    group.add_argument(
        "--volume", metavar="V",
        help="what the values of NIfTI volumes are, ct or percentile, if that is not recorded",
    )  # fmt: skip
    group.add_argument(
        "--series", action="store_true",
        help="group DICOM files by series, as embed --series does",
    )  # fmt: skip


def queries(args: argparse.Namespace, recorded):
    """The `Rules` and the `Parts` that the flags of `add_queries` ask for.

    Args:
        args: with the flags.
        recorded: `Rules` of what the images are compared with.
    """
    from medsiglip_jax.preprocess.dicom.rules import parse_frame
    from medsiglip_jax.preprocess.parts import Parts

    frame = recorded.frame if args.frame is None else parse_frame(args.frame)
    parts = Parts(frame, args.series)
    return recorded.reading(parts.single_frame, args.volume), parts
