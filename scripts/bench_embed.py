"""The benchmarks of `embed`: from JPEG files to Parquet, and its memory."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_encode
import bench_input
import measure

# Of a model so small that reading and resizing is all the work: 16 tokens of 448-px images.
SMALL = dict(patch_size=112, width=32, depth=1, mlp_dim=64, num_heads=2, vocab_size=64)


def embed(args) -> dict:
    """Images/s from files to vectors, ours against transformers' processor and model.

    `--loop plain` reads, prepares and embeds one batch after the other, as the model card does;
    `dataloader` leaves the reading to a torch DataLoader with one worker per core.
    """
    architecture = _architecture(args.size)
    with tempfile.TemporaryDirectory(prefix="medsiglip_bench_") as folder:
        paths = bench_input.pictures(Path(folder), args.images)
        ours = _our_job(architecture, paths, Path(folder), args)
        calls = {"ours": ours}
        if not args.without_torch:
            calls["torch"] = _torch_job(architecture, paths, args)
        times = measure.interleaved(calls, args.repeats)
    rates = {side: [args.images / s for s in values] for side, values in times.items()}
    row = {f"{side}_images_per_second": measure.summary(x) for side, x in rates.items()}
    row |= {} if args.without_torch else measure.ratios(times)
    row["preprocess"] = f"ours {args.preprocess}, theirs {args.resample} (PIL)"
    return {"cores_used": measure.cores(), "batch": args.batch, "loop": args.loop, "rows": [row]}


def radiographs_and_photos(folder: Path, count: int) -> None:
    """Writes 0.jpg, 1.jpg and so on: in turn grey of 1,024 px and colour of 512 px."""
    from PIL import Image

    (folder / "drawn").mkdir()
    pictures = [Image.open(path) for path in bench_input.pictures(folder / "drawn", 4)]
    for i in range(count):
        picture = pictures[i // 2 % len(pictures)]
        picture = picture.resize((512, 512)) if i % 2 else picture.convert("L")
        picture.save(folder / f"{i}.jpg", quality=90)


def _architecture(size: str):
    from medsiglip_jax.model.config import named, two_towers

    return two_towers(image_size=448, **SMALL) if size == "small" else named(size)


def _our_job(architecture, paths: list[str], folder: Path, args):
    import medsiglip_jax
    from medsiglip_jax.data import inputs
    from medsiglip_jax.inference.embed import EmbedOptions
    from medsiglip_jax.inference.embed import embed as run

    medsiglip_jax.save(medsiglip_jax.init(architecture, dtype=args.dtype), folder / "model")
    model = medsiglip_jax.load(folder / "model", dtype=args.dtype, attention=args.attention)
    options = EmbedOptions(batch_size=args.batch, preprocess=args.preprocess)
    turn = iter(range(1000))

    def call():
        run(model, inputs.rows(paths), folder / f"out{next(turn)}", options)

    return call


def _torch_job(architecture, paths: list[str], args):
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    tower = bench_encode.torch_tower(architecture.vision, args.dtype)
    processor = _processor(args.resample)
    if args.gpu:
        tower = torch.compile(tower)

    class Files(Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, i):
            with Image.open(paths[i]) as image:
                return processor(image.convert("RGB"))

    workers = measure.cores() if args.loop == "dataloader" else 0

    @torch.inference_mode()
    def call():
        vectors = []
        for pixels in DataLoader(Files(), args.batch, num_workers=workers):
            z = tower(pixel_values=pixels.to(tower.device, tower.dtype)).pooler_output.float()
            vectors.append(torch.nn.functional.normalize(z).cpu())
        return torch.cat(vectors).numpy()

    return call


def _processor(resample: str):
    """PIL image -> float32 [3, 448, 448]: transformers' own, or a cheap one written by hand."""
    import numpy as np
    import torch
    from PIL import Image

    if resample == "bicubic":
        from transformers import SiglipImageProcessorPil

        processor = SiglipImageProcessorPil(size={"height": 448, "width": 448})
        return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]

    def by_hand(image):
        small = np.asarray(image.resize((448, 448), Image.Resampling.BILINEAR))
        return torch.from_numpy(small.transpose(2, 0, 1) / np.float32(127.5) - np.float32(1))

    return by_hand


def memory(args) -> dict:
    """Peak resident memory of whole jobs with more and more rows, each in its own process."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="medsiglip_bench_") as name:
        folder = Path(name)
        _small_model(folder / "model")
        for count in args.rows:
            _write_table(folder / "rows.parquet", count)
            command = [sys.executable, __file__, "memory-one", folder, f"{count}"]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    return {"unit": "MiB, peak RSS", "rows": rows}


def _small_model(folder: Path) -> None:
    import medsiglip_jax
    from medsiglip_jax.model import config

    small = config.two_towers(image_size=56, **{**SMALL, "patch_size": 14})
    medsiglip_jax.save(medsiglip_jax.init(small), folder)


def _write_table(path: Path, count: int) -> None:
    """A table of `count` rows that repeats 100 small pictures under different ids."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(100):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(path.parent / f"{i}.png")
    columns = {
        "id": [f"examination-{i:09d}" for i in range(count)],
        "image": [f"{i % 100}.png" for i in range(count)],
    }
    pq.write_table(pa.table(columns), path)


def memory_one(folder: Path, count: int) -> dict:
    """Runs one job in this process and returns its peak memory."""
    import medsiglip_jax
    from medsiglip_jax.data import inputs
    from medsiglip_jax.inference.embed import EmbedOptions
    from medsiglip_jax.inference.embed import embed as run

    model = medsiglip_jax.load(folder / "model")
    rows = inputs.rows([folder / "rows.parquet"])
    result = run(model, rows, folder / f"out{count}", EmbedOptions(batch_size=64))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"count": count, "embedded": result.embedded, "peak_mib": round(peak / 1024, 1)}


def add_parsers(commands, common) -> None:
    """The sub-commands; `common` adds the flags that all share."""
    sub = commands.add_parser("embed", help="files to vectors, images/s")
    common(sub, "so400m-448")
    sub.add_argument("--images", type=int, default=8)
    sub.add_argument("--batch", type=int, default=4)
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    sub.add_argument("--preprocess", default="big_vision")
    sub.add_argument("--resample", default="bicubic", choices=["bicubic", "bilinear"])
    sub.add_argument("--loop", default="plain", choices=["plain", "dataloader"])
    sub.add_argument("--gpu", action="store_true", help="on a GPU; torch compiled")
    sub.set_defaults(run=embed)

    sub = commands.add_parser("memory", help="memory of embedding jobs of 1,000 to 100,000 rows")
    common(sub, "small")
    sub.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    sub.set_defaults(run=memory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One job of `bench.py memory`, in this process.")
    parser.add_argument("what", choices=["memory-one"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    asked = parser.parse_args()
    print(json.dumps(memory_one(asked.folder, asked.count)))
