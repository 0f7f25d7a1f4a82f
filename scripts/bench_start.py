"""A second start of `classify` beside the shortest script; `bench.py start` runs it.

The script imports the package, loads the model and embeds one blank image and two texts. Each run
is a process of its own, and both sides find their programs in the compilation cache. The first run
of the command, which compiles, is reported on its own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import measure
import numpy as np

TEXTS = ("a chest X-ray with pneumonia", "a normal chest X-ray")


def start(args) -> dict:
    """Seconds by the clock, and of the CPU, of the command and of the script, in turns."""
    with tempfile.TemporaryDirectory(prefix="medsiglip_bench_") as tmp:
        measure.progress(f"writing a random {args.size} checkpoint and an image")
        model, image = str(Path(tmp, "model")), str(Path(tmp, "image.png"))
        _write_image(image)
        code = "import sys, bench_start; bench_start.write_model(*sys.argv[1:])"
        subprocess.run([sys.executable, "-c", code, args.size, model], check=True, cwd=_HERE)
        texts = [word for text in TEXTS for word in ("--text", text)]
        commands = {
            "command": ["-m", "medsiglip_jax", "classify", "--model", model, *texts, image],
            "script": [__file__, model],
        }
        first = {side: _run(command, tmp) for side, command in commands.items()}
        runs: dict[str, list[dict]] = {side: [] for side in commands}
        for _ in range(args.repeats):
            for side, command in commands.items():
                runs[side].append(_run(command, tmp))
                measure.progress(f"{side}: {runs[side][-1]}")
        programs = len(list(Path(tmp, "medsiglip_jax", "compiled").glob("*.medsiglip-jax")))
    keys = ("seconds", "cpu_seconds")
    values = {side: {key: [run[key] for run in runs[side]] for key in keys} for side in runs}
    rows = [
        {"side": side, **{f"first_{key}": first[side][key] for key in keys},
         **{key: measure.summary(values[side][key]) for key in keys}}
        for side in runs
    ]  # fmt: skip
    ratios = {
        f"ratio_of_{key}": round(
            statistics.median(values["command"][key]) / statistics.median(values["script"][key]), 3
        )
        for key in keys
    }
    return {"repeats": args.repeats, "programs": programs, **ratios, "rows": rows}


_HERE = Path(__file__).parent


def _run(command: list[str], folder: str) -> dict:
    """Runs Python with a cache folder in `folder`, quietly, and with Python's own cache of the
    modules that it compiles, which users have."""
    environment = os.environ | {"XDG_CACHE_HOME": folder}
    for name in ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, env=environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
    }


def _write_image(path: str) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_model(size: str, folder: str) -> None:
    """Saves random weights of a named size, with the small vocabulary of quickstart."""
    import medsiglip_jax
    from medsiglip_jax.model.api import Model
    from medsiglip_jax.model.config import named
    from medsiglip_jax.preprocess.text import Tokenizer
    from medsiglip_jax.train import quickstart

    tokenizer = quickstart.train_tokenizer(96)
    config = named(size)
    text = replace(config.text, vocab_size=Tokenizer(tokenizer).vocab_size)
    config = replace(config, text=text)
    params = medsiglip_jax.init(config).params
    medsiglip_jax.save(Model(params, config, tokenizer=tokenizer), folder)


def shortest(folder: str) -> None:
    """What the command is held against."""
    from medsiglip_jax.cli import devices

    devices.prepare()  # the same cache
    import medsiglip_jax

    model = medsiglip_jax.load(folder)
    size = model.config.image_size
    images = model.encode_image(np.zeros((1, size, size, 3), np.uint8))
    print(model.similarity(images, model.encode_text(TEXTS)))


def add_parsers(commands, common) -> None:
    """The sub-command; `common` adds the flags that all share."""
    sub = commands.add_parser("start", help="a second start of classify")
    common(sub, "base-224")
    sub.set_defaults(run=start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The script of `bench.py start`.")
    parser.add_argument("folder")
    shortest(parser.parse_args().folder)
