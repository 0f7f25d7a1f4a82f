"""The benchmark of the input pipeline, for bench.py: files to pixels, threads against tf.data."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure

BATCH, SIZE, WARM = 8, 448, 2


def input(args) -> dict:
    """Images/s of running loaders, and of a plain PIL loop where PIL reads the files, to 448 px."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: args.cores]))
    os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TF_ENABLE_ONEDNN_OPTS"] = "3", "0"
    rows = []
    with tempfile.TemporaryDirectory(prefix="medsiglip_bench_") as folder:
        for kind in args.kinds:
            images = MAKE[kind](Path(folder, kind), args.images)
            rows += _rows(kind, _timed(_loaders(images, args.cores), args.repeats, args.steps))
    return {"cores_used": args.cores, "unit": f"images/s to {SIZE} px", "rows": rows}


def _timed(
    loaders: dict[str, Callable[[], Iterator]], repeats: int, steps: int
) -> dict[str, list[tuple[float, float]]]:
    """Images per second, and per second of CPU time, of each loader, in turns.

    Each turn starts anew. What starting takes, for a graph a second, is not measured.
    """
    rates = {name: [] for name in loaders}
    for turn, (name, loader) in itertools.product(range(repeats + 1), loaders.items()):
        stream = loader()
        for _ in range(WARM):
            next(stream)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(stream)
        took = time.perf_counter() - wall, time.process_time() - cpu
        stream.close()
        if turn:
            rates[name].append((BATCH * steps / took[0], BATCH * steps / took[1]))
    return rates


def _rows(kind: str, rates: dict[str, list[tuple[float, float]]]) -> list[dict]:
    def ratio(name: str, clock: int) -> float:
        ours, theirs = ([turn[clock] for turn in rates[side]] for side in (name, "threads"))
        return round(statistics.median(ours) / statistics.median(theirs), 3)

    return [
        {
            "files": kind,
            "loader": name,
            "images_per_second": measure.summary([wall for wall, _ in turns]),
            "images_per_cpu_second": measure.summary([cpu for _, cpu in turns]),
            "ratio_to_threads": ratio(name, 0),
            "ratio_to_threads_cpu": ratio(name, 1),
        }
        for name, turns in rates.items()
    ]


def _loaders(images: list[str], cores: int) -> dict[str, Callable[[], Iterator]]:
    from medsiglip_jax.data import loader
    from medsiglip_jax.data.examples import Examples
    from medsiglip_jax.data.loader import Input
    from medsiglip_jax.data.order import Order
    from medsiglip_jax.data.tf import pipeline, tf_codec
    from medsiglip_jax.preprocess import xla

    rows = Input((Examples(images),), Order((len(images),)), SIZE)

    def threads(codec) -> Callable[[], Iterator]:
        return lambda: loader.batches(rows, BATCH, workers=cores, codec=codec("big_vision"))

    loaders = {
        "threads without TensorFlow": threads(xla.codec),
        "threads": threads(lambda preset: tf_codec(preset, others=xla.codec(preset))),
        "tf.data": lambda: pipeline.batches(rows, BATCH, workers=cores),
    }
    return loaders if "#" in images[0] or images[0].endswith("dcm") else {
        "plain PIL": lambda: _plain(images, cores), **loaders
    }  # fmt: skip


def _plain(paths: list[str], cores: int) -> Iterator:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from PIL import Image

    def load(path):
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    endless = itertools.cycle(paths)
    with ThreadPoolExecutor(cores) as pool:
        while True:
            yield np.stack(list(pool.map(load, itertools.islice(endless, BATCH))))


# ------------------------------------------------------------------------------------ the files


def pictures(folder: Path, count: int, suffix: str = ".jpg") -> list[str]:
    """Files with the detail of a photograph: noise of several scales, 1024 px."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        pixels = np.zeros((1024, 1024, 3))
        for size in (8, 64, 512):
            noise = rng.integers(0, 256, (size, size, 3), np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize((1024, 1024))) / 3
        paths.append(str(folder / f"{i}{suffix}"))
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def _dicom(folder: Path, count: int) -> list[str]:
    """A CT slice without compression, as often as needed."""
    import bench_dicom

    folder.mkdir()
    content = bench_dicom.files()["CT 512x512"]
    paths = [folder / f"{i}.dcm" for i in range(count)]
    for path in paths:
        path.write_bytes(content)
    return [str(path) for path in paths]


def _tfrecord(folder: Path, count: int) -> list[str]:
    from medsiglip_jax.data import examples, tfrecord

    jpeg = examples.Examples(pictures(folder / "jpeg", count))
    tfrecord.write_shards(jpeg, folder / "shards", 2)
    return list(examples.read(folder / "shards").images)


MAKE: dict[str, Callable[[Path, int], list[str]]] = {
    "jpeg": pictures,
    "png": lambda folder, count: pictures(folder, count, ".png"),
    "dicom": _dicom,
    "tfrecord": _tfrecord,
}


def add_parsers(commands, common) -> None:
    """The sub-command; `common` adds the flags that all share."""
    sub = commands.add_parser("input", help="decoding and resizing, images/s")
    common(sub, "so400m-448")
    sub.add_argument("--cores", type=int, default=1)
    sub.add_argument("--images", type=int, default=32)
    sub.add_argument("--steps", type=int, default=6, help="batches of 8 per turn (default 6)")
    sub.add_argument("--kinds", nargs="+", choices=MAKE, default=list(MAKE))
    sub.set_defaults(run=input)
