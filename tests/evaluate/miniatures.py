"""Data sets in miniature: how tests write one, and how they read it back."""

import gzip
import tomllib
import zlib

import numpy as np
from PIL import Image

from medsiglip_jax.evaluate import tasks
from medsiglip_jax.evaluate.data import reading, splits


def picture(path, value=None, size=4):
    """Writes an image of one grey, or else of pixels that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(
        0, 256, (size, size, 3), np.uint8
    )
    Image.fromarray(pixels if value is None else np.full_like(pixels, value)).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def read(name, folder, **options):
    """{id: {class: label}} of known labels, and the dataset."""
    task, found = reading.read(tasks.read(name), folder, **options)
    names = [c.name for c in task.classes]
    rows = {
        image: {n: int(v) for n, v in zip(names, row, strict=True) if not np.isnan(v)}
        for image, row in zip(found.ids, found.labels, strict=True)
    }
    return rows, found


def shown(rows):
    """{id: classes that are 1}."""
    return {image: {name for name, v in row.items() if v} for image, row in rows.items()}


def part(task, name, folder, **options):
    """As `read`, of a part of the data set as `read_parts` finds it."""
    task = tasks.read(task) if isinstance(task, str) else task
    _, parts = splits.read(task, folder, wanted=[name], **options)
    assert parts.origin == "of the data set"
    found = getattr(parts, name)
    known = [{c.name for c, v in zip(task.classes, row, strict=True) if v} for row in found.labels]
    return dict(zip(found.ids, known, strict=True)), found


def content(name):
    folder = tasks.resources.files("medsiglip_jax.evaluate") / "library"
    return tomllib.loads((folder / f"{name}.toml").read_text())


# A task of images and texts.
PAIRS = {
    "title": "x", "kind": "pairs",
    "data": {
        "adapter": "csv", "tables": [{"file": ["pairs.csv"]}], "images": {"path": ["{image}"]},
        "text": "text", "group": "case", "group_optional": True,
    },
}  # fmt: skip
