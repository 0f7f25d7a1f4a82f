"""Speed and memory side by side with transformers on PyTorch, on this machine, with random weights.

    python scripts/bench.py encode --batch 1 4 8           # image encoder throughput
    python scripts/bench.py encode --dtype bfloat16 --attention cudnn --batch 64   # on a GPU
    python scripts/bench.py load                           # load time, memory, first embedding
    python scripts/bench.py encode --size tiny-56 --json   # seconds: does the script work
    python scripts/bench.py train                          # the train step
    python scripts/bench.py train --gpu --size so400m-448 --dtype bfloat16 --attention cudnn
    python scripts/bench.py step lora                      # one full-size step
    python scripts/bench.py loss                           # memory of the pairwise loss
    python scripts/bench.py input                          # JPEG files to pixels
    python scripts/bench.py embed                          # JPEG files to vectors
    python scripts/bench.py embed --size small --images 256 --batch 32 --loop dataloader
    python scripts/bench.py memory                         # of jobs of 1,000 to 100,000 rows
    python scripts/bench.py search                         # exact search, against faiss
    python scripts/bench.py evaluate                       # bootstrap, against scikit-learn
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
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import bench_attention
import bench_dicom
import bench_embed
import bench_evaluate
import bench_search
import bench_slides
import bench_train
import measure

SIDES = ("ours", "torch")


def main(argv=None) -> int:
    args = _parser().parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU has two tenants here
    if args.command == "load-one":
        print(json.dumps(load_one(args.side, args.folder, args.attention)))
        return 0
    report = args.run(args)
    size = {"size": args.size} if "size" in args else {}  # statistics have no model
    report = {"command": args.command, **size, **measure.environment(), **report}
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


# ---------------------------------------------------------------------------------- encode


def encode(args) -> dict:
    """Times the image tower at each batch size: pixels on the device -> pooled embedding."""
    import jax
    import numpy as np

    from medsiglip_jax.model import config
    from medsiglip_jax.model.weights import random

    architecture = config.named(args.size)
    sides = ("ours",) if args.without_torch else SIDES
    params = jax.device_put(random.init_params(architecture, seed=0)["img"])
    reference = None if args.without_torch else _torch_tower(architecture.vision, args.dtype)
    size, rows = architecture.image_size, []
    for batch in args.batch:
        images = np.random.default_rng(0).uniform(-1, 1, (batch, size, size, 3)).astype("float32")
        # On a CPU one image at a time is fastest: its activations stay in cache, and malloc
        # returns buffers above 32 MiB to the system and gets them back as fresh pages.
        at_once = min(batch, args.at_once or (1 if jax.default_backend() == "cpu" else batch))
        if batch % at_once:
            raise SystemExit(f"--batch {batch} is not a multiple of --at-once {at_once}")
        ours, seconds = _our_call(params, images, architecture, args, at_once)
        calls = {"ours": ours}
        if reference is not None:
            calls["torch"] = _torch_call(reference, images, args.dtype)
        times = measure.interleaved(calls, args.repeats)
        row = {"batch": batch, "at_once": at_once, "compile_seconds": round(seconds, 2)}
        for side in sides:
            row[side] = measure.summary([t / batch * 1e3 for t in times[side]])
        if len(sides) == 2:
            row |= measure.ratios(times)
        measure.progress(f"batch {batch}: {row}")
        rows.append(row)
    return {
        "dtype": args.dtype,
        "attention": args.attention,
        "precision": args.precision,
        "repeats": args.repeats,
        "unit": "milliseconds per image",
        "rows": rows,
    }


def _our_call(params, images, architecture, args, at_once: int):
    import jax

    from medsiglip_jax.model import api
    from medsiglip_jax.model import towers as model

    compute = api.compute_for(args.dtype, args.precision, args.attention)
    params = jax.tree.map(lambda x: x.astype(args.dtype), params)
    pieces = [jax.device_put(images[i : i + at_once]) for i in range(0, len(images), at_once)]
    start = time.perf_counter()
    call = (
        jax.jit(lambda p, x: model.encode_image({"img": p}, x, architecture, compute)[0])
        .lower(params, pieces[0])
        .compile()
    )
    seconds = time.perf_counter() - start

    def all_images():
        for z in [call(params, piece) for piece in pieces]:
            z.block_until_ready()

    return all_images, seconds


def _torch_tower(vision, dtype: str):
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.set_num_threads(measure.cores())
    config = SiglipVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_dim,
        num_hidden_layers=vision.depth,
        num_attention_heads=vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act="gelu_pytorch_tanh",
        attn_implementation="sdpa",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SiglipVisionModel(config).eval().to(device, getattr(torch, dtype))


def _torch_call(tower, images, dtype: str):
    import torch

    pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    pixels = pixels.to(tower.device, getattr(torch, dtype))

    @torch.inference_mode()
    def call():
        tower(pixel_values=pixels).pooler_output.float().cpu()  # .cpu() waits for a GPU

    return call


# ------------------------------------------------------------------------------------ load


def load(args) -> dict:
    """Loads one full checkpoint on each side, each time in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="medsiglip_bench_") as tmp:
        folder = Path(tmp) / "model"
        measure.progress(f"writing a random {args.size} checkpoint")
        code = "import sys, medsiglip_jax as m; m.save(m.init(sys.argv[1]), sys.argv[2])"
        subprocess.run([sys.executable, "-c", code, args.size, str(folder)], check=True)
        sides = ("ours",) if args.without_torch else SIDES
        runs: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side in sides:
                command = [sys.executable, __file__, "load-one", side, str(folder)]
                command += ["--attention", args.attention] if args.attention else []
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                measure.progress(f"{side}: {runs[side][-1]}")
        bytes_on_disk = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    keys = ("import_seconds", "load_seconds", "first_embedding_seconds", "peak_multiple")
    rows = [
        {
            "side": side,
            "result_bytes": runs[side][0]["result_bytes"],
            "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs[side]),
            **{key: measure.summary([run[key] for run in runs[side]]) for key in keys},
        }
        for side in sides
    ]
    return {
        "repeats": args.repeats,
        "checkpoint_bytes": bytes_on_disk,
        "unit": "seconds, page cache warm; memory: RssAnon above its level after the imports "
        "while loading; first_embedding: from the start of loading to one image embedded",
        "rows": rows,
    }


def load_one(side: str, folder: str, attention: str) -> dict:
    """Loads `folder` in this process and embeds one image; memory is sampled every 2 ms."""
    start = time.perf_counter()
    load_model, embed = (_our_loader if side == "ours" else _torch_loader)(attention)
    imported = time.perf_counter()
    with _PeakAnonymousMemory() as memory:
        model, result_bytes = load_model(folder)
    loaded = time.perf_counter()
    embed(model)
    return {
        "import_seconds": imported - start,
        "load_seconds": loaded - imported,
        "first_embedding_seconds": time.perf_counter() - imported,
        "result_bytes": result_bytes,
        "peak_anonymous_bytes": memory.peak,
        "peak_multiple": memory.peak / result_bytes,
    }


def _our_loader(attention: str):
    import jax
    import numpy as np

    from medsiglip_jax import load  # by name: the package imports its rooms on first use

    jax.devices()  # starts the back end, which PyTorch's import does too

    def load_model(folder):
        model = load(folder, attention=attention)
        jax.block_until_ready(model.params)
        return model, sum(x.nbytes for x in jax.tree.leaves(model.params))

    def embed(model):
        size = model.config.image_size
        model.encode_image(np.zeros((1, size, size, 3), np.uint8)).block_until_ready()

    return load_model, embed


def _torch_loader(attention: str):
    import torch
    from transformers import SiglipModel

    torch.set_num_threads(measure.cores())

    def load_model(folder):
        model = SiglipModel.from_pretrained(folder).eval()
        return model, sum(x.numel() * x.element_size() for x in model.parameters())

    def embed(model):
        size = model.config.vision_config.image_size
        with torch.inference_mode():
            model.vision_model(pixel_values=torch.zeros(1, 3, size, size)).pooler_output.sum()

    return load_model, embed


class _PeakAnonymousMemory:
    """Highest RssAnon inside the block above its level at the start, bytes (Linux)."""

    def __enter__(self):
        self.peak, self._start, self._done = 0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._done.set()
        self._thread.join()
        self._note()

    def _watch(self):
        while not self._done.wait(0.002):
            self._note()

    def _note(self):
        self.peak = max(self.peak, self._now() - self._start)

    @staticmethod
    def _now() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) * 1024


# ---------------------------------------------------------------------------------- report


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
    sub = commands.add_parser("encode", help="image encoder throughput")
    _common(sub, "so400m-448")
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    sub.add_argument(
        "--at-once", type=int, help="images per call of our encoder (default: 1 on a CPU)"
    )
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    sub.add_argument("--precision", help="our matmul precision (default as the library's)")
    sub.set_defaults(run=encode)
    sub = commands.add_parser("load", help="load time and memory")
    _common(sub, "so400m-448")
    sub.set_defaults(run=load)
    bench_train.add_parsers(commands, _common)
    bench_embed.add_parsers(commands, _common)
    bench_search.add_parsers(commands, _common)
    bench_evaluate.add_parsers(commands)
    bench_dicom.add_parsers(commands)
    bench_slides.add_parsers(commands)
    bench_attention.add_parsers(commands)
    one = commands.add_parser("load-one", help="one side in this process (what load runs)")
    one.add_argument("side", choices=SIDES)
    one.add_argument("folder")
    one.add_argument("--attention")
    return parser


def _common(sub: argparse.ArgumentParser, size: str) -> None:
    sub.add_argument("--size", default=size, help=f"named architecture (default {size})")
    sub.add_argument("--repeats", type=int, default=5, help="timed turns (default 5)")
    sub.add_argument("--attention", help="our attention back end (default the device's)")
    sub.add_argument("--without-torch", action="store_true", help="only our side")
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout")


if __name__ == "__main__":
    sys.exit(main())
