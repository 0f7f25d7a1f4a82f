"""A task and a folder -> its images and labels, by the adapter that the task names."""

import functools
import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from medsiglip_jax.data.labels import Policy
from medsiglip_jax.evaluate.data import arrays, copies, csv_tables, folders
from medsiglip_jax.evaluate.data.dataset import Dataset, where_to_get
from medsiglip_jax.evaluate.data.layout import CsvData, FolderData
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files import places
from medsiglip_jax.preprocess import facts, sources
from medsiglip_jax.preprocess.dicom.rules import Rules

# One for each layout of `layout.LAYOUTS`.
ADAPTERS = {"csv": csv_tables.read, "folders": folders.read, "npz": arrays.read, "h5": arrays.read}
_FITS = {"csv": csv_tables.fits, "folders": folders.fits, "npz": arrays.fits, "h5": arrays.fits}
_SHOWN = 5  # missing files in a message


def read(
    task: Task,
    folder: places.Given,
    policy: Policy = Policy(),
    allow_missing: bool = False,
    prefer: str = "",
) -> tuple[Task, Dataset]:
    """Reads the data of a task.

    Args:
        task: what to read.
        folder: of the data set, or the folder that it lies in, if nothing else there fits.
        policy: what labels mean that are neither 0 nor 1.
        allow_missing: go on without what is missing; it is counted either way.
        prefer: which of several files of one image is read, see `copies.choose`.

    Returns:
        The task with the classes that the data has, and the images with at least one label; of
        pairs, those with a text.

    Raises:
        FileNotFoundError: the folder does not exist, or files are missing in it: which, how many,
            and where to get them.
        ValueError: tables that are not as the task says.
    """
    given = places.at(folder)
    if not given.is_dir():
        raise FileNotFoundError(f"{given}: no such folder{where_to_get(task)}")
    root, notes = _root(task, given)
    copies.check_rule(prefer, root)
    if prefer and not _searches(task.layout):
        raise ValueError(
            f"prefer is {prefer!r}, and task {task.name} says which file each image is; it applies "
            "where a pattern finds files, or folders are listed"
        )
    dataset = ADAPTERS[task.data["adapter"]](task, task.layout, root, policy, prefer)
    dataset = replace(dataset, notes=[*notes, *dataset.notes])
    if dataset.missing and not allow_missing:
        more = "; …" if len(dataset.missing) > _SHOWN else ""
        raise FileNotFoundError(
            f"{root}: {len(dataset.missing):,} missing, {len(dataset):,} images found: "
            f"{'; '.join(dataset.missing[:_SHOWN])}{more}. "
            f"--allow-missing goes on without them{where_to_get(task)}"
        )
    dataset = replace(dataset, counts={**dataset.counts, "missing": len(dataset.missing)})
    task = task if task.classes else task.with_classes(dataset.values)
    dataset = dataset.captioned() if task.kind == "pairs" else dataset
    pool = dict(zip(dataset.ids, dataset.sources, strict=True))
    dataset = replace(dataset.once().labelled(), pool=pool, root=root)
    if not len(dataset):
        what = "text" if task.kind == "pairs" else "label"
        raise ValueError(f"{root}: none of the images of {task.title} has a {what}")
    _check_readable(dataset, root)
    return task, dataset


def _root(task: Task, given: places.Place) -> tuple[places.Place, list[str]]:
    """The folder that holds what the task names: the given one, or the only one in it that does.

    Ids are paths below that folder, so that they are the same either way.

    Raises:
        ValueError: several folders do.
    """
    fits = functools.partial(_FITS[task.data["adapter"]], task, task.layout)
    if fits(given):
        return given, []
    names = sorted(places.visible(given))
    inside = [name for name in names if (given / name).is_dir() and fits(given / name)]
    if len(inside) > 1:
        raise ValueError(
            f"{given}: {task.title} is in several folders: {', '.join(inside)}; pass one of them"
        )
    if not inside:
        return given, []  # the adapter says what is missing
    note = f"The data was read from {inside[0]}/, the only folder below --data that fits."
    warnings.warn(f"{given}: {note}", stacklevel=3)
    return given / inside[0], [note]


def _searches(layout: Any) -> bool:
    """Whether images are found by a pattern or in folders, so that one may have several files."""
    if isinstance(layout, CsvData):
        return bool(layout.images.find)
    return isinstance(layout, FolderData)


def texts(task: Task, dataset: Dataset) -> list[str]:
    """The text of each image for retrieval, "" where it has none, as `Task.retrieval` says.

    Raises:
        ValueError: the task has no texts.
    """
    if task.retrieval == "text" and dataset.texts is not None:
        return list(dataset.texts)
    if task.retrieval != "prompts":
        raise ValueError(f"task {task.name} has no texts for retrieval")
    prompts = [next(iter(c.present), "") for c in task.classes]
    shown = dataset.labels == 1
    numbers = np.where(shown.any(axis=1), shown.argmax(axis=1), -1)  # -1 is the text of none
    return [[*prompts, ""][number] for number in numbers]


def _check_readable(dataset: Dataset, root: places.Place) -> None:
    """Raises ValueError early if no image can be read, as when all are DICOM without pydicom."""
    reasons = []
    for source in dataset.sources[:3]:
        try:
            sources.read(source, rules=Rules(volume="percentile"))  # which any values allow
            return
        except facts.UnreadableImage as error:
            reasons.append(str(error))
    raise ValueError(f"{root}: the first images cannot be read: {reasons[0]}")
