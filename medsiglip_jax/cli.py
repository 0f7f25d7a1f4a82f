"""The command `medsiglip-jax`: flags in, library calls, results and exit codes out.

0 done; 1 the machine failed or a bug; 2 something given is wrong; 3 done, but some inputs were
unreadable and are listed; 128 + N stopped by signal N, everything saved. With --json, stdout is one
JSON document and nothing else.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from medsiglip_jax import __version__

PRESET_HELP = (
    "big_vision (default): squash to a square, TF2 bilinear, as the published evaluations; "
    "huggingface: squash, PIL bicubic; serving: zero-pad to a square, PIL bicubic, as the "
    "official container"
)


# ------------------------------------------------------------------------------- sub-commands


def quickstart(args: argparse.Namespace) -> int:
    from medsiglip_jax.quickstart import run

    result = run(args.workdir, seed=args.seed)
    _print(result, args.json, _quickstart_text)
    return 0


def _quickstart_text(result: dict[str, Any]) -> str:
    return f"""\
held-out accuracy  {result["held_out_accuracy"]:.4f}   (1.0 is perfect, chance is 0.1)
macro AUC          {result["macro_auc"]:.4f}
model              {result["model"]}
picture            {result["picture"]}
seconds            {result["seconds"]:.1f}

Next, with the real weights (accept the terms at https://huggingface.co/google/medsiglip-448,
then `hf auth login`):
  medsiglip-jax classify --model google/medsiglip-448 \\
    --text "a chest X-ray with pneumonia" --text "a normal chest X-ray" YOUR_IMAGE.png"""


def info(args: argparse.Namespace) -> int:
    from medsiglip_jax.api import describe

    _print(describe(args.source), args.json, _info_text)
    return 0


def _info_text(content: dict[str, Any]) -> str:
    lines = [
        f"source      {content['source']}",
        f"format      {content['format']}",
        f"parameters  {content['parameters']:,}",
        f"dtype       {content['dtype']}",
        f"sha256      {content['sha256']}",
        f"tokenizer   {content['tokenizer'] or 'none beside the weights; pass --tokenizer'}",
    ]
    for tower, fields in content["config"].items():
        text = ", ".join(f"{k} {v}" for k, v in fields.items()) if fields else "none"
        lines.append(f"{tower:<11} {text}")
    lines += [
        f"contains    {top}: {size:,} parameters" for top, size in content["contains"].items()
    ]
    return "\n".join(lines + [f"note        {note}" for note in content["notes"]])


def convert(args: argparse.Namespace) -> int:
    from pathlib import Path

    from medsiglip_jax import api, storage, weights
    from medsiglip_jax.weights.positions import resize_positions

    storage.check_new(Path(args.destination))
    stored = weights.open_checkpoint(args.source).dtype
    dtype = args.dtype or (stored if stored in weights.DTYPES else "float32")
    model = api.load(args.source, dtype=dtype, tokenizer=args.tokenizer)
    if args.resolution is not None:
        model.params, model.config = resize_positions(model.params, model.config, args.resolution)
    api.save(model, args.destination, format=args.format)
    print(f"{args.destination}: {args.format}, {dtype}, {api.tree.size(model.params):,} parameters")
    return 0


def classify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from medsiglip_jax.classify import classify as run

    model = _load(args)
    bar = lambda batches: tqdm(batches, unit="batch", disable=None)  # noqa: E731
    results = run(model, args.images, args.text, args.preprocess, args.batch_size, bar)
    _print(results, args.json, _classify_text)
    return 3 if any("error" in result for result in results) else 0


def _classify_text(results: list[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        lines.append(result["image"])
        if "error" in result:
            lines.append(f"  unreadable: {result['error']}")
            continue
        lines.append(f"  {'softmax':>8}  {'sigmoid':>10}  {'logit':>9}  text")
        for score in sorted(result["scores"], key=lambda s: -s["logit"]):
            lines.append(
                f"  {score['softmax']:8.1%}  {score['sigmoid']:10.3g}  {score['logit']:9.3f}  "
                f"{score['text']}"
            )
    return "\n".join(lines)


def embed(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from medsiglip_jax import manifest
    from medsiglip_jax.embed import ERRORS, Options
    from medsiglip_jax.embed import embed as run

    options = Options(args.preprocess, not args.raw, args.batch_size, args.shard_size)
    rows = manifest.rows(args.inputs)
    model = _load(args)
    with tqdm(total=len(rows), unit="input", disable=None) as bar:
        result = run(model, rows, args.output, options, bar.update)
    _print(result, args.json, lambda r: f"{args.output}: {r['embedded']} of {r['rows']} embedded")
    if result["errors"]:
        where = os.path.join(args.output, ERRORS)
        print(f"{result['errors']} unreadable inputs are listed in {where}", file=sys.stderr)
    return 3 if result["errors"] else 0


def finetune(args: argparse.Namespace) -> int:
    from medsiglip_jax import recipe
    from medsiglip_jax.finetune import run

    asked = recipe.read(args.config, args.overrides)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax narrates every save
    for name, value in (("TF_CPP_MIN_LOG_LEVEL", "3"), ("TF_ENABLE_ONEDNN_OPTS", "0")):
        os.environ.setdefault(name, value)  # or TensorFlow tells what it was built with
    main_process = _join_other_processes(args)
    with _Training(quiet=not main_process) as shown:
        result = run(asked, args.workdir, shown.start, shown.step, shown.warn)
    if main_process:
        _print(result, args.json, _finetune_text)
    return 3 if result["unreadable"] else 0


def _join_other_processes(args: argparse.Namespace) -> bool:
    """Starts jax.distributed if asked; True where results are printed."""
    import jax

    if args.distributed or args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    return jax.process_index() == 0


class _Training:
    """A bar on stderr with loss, images/s and time left, and the lines that a user should see."""

    def __init__(self, quiet: bool):
        self._quiet, self._bar, self._batch = quiet, None, 0
        self._before: int | None = None

    def __enter__(self) -> "_Training":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, job) -> None:
        from tqdm import tqdm

        from medsiglip_jax import tree

        trained, total = tree.size(job.state["params"]), tree.size(job.model.params)
        rows, held_out = (sum(map(len, part)) for part in (job.training, job.held_out))
        self.warn(
            f"{rows:,} examples, {held_out:,} held out; training {trained:,} of "
            f"{total:,} parameters; the first step compiles"
        )
        self._batch = job.recipe.batch_size
        disable = True if self._quiet else None  # None: unless stderr is a terminal
        self._bar = tqdm(total=job.recipe.total_steps, unit="step", disable=disable)

    def step(self, done: int, values: dict[str, float] | None) -> None:
        bar = self._bar
        assert bar is not None
        if self._before is None:  # steps of an earlier run took no time now
            self._before = bar.initial = bar.n = bar.last_print_n = done
            return
        if done == self._before + 1:
            bar.unpause()  # or the time left would count the compilation for every step
        if values:
            shown = {"loss": f"{values['loss']:.3f}"}
            if rate := bar.format_dict["rate"]:
                shown["images/s"] = f"{rate * self._batch:.1f}"
            for name, key in (("exp(t)", "temperature"), ("b", "bias"), ("grad", "grad_norm")):
                if key in values:
                    shown[name] = f"{values[key]:.3g}"
            bar.set_postfix(shown, refresh=False)
        bar.update(done - bar.n)

    def warn(self, line: str) -> None:
        from tqdm import tqdm

        if not self._quiet:
            tqdm.write(line, file=sys.stderr)


def _finetune_text(result: dict[str, Any]) -> str:
    metrics = result["metrics"]
    shown = {k: v for k, v in metrics.items() if k == "loss" or k.startswith("val_")}
    scores = "\n".join(f"{name:18} {float(value):.4f}" for name, value in shown.items())
    return f"""\
{scores}
of step            {result["exported_step"]}
model              {result["export"]}
report             {result["report"]}"""


def _load(args: argparse.Namespace):
    from medsiglip_jax.api import load

    return load(
        args.model,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        matmul_precision=args.matmul_precision,
        attention=args.attention,
    )


def _print(result: Any, as_json: bool, to_text) -> None:
    print(json.dumps(result, ensure_ascii=False, indent=2) if as_json else to_text(result))


# -------------------------------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    """Wrong flags are one line, as every other mistake."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="medsiglip-jax",
        description="MedSigLIP in JAX: medical images and texts in one embedding space.",
        epilog="Start with: medsiglip-jax quickstart. Not a medical device.",
    )
    top.add_argument("--version", action="version", version=f"medsiglip-jax {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quickstart(commands)
    _add_info(commands)
    _add_convert(commands)
    _add_classify(commands)
    _add_embed(commands)
    _add_finetune(commands)
    return top


def _command(commands, function, help: str, example: str, description: str = ""):
    sub = commands.add_parser(
        function.__name__,
        help=help,
        description=f"{help[0].upper()}{help[1:]}. {description}".strip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=function)
    return sub


def _add_json(sub) -> None:
    sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def _add_model(sub) -> None:
    sub.add_argument(
        "--model", required=True, metavar="M",
        help="checkpoint folder, big_vision .npz, or Hugging Face repo id (google/medsiglip-448)",
    )  # fmt: skip
    sub.add_argument("--tokenizer", metavar="PATH", help="SentencePiece model, if M has none")
    sub.add_argument("--preprocess", default="big_vision", metavar="P", help=PRESET_HELP)
    sub.add_argument(
        "--dtype", default="float32", metavar="T", help="float32 (default), bfloat16 or float16"
    )
    sub.add_argument(
        "--matmul-precision", metavar="NAME",
        help="jax precision name; default: true float32 for --dtype float32",
    )  # fmt: skip
    sub.add_argument("--attention", metavar="NAME", help="xla, blocked, cudnn or auto (default)")
    sub.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")


def _add_quickstart(commands) -> None:
    sub = _command(
        commands, quickstart, "train, save, load and evaluate a small model on real digits",
        "medsiglip-jax quickstart --workdir quickstart",
        "The whole loop on CPU in about a minute, no download.",
    )  # fmt: skip
    sub.add_argument("--workdir", default="quickstart", metavar="D", help="default ./quickstart")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    _add_json(sub)


def _add_info(commands) -> None:
    sub = _command(
        commands, info, "show what a checkpoint holds, without loading it",
        "medsiglip-jax info google/medsiglip-448 --json",
    )  # fmt: skip
    sub.add_argument("source", metavar="SRC", help="folder, .npz or Hugging Face repo id")
    _add_json(sub)


def _add_convert(commands) -> None:
    sub = _command(
        commands, convert, "rewrite a checkpoint in another format, dtype or resolution",
        "medsiglip-jax convert google/medsiglip-448 medsiglip-bf16 --format orbax --dtype bfloat16",
    )  # fmt: skip
    sub.add_argument("source", metavar="SRC", help="folder, .npz or Hugging Face repo id")
    sub.add_argument("destination", metavar="DST", help="new folder (big_vision: also a new .npz)")
    sub.add_argument(
        "--format", required=True, choices=("huggingface", "orbax", "big_vision"), help="of DST"
    )
    sub.add_argument(
        "--resolution", type=int, metavar="N",
        help="new image size in pixels; position embeddings are resampled as big_vision does: "
        "bilinear, aligned corners, no antialias (scipy.ndimage.zoom of order 1)",
    )  # fmt: skip
    sub.add_argument("--dtype", metavar="T", help="default: as stored")
    sub.add_argument("--tokenizer", metavar="PATH", help="SentencePiece model to put into DST")


def _add_classify(commands) -> None:
    sub = _command(
        commands, classify, "score images against texts, zero-shot",
        'medsiglip-jax classify --model google/medsiglip-448 --text "a chest X-ray with '
        'pneumonia"\n    --text "a normal chest X-ray" scan1.png scan2.jpg',
        "\n\nlogit    exp(t) * cos(image, text) + b, what the model was trained on"
        "\nsigmoid  the model's probability that this text belongs to this image, each text by"
        "\n         itself; often tiny for every text, because almost all pairs in training were"
        "\n         mismatched: compare it between texts, or calibrate it on your own data"
        "\nsoftmax  the same logits as shares of the texts given, which sum to 100%: the answer"
        "\n         to 'which of these fits best', also when none fits",
    )  # fmt: skip
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    sub.add_argument(
        "--text", action="append", required=True, metavar="T", help="repeat for each text"
    )
    _add_model(sub)
    _add_json(sub)


def _add_embed(commands) -> None:
    sub = _command(
        commands, embed, "embed image files and folders, and .txt files line by line, to Parquet",
        "medsiglip-jax embed --model google/medsiglip-448 --output embeddings scans/ notes.txt",
        "Columns id, source, kind (image or text), embedding. The same command again resumes a "
        "killed run.",
    )  # fmt: skip
    sub.add_argument("inputs", nargs="+", metavar="INPUT", help="files, and folders (recursive)")
    sub.add_argument("--output", required=True, metavar="DIR", help="new folder for the result")
    sub.add_argument(
        "--shard-size", type=int, default=8192, metavar="N", help="inputs per file, default 8192"
    )
    sub.add_argument("--raw", action="store_true", help="do not divide by the L2 norm")
    _add_model(sub)
    _add_json(sub)


class _Keys(argparse.Action):
    """Prints what a config may hold, and ends."""

    def __call__(self, parser, *_):
        from medsiglip_jax import recipe

        parser.exit(0, recipe.describe())


def _add_finetune(commands) -> None:
    sub = _command(
        commands, finetune, "fine-tune on your own image-text pairs or labels",
        "medsiglip-jax finetune --config configs/lora.py --workdir run"
        " --config.data.path=train.csv",
        "The same command again resumes a stopped run. --config.KEY=VALUE changes a key of the "
        "config. On several hosts start it on each with --distributed.",
    )  # fmt: skip
    sub.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="Python file with get_config()"
    )
    sub.add_argument("--keys", nargs=0, action=_Keys, help="list all keys of a config, and exit")
    sub.add_argument(
        "--workdir", required=True, metavar="D",
        help="gets checkpoints/, metrics.jsonl, config.json, export/ and report.html",
    )  # fmt: skip
    sub.add_argument(
        "--distributed", action="store_true",
        help="one process of several: Cloud TPU, Slurm and Open MPI tell which by themselves",
    )  # fmt: skip
    sub.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where they tell nothing, with the next two"
    )
    sub.add_argument("--processes", type=int, metavar="N", help="number of processes")
    sub.add_argument("--process-id", type=int, metavar="I", help="this one, from 0")
    _add_json(sub)


# --------------------------------------------------------------------------------- exit codes

_GIVEN_WRONG = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError,
)  # fmt: skip


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; those of the form --config.KEY=VALUE, which finetune takes, as `overrides`."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    takes = args.run is finetune
    args.overrides = [flag for flag in rest if takes and flag.startswith("--config.")]
    if unknown := [flag for flag in rest if flag not in args.overrides]:
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        args = _parse(argv)
    except SystemExit as stop:  # --help and wrong flags
        return stop.code if isinstance(stop.code, int) else 2
    name = f"medsiglip-jax {args.run.__name__}"
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command again starts or resumes", file=sys.stderr)
        return 130
    except _GIVEN_WRONG as error:
        print(f"{name}: {_one_line(error)}", file=sys.stderr)
        return 2
    except (OSError, MemoryError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"{name}: {_one_line(error) or type(error).__name__}", file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(number := getattr(error, "exit_code", None), int):  # a signal, all is saved
            print(f"{name}: {error}", file=sys.stderr)
            return number
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise  # a bug: the traceback is what helps
        print(f"{name}: out of device memory; try a smaller batch size", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
