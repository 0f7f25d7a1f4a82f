"""A task and a folder -> its images and labels, by the adapter that the task names."""

import hashlib
from dataclasses import replace

import numpy as np

from medsiglip_jax import places
from medsiglip_jax.evaluate import arrays, csv_tables, folders
from medsiglip_jax.evaluate.dataset import Dataset, Policy, where_to_get
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.preprocess.decode import UnreadableImage, decode
from medsiglip_jax.preprocess.files import read_bytes

READERS = {"csv": csv_tables.read, "folders": folders.read, "npz": arrays.read, "h5": arrays.read}


def read(
    task: Task, folder: places.Given, policy: Policy = Policy(), allow_missing: bool = False
) -> tuple[Task, Dataset]:
    """Reads the data of a task.

    Args:
        task: what to read.
        folder: where the data lies.
        policy: what labels that are neither 0 nor 1 mean.
        allow_missing: go on without what is missing; it is counted either way.

    Returns:
        The task with the classes that the data has, and the images with at least one label.

    Raises:
        FileNotFoundError: no such folder, or what is missing in it, how much, and where it is had.
        ValueError: tables that are not as the task says.
    """
    root = places.at(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder{where_to_get(task)}")
    found = READERS[task.data["adapter"]](task, root, policy)
    if found.missing and not allow_missing:
        raise FileNotFoundError(
            f"{root}: {len(found.missing):,} missing, {len(found):,} images found: "
            f"{'; '.join(found.missing[:5])}{'; …' if len(found.missing) > 5 else ''}. "
            f"--allow-missing goes on without them{where_to_get(task)}"
        )
    found = replace(found, counts={**found.counts, "missing": len(found.missing)})
    task = task if task.classes else task.with_classes(found.values)
    found = found.once().labelled()
    if not len(found):
        raise ValueError(f"{root}: none of the images of {task.title} has a label")
    _check_readable(found, root)
    return task, found


def labels_sha256(found: Dataset) -> str:
    """Identity of which image has which labels."""
    digest = hashlib.sha256("\n".join(found.ids).encode())
    digest.update(np.ascontiguousarray(found.labels, "<f4").tobytes())
    return digest.hexdigest()


def files_sha256(found: Dataset) -> dict[str, str]:
    """Name -> digest of the files that labels were read from."""
    digests = {}
    for path in found.files:
        with path.open("rb") as file:  # may hold images, too, and be large
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        digests[path.name] = digest.hexdigest()
    return digests


def _check_readable(found: Dataset, root: places.Place) -> None:
    """Says at once what else every image would be said of, later."""
    reasons = []
    for source in found.sources[:3]:
        try:
            decode(read_bytes(source))
            return
        except UnreadableImage as error:
            reasons.append(f"{source}: {error}")
    hint = ". DICOM is not decoded here: convert it" if _dicom(found) else ""
    raise ValueError(f"{root}: the first images cannot be read: {reasons[0]}{hint}")


def _dicom(found: Dataset) -> bool:
    return found.sources[0].lower().endswith((".dcm", ".dicom"))
