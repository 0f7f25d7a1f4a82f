"""Files of images for several tests; for those of listing their content need not be an image."""

from pathlib import Path

import numpy as np
from PIL import Image

from medsiglip_jax.files.places import file_system
from medsiglip_jax.preprocess.sources import read_bytes

FILES = {
    "b.png": b"\x89PNG b", "sub/1.2.840.png": b"\x89PNG uid", "sub/deep/c.JPEG": b"\xff\xd8 c",
    "z.tif": b"II z",
}  # fmt: skip


def write_pictures(folder, count, rng):
    """Writes 00.png, 01.png, …: noise, 31 pixels wide and of several heights."""
    for i in range(count):
        pixels = rng.integers(0, 256, (rng.integers(9, 60), 31, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")


def put(path, content):
    content = content.encode() if isinstance(content, str) else content
    if "://" in path:
        system, name = file_system(path)
        system.pipe_file(name, content)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    return path


def contents(found):
    return {row.id: read_bytes(row.source) for row in found if row.kind == "image"}


def cells(found):
    return [(row.id, row.kind, row.text) for row in found]
