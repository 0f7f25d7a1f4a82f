"""Loading a checkpoint: seconds, memory, and the first embedding, each in a fresh process."""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import measure


def load(args) -> dict:
    """Loads one full checkpoint on each side, each time in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="medsiglip_bench_") as tmp:
        folder = Path(tmp) / "model"
        measure.progress(f"writing a random {args.size} checkpoint")
        code = "import sys, medsiglip_jax as m; m.save(m.init(sys.argv[1]), sys.argv[2])"
        subprocess.run([sys.executable, "-c", code, args.size, str(folder)], check=True)
        sides = ("ours",) if args.without_torch else measure.SIDES
        runs: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side in sides:
                command = [sys.executable, __file__, side, str(folder)]
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


def add_parsers(commands, common) -> None:
    """The sub-command; `common` adds the flags that all share."""
    sub = commands.add_parser("load", help="load time and memory")
    common(sub, "so400m-448")
    sub.set_defaults(run=load)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One side of `bench.py load`, in this process.")
    parser.add_argument("side", choices=measure.SIDES)
    parser.add_argument("folder")
    parser.add_argument("--attention")
    asked = parser.parse_args()
    print(json.dumps(load_one(asked.side, asked.folder, asked.attention)))
