"""The adapter "folders": a folder of images per class."""

import itertools
from collections.abc import Iterator

import numpy as np

from medsiglip_jax.data.labels import Policy
from medsiglip_jax.data.listing import File, expand
from medsiglip_jax.evaluate.data.dataset import Dataset, where_to_get
from medsiglip_jax.evaluate.data.images import below
from medsiglip_jax.evaluate.data.layout import FolderData
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files.places import Place
from medsiglip_jax.preprocess.names import escaped


def read(task: Task, layout: FolderData, root: Place, policy: Policy) -> Dataset:
    """Lists the images of every class.

    Raises:
        FileNotFoundError: folders of classes are missing, all in one message.
    """
    wanted = [c.value for c in task.classes]
    tops = [root / name for name in layout.root]
    top = next((t for t in tops if any((t / name).is_dir() for name in wanted)), tops[0])
    folders = sorted(p.name for p in top.iterdir() if p.is_dir()) if top.is_dir() else []
    values = tuple(wanted or folders)
    lacking = [name for name in values if name not in folders]
    if lacking or not values:
        raise FileNotFoundError(
            f"{top}: no folders of the classes {', '.join(lacking) or 'at all'}; "
            f"there are {', '.join(folders) or 'none'}{where_to_get(task)}"
        )
    names = [(below(root, top / name), i) for i, name in enumerate(values)]
    listed = [(file, i) for name, i in names for file in _listed(root / name, layout.all_files)]
    files = [(file.path, i) for file, i in listed if file.format == "image"]
    if not files:
        raise FileNotFoundError(f"{top}: no images in {', '.join(values)}{where_to_get(task)}")
    labels = np.eye(len(values), dtype=np.float32)[[i for _, i in files]]
    ids = [escaped(path.removeprefix(f"{str(root).rstrip('/')}/")) for path, _ in files]
    counts = {"other files": len(listed) - len(files)}
    classes = tuple(map(escaped, values))
    return Dataset(ids, [path for path, _ in files], labels, classes, counts=counts)


def _listed(folder: Place, all_files: bool) -> Iterator[File]:
    return itertools.chain.from_iterable(expand([folder], all_files))
