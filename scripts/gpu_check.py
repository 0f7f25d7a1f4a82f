"""What only a real GPU can show, in a few minutes: is it right, how fast, is what `plan` says true.

    python scripts/gpu_check.py --check                  # what is missing on this machine
    python scripts/gpu_check.py --wheels wheels          # fetches it beforehand, where there is pip
    python scripts/gpu_check.py --wheels wheels --only ml_collections upath     # what --check named
    python scripts/gpu_check.py --minutes 5 --output gpu_check.json
    JAX_PLATFORMS=cpu python scripts/gpu_check.py --size tiny-56 --output x.json   # does it work

The most important figures come first, and the file is written after each; a section that would
begin after the time is up is left out. Torch and transformers are compared with where they are
installed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import bench_embed
import bench_encode
import bench_train
import measure

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "siglip-tiny"
# Imported by what is measured here; TensorFlow and the like are not.
NEEDED = (
    "flax optax jax jaxtyping numpy ml_dtypes pyarrow safetensors sentencepiece upath fsspec "
    "filelock huggingface_hub PIL tqdm ml_collections"
).split()
COMPARED = ("torch", "transformers")
# What a machine with a GPU has anyway, in versions that fit its driver.
_THERE = re.compile(r"(jax.*|nvidia-.*|numpy|scipy|torch.*|transformers)", re.IGNORECASE)


def main(argv=None) -> int:
    args = _parser().parse_args(argv)
    if args.check:
        return check()
    if args.wheels:
        return wheels(args.wheels, args.python, args.only)
    if args.step:
        return measured_step(args)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has the card, too
    end = time.monotonic() + 60 * args.minutes
    report = {"minutes": args.minutes, "size": args.size, **measure.environment(), "sections": {}}
    for name, section in SECTIONS.items():
        start = time.monotonic()
        if start > end:
            found = {"left_out": f"{args.minutes:g} minutes were up"}
        else:
            try:
                found = section(args)
            except Exception as error:  # the figures so far are worth more than a traceback
                last = traceback.format_exc().strip().splitlines()[-3:]
                found = {"error": f"{type(error).__name__}: {error}"[:500], "where": last}
        report["sections"][name] = {**found, "seconds": round(time.monotonic() - start, 1)}
        measure.progress(f"{name}: {json.dumps(report['sections'][name])[:400]}")
        if args.output:
            Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 1 if any("error" in section for section in report["sections"].values()) else 0


# ----------------------------------------------------------------------------------- beforehand


def check() -> int:
    """Says what is missing here; 0 if nothing is that the figures need."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    compared = [name for name in COMPARED if importlib.util.find_spec(name) is None]
    print(json.dumps({"missing": missing, "not_compared_with": compared}))
    return 1 if missing else 0


def wheels(folder: str, python: str, only: list[str]) -> int:
    """Downloads what the package needs, or some of it and what that needs, in the versions that are
    installed here, for Linux and x86-64."""
    owners = importlib.metadata.packages_distributions()
    roots = [(owners.get(name, [name])[0], set()) for name in only]
    names = _requirements(*roots or [("medsiglip-jax", {"train"})])
    names = sorted(name for name in names if not _THERE.match(name))
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in names]
    systems = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17, 12, 5)]
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q",
        f"--python-version={python}", "--implementation=cp", *systems,
        "--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64", "-d", folder, *wanted,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    files = sorted(Path(folder).glob("*.whl"))
    size = sum(file.stat().st_size for file in files)
    print(f"{folder}: {len(files)} wheels, {size / 1e6:.0f} MB; there: pip install --no-index "
          f"--no-deps --target SITE {folder}/*.whl, and SITE on PYTHONPATH")  # fmt: skip
    return 0


def _requirements(*roots: tuple[str, set[str]]) -> set[str]:
    """These packages, with extras, and all that they need, but for TensorFlow and our own."""
    from packaging.requirements import Requirement

    found, left = {name for name, _ in roots} - {"medsiglip-jax"}, list(roots)
    while left:
        package, asked = left.pop()
        for line in importlib.metadata.requires(package) or ():
            need = Requirement(line)
            wanted = need.marker is None or any(
                need.marker.evaluate({"extra": extra}) for extra in ("", *asked)
            )
            if wanted and need.name not in found and "tensorflow" not in need.name:
                found.add(need.name)
                left.append((need.name, need.extras))
    return found


# ------------------------------------------------------------------------------------- sections


def parity(args) -> dict:
    """The golden model, float32 and bfloat16, against what transformers computed on a CPU."""
    import numpy as np

    import medsiglip_jax

    expected, found = np.load(GOLDEN / "expected.npz"), {}
    for dtype in ("float32", "bfloat16"):
        model = medsiglip_jax.load(GOLDEN, dtype=dtype)
        zimg = np.asarray(model.encode_image(expected["pixels"]))
        ztxt = np.asarray(model.encode_text(expected["tokens"]))
        found[dtype] = {
            "attention": model.compute.attention,
            "image_error": float(np.abs(zimg - expected["image_embeds"]).max()),
            "text_error": float(np.abs(ztxt - expected["text_embeds"]).max()),
            "least_cosine": float((zimg * expected["image_embeds"]).sum(-1).min()),
        }
    return {**found, "attention_gradients": _attention_errors()}


def _attention_errors() -> dict:
    """The default back end in bfloat16 against plain float32, value and gradients, relative."""
    import jax
    import jax.numpy as jnp

    from medsiglip_jax.model import attention, devices

    device = devices.default()
    name, tokens = attention.default(device), 128 if device.platform == "cpu" else 1024
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, ct = (jax.random.normal(key, (2, tokens, 4, 72)) for key in keys)
    inputs = (q / 72**0.5, k, v)

    def run(name, dtype):
        x, back = jax.vjp(attention.ATTENTION[name], *(x.astype(dtype) for x in inputs))
        return [y.astype(jnp.float32) for y in (x, *back(ct.astype(dtype)))]

    with jax.default_matmul_precision("highest"):
        plain = jax.jit(lambda: run("xla", "float32"))()
    ours = jax.jit(lambda: run(name, "bfloat16"))()
    errors = {
        key: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for key, a, b in zip(("x", "dq", "dk", "dv"), ours, plain, strict=True)
    }
    return {"name": name, **errors}


def products(args) -> dict:
    """The rate of a large bfloat16 product, which nothing here can exceed."""
    import jax
    import jax.numpy as jnp

    side = 8192 if jax.default_backend() == "gpu" else 512
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    times = measure.interleaved({"ours": lambda: product(a).block_until_ready()}, 20)
    return {"side": side, "teraflops_per_second": round(2e-12 * side**3 / min(times["ours"]), 1)}


def encode(args) -> dict:
    """The image tower at every batch size: our default attention, "xla", and compiled torch."""
    return bench_encode.encode(
        _options(
            args, batch=args.batches, at_once=None, precision=None, products=False, beside=["xla"]
        )
    )


def train(args) -> dict:
    """Whole train steps of `contrastive`: images/s and the share of the data sheet's peak."""
    return bench_train.train(_options(args, batch=args.train_batches, remat="dots", lora=None))


def train_lora(args) -> dict:
    return bench_train.train(_options(args, batch=args.train_batches, remat="dots", lora=16))


def memory(args) -> dict:
    """The peak that `plan` predicts for a train step, beside the one of a process that runs it."""
    batch = args.train_batches[-1]
    flags = [sys.executable, __file__, "--size", args.size, "--step", str(batch)]
    done = subprocess.run(flags, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip()[-400:])
    measured = json.loads(done.stdout.splitlines()[-1])
    return {"batch": batch, **measured, **_predicted(args.size, batch, measured["peak_bytes"])}


def _predicted(size: str, batch: int, measured: int | None) -> dict:
    """By `plan`, for the described card of this machine's name."""
    import jax

    from medsiglip_jax.plan import gpus, topologies, verdict

    kind = jax.devices()[0].device_kind
    key = next((key for key, card in gpus.bundled().items() if card.name == kind), None)
    if key is None:
        return {"predicted": f"no card {kind!r} in cards.toml"}
    plan = verdict.plan(verdict.Question(_recipe(size, batch), topologies.parse(key)))
    found = {"topology": key, "predicted_bytes": plan["peak_bytes"]}
    return found | ({"measured_over_predicted": round(measured / plan["peak_bytes"], 4)}
                    if measured else {})  # fmt: skip


def _recipe(size: str, batch: int):
    from medsiglip_jax.train import recipe

    return recipe.from_dict({
        "model": size, "data": {"path": "no.csv"}, "total_steps": 10, "batch_size": batch,
        "dtype": "bfloat16", "remat": "dots",
    })  # fmt: skip


def measured_step(args) -> int:
    """In a process of its own: runs the step that `plan` compiles, and prints its memory."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    from medsiglip_jax.model import config

    options = _options(args, remat="dots", lora=None)
    step = bench_train._our_step(config.named(args.size), args.step, options)
    for _ in range(3):
        step()
    stats = jax.devices()[0].memory_stats() or {}
    print(json.dumps({"peak_bytes": stats.get("peak_bytes_in_use")}))
    return 0


def embed(args) -> dict:
    """JPEG files to vectors: grey 1,024 px and colour 512 px, and how busy the card is."""
    import medsiglip_jax
    from medsiglip_jax.data import inputs
    from medsiglip_jax.inference.embed import EmbedOptions
    from medsiglip_jax.inference.embed import embed as run

    batch, busy = max(args.batches), []
    with tempfile.TemporaryDirectory(prefix="medsiglip_check_") as name:
        folder = Path(name)
        bench_embed.radiographs_and_photos(folder, args.images)
        model = medsiglip_jax.init(args.size, dtype="bfloat16")
        options = EmbedOptions(batch_size=batch, shard_size=max(batch, args.images // 2))
        warm = inputs.rows([folder / "0.jpg"])
        run(model, warm, folder / "warm", options)
        start = time.perf_counter()
        rows = inputs.rows([folder / f"{i}.jpg" for i in range(args.images)])
        run(model, rows, folder / "out", options, lambda progress: busy.append(progress.busy))
        seconds = time.perf_counter() - start
    return {
        "images": args.images, "batch": batch, "cores": measure.cores(),
        "images_per_second": round(args.images / seconds, 2), "busy": round(busy[-1], 4),
    }  # fmt: skip


SECTIONS = {
    # "memory" runs a process of its own, for which later sections would leave little of the card.
    "parity": parity, "products": products, "memory": memory, "encode": encode, "train": train,
    "embed": embed, "train_lora": train_lora,
}  # fmt: skip


def _options(args, **more) -> argparse.Namespace:
    """Flags of a benchmark in bench.py."""
    import jax

    torch = all(importlib.util.find_spec(name) for name in COMPARED) and not args.without_torch
    shared = {
        "size": args.size, "repeats": args.repeats, "attention": None, "without_torch": not torch,
        "dtype": "bfloat16", "gpu": jax.default_backend() == "gpu",
    }  # fmt: skip
    return argparse.Namespace(**shared | more)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="say what is missing, and exit")
    parser.add_argument("--wheels", metavar="DIR", help="download wheels for such a machine")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="what --check named")
    parser.add_argument("--python", default="3.12", help="its Python (default 3.12)")
    parser.add_argument("--minutes", type=float, default=5, help="no section begins later (5)")
    parser.add_argument("--output", metavar="FILE", help="JSON, written after every section")
    parser.add_argument("--size", default="so400m-448", help="architecture (so400m-448)")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 32, 256])
    parser.add_argument("--train-batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--images", type=int, default=2000, help="JPEG files to embed (2,000)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (5)")
    parser.add_argument("--without-torch", action="store_true", help="only our side")
    parser.add_argument("--step", type=int, metavar="BATCH", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
