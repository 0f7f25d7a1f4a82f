"""The adapter "folders": a folder of images per class."""

import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from medsiglip_jax.data.labels import Policy
from medsiglip_jax.data.listing import File, expand
from medsiglip_jax.evaluate.data import copies
from medsiglip_jax.evaluate.data.dataset import Dataset, where_to_get
from medsiglip_jax.evaluate.data.images import below, stem
from medsiglip_jax.evaluate.data.layout import FolderData
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files.places import Place
from medsiglip_jax.files.threads import Step, watched
from medsiglip_jax.preprocess.names import escaped


def read(task: Task, layout: FolderData, root: Place, policy: Policy, prefer: str = "") -> Dataset:
    """Lists the images of every class. Files that differ in their suffix only are copies.

    Raises:
        FileNotFoundError: folders of classes are missing, all in one message.
        Stalled: a disk does not answer, see `threads.watched`.
        ValueError: an image has several files and `prefer` does not choose one.
    """
    top, values, listed, unused = watched(
        lambda on_step: _list(task, layout, root, on_step), f"the list of images in {root}"
    )
    files = [(file.path, i) for file, i in listed if file.format == "image"]
    if not files:
        raise FileNotFoundError(f"{top}: no images in {', '.join(values)}{where_to_get(task)}")
    counts = {"other files": len(listed) - len(files)}
    files, left = _without_copies(files, root, prefer)
    counts |= {f"copies not read (--prefer {prefer})": left} if left else {}
    counts |= {"folders of no class of the task": len(unused)} if unused else {}
    labels = np.eye(len(values), dtype=np.float32)[[i for _, i in files]]
    ids = [escaped(path.removeprefix(f"{str(root).rstrip('/')}/")) for path, _ in files]
    classes = tuple(map(escaped, values))
    return Dataset(ids, [path for path, _ in files], labels, classes, counts=counts)


def _list(
    task: Task, layout: FolderData, root: Place, on_step: Step
) -> tuple[Place, tuple[str, ...], list[tuple[File, int]], list[str]]:
    """The folder of the classes, their names, the files of each with the class's number, and the
    folders beside them, which are not read."""
    wanted = [c.value for c in task.classes]
    top = next(_tops(task, layout, root), root / layout.root[0])
    folders = sorted(p.name for p in top.iterdir() if p.is_dir()) if top.is_dir() else []
    values = tuple(wanted or folders)
    lacking = [name for name in values if name not in folders]
    if lacking or not values:
        raise FileNotFoundError(
            f"{top}: no folders of the classes {', '.join(lacking) or 'at all'}; "
            f"there are {', '.join(folders) or 'none'}{where_to_get(task)}"
        )
    listed: list[tuple[File, int]] = []
    for i, name in enumerate(values):
        folder = root / below(root, top / name)
        files = itertools.chain.from_iterable(expand([folder], layout.all_files, on_step))
        listed += ((file, i) for file in files)
    unused = [name for name in folders if name not in values and not name.startswith(".")]
    return top, values, listed, unused


def fits(task: Task, layout: FolderData, root: Place) -> bool:
    """Whether a folder has folders of classes, as far as the task says what those are."""
    return not task.classes or any(_tops(task, layout, root))


def _tops(task: Task, layout: FolderData, root: Place) -> Iterator[Place]:
    """The folders that have a folder of some class."""
    for top in (root / name for name in layout.root):
        if any((top / c.value).is_dir() for c in task.classes):
            yield top


def _without_copies(
    files: list[tuple[str, int]], root: Place, prefer: str
) -> tuple[list[tuple[str, int]], int]:
    """The files without copies of an image, in another format beside it; and how many those are."""
    images = defaultdict(list)
    for path, _ in files:
        folder, _, name = path.rpartition("/")
        images[folder, stem(name)].append(path)
    several = [paths for paths in images.values() if len(paths) > 1]
    top = f"{str(root).rstrip('/')}/"
    names = [[path.removeprefix(top) for path in paths] for paths in several]
    chosen = {f"{top}{name}" for name in copies.choose(names, root, prefer)}
    left = {path for paths in several for path in paths} - chosen
    return [(path, i) for path, i in files if path not in left], len(left)
