"""Tiles of a slide to pixels beside a plain OpenSlide and PIL loop; `bench.py slides` runs it."""

import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure

_SIDE = 256  # of the slide's own tiles, as scanners write them


def slides(args) -> dict:
    """Tiles per second from file to pixels, by resolution: on one core, and with all threads.

    The plain loop goes row by row over the grid. The slide is as wide as a small real one, and one
    level has to be read at twice the resolution asked for.
    """
    from medsiglip_jax.preprocess import slides
    from medsiglip_jax.preprocess.parts import Parts

    rows = []
    with tempfile.TemporaryDirectory(prefix="medsiglip_bench_") as folder:
        path = _slide(Path(folder) / "slide.tif", args.width, args.height)
        for mpp in args.mpp:
            columns = slides.tiles(path, Parts(mpp=mpp, tissue=0.0)).values()
            places = list(zip(*(c.tolist() for c in columns), strict=True))
            calls = {
                "ours": lambda: _ours(path, places, 1),  # noqa: B023
                "plain": lambda: _plain(path, places),  # noqa: B023
                "ours, all threads": lambda: _ours(path, places, os.cpu_count()),  # noqa: B023
            }
            times = measure.interleaved(calls, args.repeats)
            row = {"mpp": mpp, "tiles": len(places), "region": places[0][3]}
            rates = {side: [len(places) / t for t in times[side]] for side in calls}
            row |= {side: measure.summary(rates[side]) for side in calls}
            medians = {side: statistics.median(times[side]) for side in calls}
            row["ratio"] = round(medians["plain"] / medians["ours"], 2)
            row["ratio, all threads"] = round(medians["plain"] / medians["ours, all threads"], 2)
            measure.progress(str(row))
            rows.append(row)
    return {"repeats": args.repeats, "unit": "tiles per second, to 448 x 448 pixels", "rows": rows}


def _ours(path: str, places, threads: int) -> None:
    """Reads one tile as the loader's threads do."""
    from medsiglip_jax.preprocess import sources, xla
    from medsiglip_jax.preprocess.names import Tile, part_of

    to_array, resize = xla.preset("big_vision")
    os.utime(path)  # another file, it seems, and so it is opened anew

    def load(place):
        pixels, _ = sources.read(part_of(path, Tile(*place[:4])), to_array)
        return resize(pixels, 448)

    if threads == 1:
        for place in places:
            load(place)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(load, places):
            pass


def _plain(path: str, places) -> None:
    import numpy as np
    import openslide
    from PIL import Image

    with openslide.OpenSlide(path) as slide:
        for x, y, level, size, _ in sorted(places, key=lambda place: (place[1], place[0])):
            pixels = np.array(slide.read_region((x, y), level, (size, size)).convert("RGB"))
            if size != 448:
                image = Image.fromarray(pixels)
                pixels = np.array(image.resize((448, 448), Image.Resampling.BILINEAR))


def _slide(path: Path, width: int, height: int) -> str:
    """A pyramid of JPEG tiles at 0.5 um/px, of levels 1 and 4, with the noise of a camera."""
    import numpy as np
    import tifffile

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:_SIDE, :_SIDE] / 9.0
    kinds = []
    for phase in rng.uniform(0, 6, 8):
        cells = np.sin(x + phase) * np.sin(y - phase) > 0.3
        stain = np.where(cells[..., None], (110, 60, 140), (225, 165, 200))
        kinds.append(np.clip(rng.normal(stain, 8), 0, 255).astype(np.uint8))
    with tifffile.TiffWriter(path) as file:
        for level, factor in enumerate((1, 4)):
            shape = (height // factor, width // factor, 3)
            count = -(-shape[0] // _SIDE) * -(-shape[1] // _SIDE)
            file.write(
                (kinds[i] for i in rng.integers(len(kinds), size=count)), shape=shape,
                dtype=np.uint8, tile=(_SIDE, _SIDE), photometric="rgb", compression="jpeg",
                compressionargs={"level": 85}, metadata=None, resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER", subfiletype=int(level > 0),
            )  # fmt: skip
    return str(path)


def add_parsers(commands) -> None:
    sub = commands.add_parser("slides", help="tiles of a slide to pixels, against OpenSlide")
    sub.add_argument("--mpp", type=float, nargs="+", default=[0.5, 1.0])
    sub.add_argument("--width", type=int, default=40_000, help="width of the slide in pixels")
    sub.add_argument("--height", type=int, default=1_800)
    sub.add_argument("--repeats", type=int, default=9)
    sub.add_argument("--json", action="store_true")
    sub.set_defaults(run=slides)
