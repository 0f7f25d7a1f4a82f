"""What the commands share: flags, loading, printing."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

PRESET_HELP = (
    "big_vision (default): squash to a square, TF2 bilinear, as the published evaluations; "
    "huggingface: squash, PIL bicubic; serving: zero-pad to a square, PIL bicubic, as the "
    "official container; big_vision_pad: zero-pad to a square, TF2 bilinear"
)


class Parser(argparse.ArgumentParser):
    """Wrong flags are one line, as every other mistake; no flag is short for another."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def command(commands, function, help: str, example: str, description: str = "", name: str = ""):
    sub = commands.add_parser(
        name or function.__name__,
        help=help,
        description=f"{help[0].upper()}{help[1:]}. {description}".strip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=function, default_of=sub.get_default)
    return sub


def refuse_idle(args: argparse.Namespace, job: str, names: Sequence[str]) -> None:
    """Raises ValueError if flags are given that a job makes no use of.

    Args:
        args: of a `command`.
        job: as the message names it.
        names: of these flags, as in `args`.
    """
    given = [name for name in names if getattr(args, name) != args.default_of(name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{job}: no use for {flags}; leave it out")


def add_json(sub) -> None:
    sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def add_model(sub, required: bool = True) -> None:
    sub.add_argument(
        "--model", required=required, metavar="M",
        help="checkpoint folder, big_vision .npz, or Hugging Face repo id (google/medsiglip-448)",
    )  # fmt: skip
    sub.add_argument("--tokenizer", metavar="PATH", help="SentencePiece model, if M has none")
    sub.add_argument(
        "--dtype", default="float32", metavar="T", help="float32 (default), bfloat16 or float16"
    )
    sub.add_argument(
        "--matmul-precision", metavar="NAME",
        help="jax precision name; default: true float32 for --dtype float32",
    )  # fmt: skip
    sub.add_argument(
        "--attention", metavar="NAME", help="xla, blocked, splash or cudnn; default the device's"
    )


def add_preprocess(sub) -> None:
    sub.add_argument("--preprocess", default="big_vision", metavar="P", help=PRESET_HELP)


# Names of the flags of `add_dicom`.
DICOM = ("dicom_rules", "ct_window", "window", "volume", "frame")


def add_dicom(sub, frames: str = "default middle") -> None:
    """Flags of `dicom_rules`; with `add_parts`, those of `rules_and_parts`."""
    group = sub.add_argument_group("DICOM files and NIfTI volumes")
    group.add_argument(
        "--dicom-rules", default="dicom", metavar="R",
        help="dicom (default): the standard's windows, CT in three as in training; official: the "
        "pixels of the official container, for the modalities that it serves",
    )  # fmt: skip
    group.add_argument(
        "--ct-window", metavar="W/L", help="CT in one window, in HU, such as 350/40 or 1500/-600"
    )
    group.add_argument(
        "--window", type=int, default=0, metavar="N",
        help="which of several windows of a file, from 0; default the first",
    )  # fmt: skip
    group.add_argument(
        "--volume", metavar="V",
        help="what NIfTI volumes hold, for they do not say: ct (Hounsfield units, as CT) or "
        "percentile (MR and others, from the 0.5th to the 99.5th of the volume)",
    )  # fmt: skip
    group.add_argument(
        "--frame", default="middle", metavar="N", help=f"of several, from 0; {frames}"
    )


def dicom_rules(args: argparse.Namespace):
    """What the flags of `add_dicom` ask for."""
    from medsiglip_jax.preprocess.dicom.rules import parse

    return parse(args.dicom_rules, args.ct_window, args.window, args.frame, args.volume)


def add_parts(sub) -> None:
    """Flags of files that hold more than one image, with those of `add_dicom`."""
    add_dicom(sub, "middle (default): one for each file; all or every=K: so many")
    group = sub.add_argument_group("series and slides")
    group.add_argument(
        "--series", action="store_true",
        help="DICOM files are slices of their series, in the order of their places; --frame is "
        "then of those: by default the one in the middle of each series",
    )  # fmt: skip
    group.add_argument(
        "--mpp", type=float, metavar="M",
        help="cut slides into tiles at M micrometres per pixel, such as 0.5, 1 or 2",
    )  # fmt: skip
    group.add_argument(
        "--slide-mpp", type=float, metavar="M",
        help="of the finest level, of slides that do not say it",
    )  # fmt: skip
    group.add_argument(
        "--tissue", type=float, default=0.25, metavar="X",
        help="least share of tissue in a tile, default 0.25; 0 for all tiles",
    )  # fmt: skip


def rules_and_parts(args: argparse.Namespace):
    """What the flags of `add_parts` ask for: how files are read, and which parts of them."""
    from medsiglip_jax.preprocess.dicom.rules import parse, parse_frame
    from medsiglip_jax.preprocess.parts import Parts

    if args.mpp is None:
        refuse_idle(args, "slides that are not cut into tiles (--mpp)", ("slide_mpp", "tissue"))
    parts = Parts(parse_frame(args.frame), args.series, args.mpp, args.slide_mpp, args.tissue)
    rules = parse(
        args.dicom_rules, args.ct_window, args.window, str(parts.single_frame), args.volume
    )
    return rules, parts


# Names of the flags of `add_queries`.
QUERIES = ("frame", "volume", "series")


def add_queries(sub) -> None:
    """Flags of images that are read as those were that they are compared with; see `queries`."""
    group = sub.add_argument_group("DICOM files and NIfTI volumes")
    group.add_argument(
        "--frame", metavar="N",
        help="of several, from 0; middle, all or every=K; default as it is recorded, or middle",
    )  # fmt: skip
    group.add_argument(
        "--volume", metavar="V",
        help="what NIfTI volumes hold, if it is not recorded: ct or percentile",
    )  # fmt: skip
    group.add_argument(
        "--series", action="store_true", help="DICOM files are slices of their series, see embed"
    )


def queries(args: argparse.Namespace, recorded):
    """What the flags of `add_queries` ask for: how files are read, and which parts of them.

    Args:
        args: with the flags.
        recorded: `Rules` of what the images are compared with.
    """
    from medsiglip_jax.preprocess.dicom.rules import parse_frame
    from medsiglip_jax.preprocess.parts import Parts

    frame = recorded.frame if args.frame is None else parse_frame(args.frame)
    parts = Parts(frame, args.series)
    return recorded.reading(parts.single_frame, args.volume), parts


def add_batch_size(sub, default: int | None = 8, help: str = "default 8") -> None:
    sub.add_argument("--batch-size", type=int, default=default, metavar="N", help=help)


def local_mesh():
    """The devices of this process, or None where there is one."""
    import jax

    from medsiglip_jax.model import sharding

    return sharding.make_mesh(local=True) if jax.local_device_count() > 1 else None


def batch_size(args: argparse.Namespace) -> int:
    """What was asked for, or 8, on accelerators 64 per device."""
    import jax

    if args.batch_size is not None:
        return args.batch_size
    return 8 if jax.default_backend() == "cpu" else 64 * jax.local_device_count()


def add_processes(sub) -> None:
    sub.add_argument(
        "--distributed", action="store_true",
        help="one process of several: Cloud TPU, Slurm and Open MPI tell which by themselves",
    )  # fmt: skip
    sub.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where they tell nothing, with the next two"
    )
    sub.add_argument("--processes", type=int, metavar="N", help="number of processes")
    sub.add_argument("--process-id", type=int, metavar="I", help="this one, from 0")


def join_other_processes(args: argparse.Namespace) -> bool:
    """Starts jax.distributed if asked; True where results are printed.

    Raises:
        ValueError: which process this is of how many, but not where the others are.
    """
    import jax

    if args.distributed or args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
        _keep_stdout_for_results()
    elif args.processes is not None or args.process_id is not None:  # each would do the whole job
        raise ValueError("--processes and --process-id need --coordinator HOST:PORT")
    return jax.process_index() == 0


def _keep_stdout_for_results() -> None:
    """Sends to stderr what C++ says on stdout: which peers gloo has found."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", encoding="utf-8")


def load(args: argparse.Namespace, mesh=None):
    """The model that the flags of `add_model` ask for."""
    from medsiglip_jax.model.api import load as run

    return run(
        args.model,
        mesh=mesh,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        matmul_precision=args.matmul_precision,
        attention=args.attention,
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, its columns as wide as they need."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def show(result: Any, as_json: bool, to_text) -> None:
    print(json.dumps(result, ensure_ascii=False, indent=2) if as_json else to_text(result))


def progress_bar(unit: str, delay: int | float = 0):
    """A bar on stderr, where that is a terminal; with a delay in seconds, of long work only."""
    from tqdm import tqdm

    return tqdm(unit=unit, unit_scale=True, disable=None, delay=delay)
