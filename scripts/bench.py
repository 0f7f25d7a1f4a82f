"""Speed and memory side by side with transformers on PyTorch, on this machine, with random weights.

    python scripts/bench.py encode --batch 1 4 8           # image encoder throughput
    python scripts/bench.py encode --dtype bfloat16 --attention cudnn --batch 64   # on a GPU
    python scripts/bench.py load                           # load time, memory, first embedding
    python scripts/bench.py start                          # a second start of classify
    python scripts/bench.py encode --size tiny-56 --json   # seconds: does the script work
    python scripts/bench.py train                          # the train step
    python scripts/bench.py train --gpu --size so400m-448 --dtype bfloat16 --attention cudnn
    python scripts/bench.py step lora                      # one full-size step
    python scripts/bench.py loss                           # memory of the pairwise loss
    python scripts/bench.py input --cores 2                # files to pixels, threads and tf.data
    python scripts/bench.py embed                          # JPEG files to vectors
    python scripts/bench.py embed --size small --images 256 --batch 32 --loop dataloader
    python scripts/bench.py memory                         # of jobs of 1,000 to 100,000 rows
    python scripts/bench.py search                         # exact search, against faiss
    python scripts/bench.py evaluate                       # bootstrap, against scikit-learn
    python scripts/bench.py probe                          # linear probe, against scikit-learn
    python scripts/bench.py monitor                        # drift of 1,000 images against 5,000
    python scripts/bench.py explain --size base-224        # maps, in forward passes
    python scripts/bench.py dicom                          # DICOM files, against pydicom and PIL
    python scripts/bench.py slides                         # tiles, against an OpenSlide loop
    python scripts/bench.py coverage                       # do intervals hold the truth
    python scripts/bench.py attention --topology v5e:1x1   # on a TPU, compiled only

Both sides get the same architecture, inputs, batch size, dtype and cores, and take turns within
one run, so that a busy machine slows both; the figure is the ratio of the medians.
"""

import argparse
import json
import os
import sys

import bench_attention
import bench_dicom
import bench_embed
import bench_encode
import bench_evaluate
import bench_explain
import bench_input
import bench_load
import bench_monitor
import bench_probe
import bench_search
import bench_slides
import bench_start
import bench_train
import measure


def main(argv=None) -> int:
    args = _parser().parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU has two tenants here
    report = args.run(args)
    size = {"size": args.size} if "size" in args else {}  # statistics have no model
    report = {"command": args.command, **size, **measure.environment(), **report}
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def _text(report: dict) -> str:
    lines = [f"{key}: {value}" for key, value in report.items() if key != "rows"]
    for row in report["rows"]:
        lines.append("")
        for key, value in row.items():
            if isinstance(value, dict):
                value = f"{value['median']:g}  (min {value['min']:g}, max {value['max']:g})"
            lines.append(f"  {key:24s} {value}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    bench_encode.add_parsers(commands, _common)
    bench_load.add_parsers(commands, _common)
    bench_start.add_parsers(commands, _common)
    bench_train.add_parsers(commands, _common)
    bench_input.add_parsers(commands, _common)
    bench_embed.add_parsers(commands, _common)
    bench_search.add_parsers(commands, _common)
    bench_evaluate.add_parsers(commands)
    bench_explain.add_parsers(commands, _common)
    bench_probe.add_parsers(commands)
    bench_monitor.add_parsers(commands)
    bench_dicom.add_parsers(commands)
    bench_slides.add_parsers(commands)
    bench_attention.add_parsers(commands)
    return parser


def _common(sub: argparse.ArgumentParser, size: str) -> None:
    sub.add_argument("--size", default=size, help=f"named architecture (default {size})")
    sub.add_argument("--repeats", type=int, default=5, help="timed turns (default 5)")
    sub.add_argument("--attention", help="our attention back end (default the device's)")
    sub.add_argument("--without-torch", action="store_true", help="only our side")
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout")


if __name__ == "__main__":
    sys.exit(main())
