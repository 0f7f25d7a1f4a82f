"""A task and a folder -> its images and labels, by the adapter that the task names."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medsiglip_jax.data.examples import Examples, split_by_group
from medsiglip_jax.evaluate.data import arrays, csv_tables, folders
from medsiglip_jax.evaluate.data.dataset import Dataset, Policy, where_to_get
from medsiglip_jax.evaluate.tasks import PARTS, Task
from medsiglip_jax.files import places
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.facts import UnreadableImage

READERS = {"csv": csv_tables.read, "folders": folders.read, "npz": arrays.read, "h5": arrays.read}
_FIFTH = 0.2  # of the groups, for what is drawn: 60 % train, 20 % validation, 20 % test


@dataclass(frozen=True, eq=False)
class Parts:
    """What a task is evaluated on, and what a probe and thresholds are fitted on.

    Attributes:
        whole: all images of the test, which are scored by prompts.
        test: images to be scored; where all parts had to be drawn, a fifth of what there is.
        validation: images to choose on, if they were wanted.
        train: images to fit to, if they were wanted.
        how: where the parts come from, for reports: "of the data set", or what was drawn by what.
    """

    whole: Dataset
    test: Dataset
    validation: Dataset | None
    train: Dataset | None
    how: str

    @property
    def drawn(self) -> bool:
        """Whether the parts are of the images of the test."""
        return list(self.test.ids) != list(self.whole.ids)

    @property
    def others(self) -> dict[str, Dataset]:
        """Parts beside the test; none where nothing is learned."""
        named = {"train": self.train, "validation": self.validation}
        return {name: part for name, part in named.items() if part is not None}

    def images(self) -> int:
        """How many have to be embedded: parts that were drawn from one are embedded together."""
        pools = {of.part: len(of.pool) for of in (self.whole, *self.others.values())}
        return sum(pools.values())


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
        The task with the classes that the data has, and the images with at least one label; of
        pairs, those with a text.

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
    found = found.captioned() if task.kind == "pairs" else found
    pool = dict(zip(found.ids, found.sources, strict=True))
    found = replace(found.once().labelled(), pool=pool)
    if not len(found):
        what = "text" if task.kind == "pairs" else "label"
        raise ValueError(f"{root}: none of the images of {task.title} has a {what}")
    _check_readable(found, root)
    return task, found


def read_parts(
    task: Task,
    folder: places.Given,
    policy: Policy = Policy(),
    allow_missing: bool = False,
    seed: int = 0,
    wanted: Sequence[str] = PARTS,
) -> tuple[Task, Parts]:
    """Reads the data of a task and what there is to fit and to choose on.

    Parts are those of the data set. If it has one of the two, the other is drawn from that: a fifth
    of its groups is for validation. If it has neither, all are drawn from the images of the test.

    Args:
        task: what to read.
        folder: where the data lies.
        policy: what labels that are neither 0 nor 1 mean.
        allow_missing: go on without what is missing; it is counted either way.
        seed: of draws.
        wanted: "train", "validation" or both.

    Returns:
        The task with the classes that the data has, and its parts; those not wanted are None.

    Raises:
        FileNotFoundError: as of `read`, of any part.
        ValueError: as of `read`; a part has other classes than the test; an image or a group is in
            two parts, or there are too few groups to draw.
    """
    given, wanted = task, [name for name in PARTS if name in wanted]
    task, whole = read(given, folder, policy, allow_missing)
    test = whole
    if not wanted:
        return task, Parts(whole, test, None, None, "of the data set")
    official = [name for name in wanted if name in given.parts] or given.parts
    found = {n: _read_part(given, task, n, folder, policy, allow_missing) for n in official}
    # EyePACS is evaluated on its training part where the labels of the test part are not there.
    found = {name: part for name, part in found.items() if list(part.ids) != list(test.ids)}
    lacking, how = [name for name in wanted if name not in found], "of the data set"
    if lacking and not found:
        how = f"all {_drawn(task, test)}, seed {seed}"
        found = draw_parts(test, seed)
        test = found.pop("test")
    elif lacking:
        ((name, part),) = found.items()
        how = f"{lacking[0]} {_drawn(task, part)} from {name}, seed {seed}"
        rest, drawn = _draw(part, seed)
        found = {"train": rest, "validation": drawn}
    check_disjoint({**found, "test": test})
    found = {name: part for name, part in found.items() if name in wanted}
    return task, Parts(whole, test, found.get("validation"), found.get("train"), how)


def draw_parts(found: Dataset, seed: int) -> dict[str, Dataset]:
    """Draws "train", "validation" and "test", 60, 20 and 20 % of the groups.

    An image without a group is a group of its own. The part of a group depends on its name and the
    seed, hardly on the other groups, and not on their order or size.

    Raises:
        ValueError: there are fewer than three groups.
    """
    if (count := len(set(_groups(found)))) < 3:
        raise ValueError(
            f"{len(found):,} images are of {count} groups (patients); three are needed to draw a "
            "training, a validation and a test part"
        )
    rest, test = _draw(found, seed)
    train, validation = _draw(rest, seed, 1 / 4)
    return {"train": train, "validation": validation, "test": test}


def check_disjoint(parts: Mapping[str, Dataset]) -> None:
    """Refuses parts that share an image or a group.

    Raises:
        ValueError: which parts share how many, and the first few.
    """
    problems = []
    for (one, left), (other, right) in itertools.combinations(parts.items(), 2):
        images, groups = _shared(left.sources, right.sources), _shared(left.groups, right.groups)
        for what, shared in (("groups (patients)", groups), ("images", images)):
            if shared:
                first = f"{', '.join(shared[:3])}{', …' if len(shared) > 3 else ''}"
                problems.append(f"{one} and {other} share {len(shared):,} {what}: {first}")
    if problems:
        raise ValueError(f"parts of a data set must be disjoint; {'; '.join(problems)}")


def texts(task: Task, found: Dataset) -> list[str]:
    """The text of each image to search for, "" where it has none, as `Task.retrieval` says.

    Raises:
        ValueError: the task has no texts.
    """
    if task.retrieval == "text" and found.texts is not None:
        return list(found.texts)
    if task.retrieval != "prompts":
        raise ValueError(f"task {task.name} has no texts for retrieval")
    prompts = [next(iter(c.present), "") for c in task.classes]
    shows = found.labels == 1
    numbers = np.where(shows.any(axis=1), shows.argmax(axis=1), -1)  # -1 is the text of none
    return [[*prompts, ""][number] for number in numbers]


def labels_sha256(found: Dataset) -> str:
    """Identity of which image has which labels and text."""
    digest = hashlib.sha256("\n".join(found.ids).encode())
    digest.update(np.ascontiguousarray(found.labels, "<f4").tobytes())
    digest.update("\n".join(found.texts or ()).encode())
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


def _read_part(
    given: Task, task: Task, name: str, folder: places.Given, policy: Policy, allow_missing: bool
) -> Dataset:
    """Reads a part; where the data says what the classes are, it has to say the same again."""
    _, found = read(given.part(name), folder, policy, allow_missing)
    values = [c.value for c in task.classes]
    if other := sorted(set(values) ^ set(found.values)):
        raise ValueError(
            f"task {task.name}: part {name} and the test images have different classes; not in "
            f"both: {', '.join(other[:5])}{', …' if len(other) > 5 else ''}"
        )
    columns = [found.values.index(value) for value in values]
    return replace(found, labels=found.labels[:, columns], values=tuple(values), part=name)


def _groups(found: Dataset) -> list[str]:
    groups = found.groups or [""] * len(found)
    return [group or f"image {name}" for group, name in zip(groups, found.ids, strict=True)]


def _draw(found: Dataset, seed: int, share: float = _FIFTH) -> tuple[Dataset, Dataset]:
    """The rest, and the share of the groups that is drawn."""
    groups = np.array(_groups(found))
    _, drawn = split_by_group(Examples(np.unique(groups).tolist()), share, seed)
    inside = np.isin(groups, list(drawn.images))
    return found.select(np.flatnonzero(~inside)), found.select(np.flatnonzero(inside))


def _drawn(task: Task, found: Dataset) -> str:
    return f"drawn by {'image' if found.groups is None else task.data['group']}"


def _shared(left: Sequence[str] | None, right: Sequence[str] | None) -> list[str]:
    return sorted(set(left or ()) & set(right or ()) - {""})


def _check_readable(found: Dataset, root: places.Place) -> None:
    """Says at once what else every image would be said of, later."""
    reasons = []
    for source in found.sources[:3]:
        try:
            sources.read(source, rules=Rules(volume="percentile"))  # which any values allow
            return
        except UnreadableImage as error:
            reasons.append(str(error))
    raise ValueError(f"{root}: the first images cannot be read: {reasons[0]}")
