"""Loading a checkpoint: seconds, memory, and the first embedding, each in a fresh process."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

SECONDS = ("import_seconds", "load_seconds", "first_embedding_seconds", "total_seconds")


def load(args) -> dict:
    """Loads one full checkpoint on each side, each time in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="medsiglip_bench_") as tmp:
        source = args.source or _written(args.size, args.format, Path(tmp) / "model")
        sides = ("ours",) if args.without_torch else measure.SIDES
        runs: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side in sides:
                command = [sys.executable, __file__, side, source]
                command += ["--attention", args.attention] if args.attention else []
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                measure.progress(f"{side}: {runs[side][-1]}")
    total = {side: [run["total_seconds"] for run in runs[side]] for side in sides}
    return {
        "repeats": args.repeats,
        "unit": "seconds, page cache warm; first_embedding: after loading, until one image is "
        "embedded; total: all three; resident: ru_maxrss once loaded, file pages and imports "
        "included, in bytes and times the weights",
        **(measure.ratios(total) if len(sides) > 1 else {}),
        "rows": [_row(side, runs[side]) for side in sides],
    }


def _written(size: str, format: str, folder: Path) -> str:
    measure.progress(f"writing a random {size} checkpoint")
    code = "import sys, medsiglip_jax as m; m.save(m.init(sys.argv[1]), *sys.argv[2:])"
    subprocess.run([sys.executable, "-c", code, size, str(folder), format], check=True)
    return str(folder)


def _row(side: str, runs: list[dict]) -> dict:
    resident, result = max(run["resident_bytes"] for run in runs), runs[0]["result_bytes"]
    return {
        "side": side,
        "result_bytes": result,
        "resident_bytes": resident,
        "resident_multiple": round(resident / result, 3),
        **{key: measure.summary([run[key] for run in runs]) for key in SECONDS},
    }


def load_one(side: str, source: str, attention: str) -> dict:
    """Loads `source` in this process and embeds one image."""
    start = time.perf_counter()
    load_model, embed = (_our_loader if side == "ours" else _torch_loader)(attention)
    imported = time.perf_counter()
    model, result_bytes = load_model(source)
    loaded = time.perf_counter()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    embed(model)
    embedded = time.perf_counter()
    return {
        "import_seconds": imported - start,
        "load_seconds": loaded - imported,
        "first_embedding_seconds": embedded - loaded,
        "total_seconds": embedded - start,
        "result_bytes": result_bytes,
        "resident_bytes": resident,
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


def add_parsers(commands, common) -> None:
    """The sub-command; `common` adds the flags that all share."""
    sub = commands.add_parser("load", help="load time and memory")
    common(sub, "so400m-448")
    sub.add_argument("--format", default="huggingface", help="layout to write (PyTorch: only that)")
    sub.add_argument("--source", help="load this checkpoint instead of writing a random one")
    sub.set_defaults(run=load)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One side of `bench.py load`, in this process.")
    parser.add_argument("side", choices=measure.SIDES)
    parser.add_argument("source")
    parser.add_argument("--attention")
    asked = parser.parse_args()
    print(json.dumps(load_one(asked.side, asked.source, asked.attention)))
