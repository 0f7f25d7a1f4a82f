"""How a command reads image files: the preset, DICOM, volumes, series and slides."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from medsiglip_jax.cli.output import note, progress_bar
from medsiglip_jax.cli.parser import Parser, add_flags, refuse_unused

T = TypeVar("T")

# Names of the flags of `add_limits`, and with them of `add_dicom` and of `add_queries`.
_LIMITS = ("max_pixels", "max_side")
DICOM = (
    "dicom_rules",
    "ct_window",
    "window",
    "volume",
    "frame",
    "grey16",
    "slide_labels",
    *_LIMITS,
)
QUERIES = ("frame", "volume", "series", "all_files", *_LIMITS)
_FILES = "DICOM files and NIfTI volumes"
ALL_FILES = {
    "--all-files": "in folders and shards also look for images among files of other suffixes, such "
    "as .CT, .MR, .acr or .jpe, by their content"
}


def preset_help() -> str:
    """The name of each preset, with the first sentence of its docstring."""
    from medsiglip_jax.preprocess.image import PRESETS

    sentences = {name: (make.__doc__ or "").split("\n\n")[0] for name, make in PRESETS.items()}
    return "how an image becomes a square. " + " ".join(
        f"{name}: {sentence}" for name, sentence in sentences.items()
    )


def add_preprocess(sub: Parser, default: str | None = None, own: str = "the model's") -> None:
    """The flag --preprocess. Without a `default` it is that of `own` training, see `prepared`."""
    usual = default or f"big_vision, or that of {own} training where that is known"
    flags = {"--preprocess P": f"default {usual}; {preset_help()}"}
    add_flags(sub, flags, preprocess=str if default is None else default)


def add_dicom(
    sub: Parser, frames: str = "or middle (default)", max_pixels: int | None = None
) -> None:
    """Flags of `dicom_rules`; with `add_parts`, those of `rules_and_parts`. `max_pixels` is what a
    command takes where the flag is not given, if not the usual."""
    flags = {
        "--dicom-rules R": "dicom (default, if the model was not trained with others) applies the "
        "standard's windows, and three windows to CT as in MedSigLIP's training; official gives "
        "the pixels of the official container, for the modalities that it serves",
        "--ct-window W/L": "show CT in one window of this width and level in HU, such as 350/40 or "
        "1500/-600; ignored for values in other units",
        "--window N": "which window to apply where a file has several, from 0; default the first",
        "--volume V": "what the values of NIfTI volumes are, since the files do not say: ct for "
        "Hounsfield units; percentile for MR and others, scaled from the volume's 0.5th to its "
        "99.5th percentile",
        "--frame N": f"which frame, slice or page of a file to take, from 0; {frames}. Of pictures "
        "such as TIFF and GIF middle is the first. Ignored for files that hold one image",
        "--slide-labels": "read the LABEL and OVERVIEW images of slides in DICOM, and the label "
        "and macro pages of those in TIFF, which mostly show the patient's name; by default they "
        "are listed as unreadable",
    }
    group = sub.add_argument_group(_FILES)
    add_flags(group, flags, dicom_rules=str, window=int, frame="middle")
    flags = {
        "--grey16 G": "which values of 16-bit grey in PNG and TIFF are black and white: stretch, "
        "the image's 0.5th and 99.5th percentile; full, 0 and 65535; by default what the file says "
        "(PNG sBIT, TIFF tags), else full with a warning if the image comes out dark",
    }
    add_flags(sub.add_argument_group("16-bit grey"), flags)
    add_limits(sub, max_pixels=max_pixels)


def add_limits(sub: Parser, default: str = "{}", max_pixels: int | None = None) -> None:
    """Flags of the sizes of images; `default` describes their defaults, {} the numbers."""
    from medsiglip_jax.preprocess.facts import MAX_PIXELS, MAX_SIDE

    most = max_pixels or MAX_PIXELS
    usual = [default.format(n) for n in (most, MAX_SIDE)]
    flags = {
        "--max-pixels N": f"the most pixels of an image, such as 50M, default {usual[0]}; larger "
        "ones are listed as unreadable. What decoding may take grows with it: "
        f"{1.75 * most / MAX_PIXELS:.3g} GiB by default, and more for files of many bytes",
        "--max-side N": f"the longest side of an image in pixels, default {usual[1]}",
    }
    numbers = {"max_pixels": {"type": number}, "max_side": int}
    add_flags(sub.add_argument_group("large images"), flags, **numbers)


def number(text: str) -> int:
    """A whole number, or millions of them, such as 100M."""
    return int(text.removesuffix("M")) * (1_000_000 if text.endswith("M") else 1)


def _limits(args: argparse.Namespace) -> dict[str, int]:
    """The limits that were given, by their names in `Rules`."""
    given = ((name, getattr(args, name)) for name in _LIMITS)
    return {name: value for name, value in given if value is not None}


def dicom_rules(args: argparse.Namespace):
    """The `Rules` that the flags of `add_dicom` ask for."""
    return _rules(args, args.frame)


def _rules(args: argparse.Namespace, frame: str):
    from medsiglip_jax.preprocess.dicom.rules import NAMES, parse

    return parse(
        args.dicom_rules or NAMES[0], args.ct_window, args.window or 0, frame, args.volume,
        args.grey16, args.slide_labels, **_limits(args),
    )  # fmt: skip


# Flags of what a model remembers of its training, and the fields of `Rules` that they set.
_TRAINED = {name: name for name in ("ct_window", "window", "volume", "grey16")}
_TRAINED = {"dicom_rules": "name", **_TRAINED}


def asked(args: argparse.Namespace) -> list[str]:
    """The fields of `Rules` that flags ask for, of those that a model remembers."""
    return [name for flag, name in _TRAINED.items() if getattr(args, flag, None) is not None]


def prepared(args: argparse.Namespace, rules, config):
    """How images are prepared for a model: as the flags say, else as in its training, else by the
    defaults. Says on stderr what is taken from training, and which flags contradict it.

    Args:
        args: the flags of `add_dicom` or `add_queries`, and maybe that of `add_preprocess`.
        rules: what `dicom_rules`, `rules_and_parts` or `queries` made of them; None for images that
            have none, such as tiles of slides.
        config: of the model.

    Returns:
        A `Preparation`.
    """
    preset = getattr(args, "preprocess", None)
    made = config.prepared(preset, rules, asked(args))
    if config.trained is None:
        return made
    own, usual = _remembered(config.trained), _remembered(type(made)())
    flags = () if rules is None else _TRAINED
    given = {"preprocess": preset, **{flag: getattr(args, flag, None) for flag in flags}}
    taken = [f"{k} {own[k]}" for k, v in given.items() if v is None and own[k] != usual[k]]
    if taken:
        note(f"images are prepared as in the training of the model: {', '.join(taken)}")
    used = _remembered(made)
    if other := [k for k, v in given.items() if v is not None and used[k] != own[k]]:
        flags = ", ".join(f"--{k.replace('_', '-')} {given[k]} ({own[k]})" for k in other)
        note(f"as asked, but unlike the training of the model (in brackets): {flags}")
    return made


def _remembered(preparation) -> dict[str, Any]:
    """What a model remembers, by the names of the flags."""
    rules = {flag: getattr(preparation.dicom, name) for flag, name in _TRAINED.items()}
    return {"preprocess": preparation.preprocess, **rules}


def listed(make: Callable[[Callable[..., None]], T]) -> T:
    """What `make` lists, which is called with the function to call after each file."""
    with progress_bar("file", delay=2.0) as bar:
        return make(bar.update)


def add_parts(sub: Parser) -> None:
    """Flags of files that hold more than one image, with those of `add_dicom`."""
    add_dicom(
        sub,
        "middle (default) takes one per file; all takes every one, every=K every K-th; see also "
        "--series",
    )
    flags = {
        "--series": "group DICOM files by series and sort their slices by position; --frame then "
        "selects slices of each series, by default the middle one. Of several images at one place "
        "it takes some with time=N (from 0), type=NAME (of Image Type, such as M or P), b=X or "
        "echo=MS: time=0, or type=M,every=2",
        "--mpp M": "cut slides into tiles at M micrometres per pixel, such as 0.5, 1 or 2",
        "--slide-mpp M": "micrometres per pixel of the finest level, of slides that do not record "
        "it or record a wrong one, such as 352.8 (72 dpi); used for all slides, with a warning "
        "where they record another",
        "--tissue X": "minimum tissue fraction of a tile, default %(default)s; 0 keeps all tiles",
    }
    group = sub.add_argument_group("series and slides")
    add_flags(group, flags, mpp=float, slide_mpp=float, tissue=0.25)
    add_flags(sub, ALL_FILES)


def note_skipped(skipped: Mapping[str, int], args: argparse.Namespace) -> None:
    """Says on stderr what is not among the inputs."""
    from medsiglip_jax.data.rows import describe_skipped

    for line in describe_skipped(skipped, args.all_files):
        note(line)


def rules_and_parts(args: argparse.Namespace):
    """The `Rules` and the `Parts` that the flags of `add_parts` ask for."""
    from medsiglip_jax.preprocess.dicom.rules import parse_frame
    from medsiglip_jax.preprocess.parts import Parts

    if args.mpp is None:
        refuse_unused(args, "without --mpp", ("slide_mpp", "tissue"))
    parts = Parts(parse_frame(args.frame), args.series, args.mpp, args.slide_mpp, args.tissue)
    return _rules(args, str(parts.single_frame)), parts


def add_queries(sub: Parser) -> None:
    """Flags of images that are read like those that they are compared with; see `queries`."""
    flags = {
        "--frame N": "which frame, slice or page of a file to take, from 0; middle, all or "
        "every=K; by default as recorded with the embeddings, or the middle one",
        "--volume V": "what the values of NIfTI volumes are, ct or percentile, if that is not "
        "recorded",
        "--series": "group DICOM files by series, as embed --series does; --frame then also takes "
        "time=N, type=NAME, b=X and echo=MS",
    }
    add_flags(sub.add_argument_group(_FILES), flags)
    add_flags(sub, ALL_FILES)
    add_limits(sub, "as recorded with the embeddings, or {}")


def queries(args: argparse.Namespace, recorded, images: Sequence[str] = ()):
    """The `Rules` and the `Parts` that the flags of `add_queries` ask for.

    Args:
        args: with the flags.
        recorded: `Rules` of what the images are compared with.
        images: as they were given.
    """
    from medsiglip_jax.data.expansion import warn_of_unused
    from medsiglip_jax.preprocess.dicom.rules import Rules, parse_frame
    from medsiglip_jax.preprocess.parts import Parts

    warn_of_unused(Rules(volume=args.volume), images)
    frame = recorded.frame if args.frame is None else parse_frame(args.frame)
    parts = Parts(frame, args.series)
    rules = recorded.reading(parts.single_frame, args.volume)
    return dataclasses.replace(rules, **_limits(args)), parts
