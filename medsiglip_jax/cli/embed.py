"""embed."""

import argparse
import datetime
import os
import signal
import sys
import time
from typing import Any

from medsiglip_jax.cli.common import (
    add_batch_size,
    add_json,
    add_model,
    add_parts,
    add_preprocess,
    add_processes,
    batch_size,
    command,
    join_other_processes,
    load,
    local_mesh,
    progress_bar,
    rules_and_parts,
    show,
)

_SECONDS_BETWEEN_LINES = 60.0  # where stderr is no terminal


def add(commands) -> None:
    sub = command(
        commands, embed, "embed images and texts to Parquet, any number, resumable",
        "medsiglip-jax embed --model google/medsiglip-448 --output embeddings scans/ notes.txt\n"
        "  medsiglip-jax embed --model M --output gs://BUCKET/out --stored float16 rows.parquet\n"
        "  medsiglip-jax embed --model M --output out 'shards/*.tar'\n"
        "  medsiglip-jax embed --model M --output out --series --frame every=5 --volume ct ct/\n"
        "  medsiglip-jax embed --model M --output out --mpp 0.5 slides/",
        "Columns id, source, kind (image or text), embedding; of tiles x, y, level, size, mpp; "
        "with --groups or --series patient, study, series. A part of a file is named FILE#frame=N "
        "or FILE#tile=X,Y,LEVEL,SIZE. The same command again goes on with a killed run and ends "
        "with the same files. On several hosts start it on each with --distributed.",
    )  # fmt: skip
    sub.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="images, DICOM, NIfTI, slides; folders (recursive) and globs; .txt, one text a line; "
        "manifests "
        "(.csv .tsv .jsonl .parquet); .tar (WebDataset) and .tfrecord shards; local or gs://",
    )  # fmt: skip
    sub.add_argument("--output", required=True, metavar="DIR", help="new folder for the result")
    sub.add_argument(
        "--shard-size", type=int, default=8192, metavar="N", help="inputs per file, default 8192"
    )
    sub.add_argument("--raw", action="store_true", help="do not divide by the L2 norm")
    sub.add_argument(
        "--stored", default="float32", choices=("float32", "float16"),
        help="type of the vectors in the files, default float32",
    )  # fmt: skip
    sub.add_argument(
        "--max-errors", type=int, metavar="N",
        help="stop when more than N inputs are unreadable; default: list them all and go on",
    )  # fmt: skip
    columns = sub.add_argument_group("columns of manifests")
    for name in ("image", "text", "id"):
        columns.add_argument(
            f"--{name}-column", default=name, metavar="NAME", help=f"default {name}"
        )
    columns.add_argument(
        "--root", metavar="DIR", help="what image paths are relative to; default the manifest's"
    )
    groups = sub.add_argument_group("patients")
    groups.add_argument(
        "--groups", action="store_true",
        help="columns patient, study and series of DICOM files, to evaluate by patient: hashes "
        "under a secret of yours (MEDSIGLIP_JAX_SALT, or a file in ~/.config); --series has them",
    )  # fmt: skip
    groups.add_argument(
        "--keep-uids", action="store_true", help="these columns as they are in the files"
    )
    add_model(sub)
    add_batch_size(sub, None, "default 8, on accelerators 64 per device")
    add_preprocess(sub)
    add_parts(sub)
    add_processes(sub)
    add_json(sub)


def embed(args: argparse.Namespace) -> int:
    main_process = join_other_processes(args)  # before anything asks for a device
    if args.distributed or args.coordinator:  # which would keep it to itself
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import jax

    from medsiglip_jax.data import inputs
    from medsiglip_jax.inference.embed import EmbedOptions
    from medsiglip_jax.inference.embed import embed as run
    from medsiglip_jax.inference.manifest import ERRORS
    from medsiglip_jax.model import sharding

    rules, parts = rules_and_parts(args)
    options = EmbedOptions(
        args.preprocess, not args.raw, args.stored, args.shard_size, batch_size(args),
        args.max_errors, rules, _identifiers(args),
    )  # fmt: skip
    columns = {"image": args.image_column, "text": args.text_column, "id": args.id_column}
    with progress_bar("file", delay=2.0) as bar:
        listed = lambda: inputs.rows(  # noqa: E731
            args.inputs, root=args.root, parts=parts, on_file=bar.update, **columns
        )
        rows = sharding.together(listed)
    model = sharding.together(lambda: load(args, local_mesh()))
    assert rows is not None and model is not None
    with _Shown(len(rows), jax.process_count()) as shown:
        result = run(model, rows, args.output, options, shown.update).to_dict()
    if main_process:
        show(result, args.json, lambda r: shown.summary(args.output, r))
        _warn(result, os.path.join(args.output, ERRORS), rows.passed_over)
    return 3 if result["errors"] else 0


def _identifiers(args: argparse.Namespace) -> str | None:
    if args.keep_uids:
        return "kept"
    return "hashed" if args.groups or args.series else None


def _warn(result: dict[str, Any], where: str, passed_over: dict[str, int]) -> None:
    if passed_over:
        found = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(passed_over.items()))
        print(f"passed over other files in the folders: {found}", file=sys.stderr)
    if result["errors"]:
        print(f"{result['errors']} unreadable inputs are listed in {where}", file=sys.stderr)
    if result["turned"]:
        print(
            f"{result['turned']} images carry an EXIF orientation, which is not applied: pixels "
            "are used as stored",
            file=sys.stderr,
        )
    if result["burned_in"]:
        print(
            f"{result['burned_in']} DICOM files say that annotation, which may identify people, is "
            "burned into their pixels",
            file=sys.stderr,
        )
    if result["multi_frame"]:
        print(
            f"{result['multi_frame']} files have several frames or slices; of each one is embedded "
            f"(--frame: {result['dicom']['frame']}; all and every=K embed more)",
            file=sys.stderr,
        )
    if result["cut"]:
        print(
            f"{result['cut']} texts are longer than the model reads and were cut", file=sys.stderr
        )


class _Shown:
    """A bar on stderr with inputs/s, time left, and how busy the device is."""

    def __init__(self, rows: int, processes: int):
        from tqdm import tqdm

        # A process hears of its own rows only, about 1 in `processes`.
        self._bar = tqdm(total=-(-rows // processes), unit="input", disable=None)
        self._start, self._rows, self._busy, self._errors = time.perf_counter(), 0, 0.0, 0
        self._total, self._before, self._said = self._bar.total, 0, self._start

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def update(self, progress) -> None:
        if progress.busy is None:
            if not self._bar.disable:  # of an earlier run: no part of the rate
                self._bar.initial += progress.rows
            self._bar.update(progress.rows)
            self._before += progress.rows
            return
        self._rows, self._busy = self._rows + progress.rows, progress.busy
        self._errors += progress.errors
        shown = {"device busy": f"{progress.busy:.0%}"}
        if self._errors:
            shown["unreadable"] = str(self._errors)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(progress.rows)
        if self._bar.disable and time.perf_counter() > self._said + _SECONDS_BETWEEN_LINES:
            self._say()

    def _say(self) -> None:
        """The bar as a line, for logs."""
        self._said = time.perf_counter()
        rate = self._rows / (self._said - self._start)
        done = self._before + self._rows
        left = datetime.timedelta(seconds=round((self._total - done) / rate))
        print(
            f"{done:,} of {self._total:,} inputs, {rate:.1f} a second, {left} left, device busy "
            f"{self._busy:.0%}, {self._errors} unreadable",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def summary(self, output: str, result: dict[str, Any]) -> str:
        text = f"{output}: {result['embedded']:,} of {result['rows']:,} embedded"
        if self._rows:
            seconds = time.perf_counter() - self._start
            text += (
                f"; {self._rows:,} now, in {seconds:.1f} s, {self._rows / seconds:.1f} a second, "
                f"device busy {self._busy:.0%} of the time"
            )
        return text
