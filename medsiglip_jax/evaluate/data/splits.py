"""Training, validation and test images: those of the data set, or drawn by patient."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from medsiglip_jax.data.examples import Examples, split_by_group
from medsiglip_jax.data.labels import Policy
from medsiglip_jax.evaluate.data import copies, reading
from medsiglip_jax.evaluate.data.dataset import Dataset
from medsiglip_jax.evaluate.data.leaks import Leak, refuse
from medsiglip_jax.evaluate.task_parts import PARTS
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files import places

_FIFTH = 0.2  # of the groups: 60 % train, 20 % validation, 20 % test


@dataclass(frozen=True, eq=False)
class Splits:
    """What a task is evaluated on, and what a probe and thresholds are fitted to.

    Attributes:
        whole: all test images, which are scored by prompts.
        test: test images for what is fitted; a fifth of `whole` where the splits had to be drawn
            from it, else the same.
        validation: images to choose on, if they were wanted.
        train: images to fit to, if they were wanted.
        origin: where the splits come from, for reports: "of the data set", or what was drawn.
        leaks: what splits share, and images that the test has several times, as far as files tell.
    """

    whole: Dataset
    test: Dataset
    validation: Dataset | None
    train: Dataset | None
    origin: str
    leaks: Sequence[Leak] = ()

    @property
    def drawn(self) -> bool:
        """Whether the splits were drawn from the test images."""
        return list(self.test.ids) != list(self.whole.ids)

    @property
    def others(self) -> dict[str, Dataset]:
        """The splits beside the test; empty where nothing is learned."""
        named = {"train": self.train, "validation": self.validation}
        return {name: split for name, split in named.items() if split is not None}

    def images(self) -> int:
        """How many images have to be embedded: splits of one part are embedded together."""
        pools = {split.part: len(split.pool) for split in (self.whole, *self.others.values())}
        return sum(pools.values())


def read(
    task: Task,
    folder: places.Given,
    policy: Policy = Policy(),
    allow_missing: bool = False,
    seed: int = 0,
    wanted: Sequence[str] = PARTS,
    prefer: str = "",
    allow_leaks: bool = False,
    part_policies: Mapping[str, Policy] = MappingProxyType({}),
) -> tuple[Task, Splits]:
    """Reads the data of a task, and what there is to fit to and to choose on.

    Splits are the parts of the data set. If it has only one of "train" and "validation", the other
    is drawn from it: a fifth of the groups is for validation. If it has neither, all three are
    drawn from the test images.

    Args:
        task: what to read.
        folder: the folder of the data set.
        policy: what labels mean that are neither 0 nor 1.
        allow_missing: go on without what is missing; it is counted either way.
        seed: the seed of splits that have to be drawn.
        wanted: "train", "validation" or both.
        prefer: which of several files of one image is read, see `copies.choose`.
        allow_leaks: go on with splits that are not disjoint.
        part_policies: the policies of parts that have another than `policy`; what is drawn from a
            part has the labels of that part.

    Returns:
        The task with the classes that the data has, and its splits; those not wanted are None.

    Raises:
        FileNotFoundError: see `reading.read`; of any part.
        ValueError: see `reading.read`; a part has other classes than the test, an image, a copy of
            it or a group is in two splits, there are too few groups to draw, or a part that has a
            policy is not read.
    """
    plain, wanted = task, [name for name in PARTS if name in wanted]
    official = [n for n in wanted if n in plain.parts] or [*plain.parts] if wanted else []
    _check_policies(part_policies, official, plain)
    policies, choices = {"test": policy, **part_policies}, (allow_missing, prefer)
    task, whole = reading.read(plain, folder, policies["test"], *choices)
    test, origin, twice = whole, "of the data set", _copies_within(whole)
    if not wanted:
        return task, Splits(whole, test, None, None, origin, twice)
    parts = {
        n: _read_part(plain, task, n, folder, policies.get(n, policy), *choices) for n in official
    }
    # EyePACS is evaluated on its training part where there are no labels of the test part.
    parts = {name: part for name, part in parts.items() if list(part.ids) != list(test.ids)}
    lacking = [name for name in wanted if name not in parts]
    if lacking and not parts:
        origin = f"all {_drawn_by(task, test)}, seed {seed}"
        parts = draw(test, seed)
        test = parts.pop("test")
    elif lacking:
        ((name, part),) = parts.items()
        origin = f"{lacking[0]} {_drawn_by(task, part)} from {name}, seed {seed}"
        rest, drawn = _draw_groups(part, seed)
        parts = {"train": rest, "validation": drawn}
    leaks = check_disjoint({**parts, "test": test}, allow_leaks)
    parts = {name: part for name, part in parts.items() if name in wanted}
    validation, train = parts.get("validation"), parts.get("train")
    return task, Splits(whole, test, validation, train, origin, [*leaks, *twice])


def _check_policies(policies: Mapping[str, Policy], read: Sequence[str], task: Task) -> None:
    """Raises ValueError if a part has a policy and is not read, so that it has no effect."""
    if unread := [name for name in policies if name not in (*read, "test")]:
        raise ValueError(
            f"labels of {', '.join(unread)} are given a meaning, but of task {task.name} only "
            f"{' and '.join((*read, 'test'))} are read (--learn says what is needed, and what is "
            "drawn from a part has its labels)"
        )


def draw(dataset: Dataset, seed: int) -> dict[str, Dataset]:
    """Draws "train", "validation" and "test", 60, 20 and 20 % of the groups.

    An image without a group is a group of its own. The split of a group depends on its name and
    the seed, hardly on the other groups, and not on their order or size.

    Raises:
        ValueError: there are fewer than three groups.
    """
    if (count := len(set(_groups(dataset)))) < 3:
        raise ValueError(
            f"{len(dataset):,} images are of {count} groups (patients); three are needed to draw a "
            "training, a validation and a test part"
        )
    rest, test = _draw_groups(dataset, seed)
    train, validation = _draw_groups(rest, seed, 1 / 4)
    return {"train": train, "validation": validation, "test": test}


def check_disjoint(splits: Mapping[str, Dataset], allow_leaks: bool = False) -> list[Leak]:
    """Groups, images and files with the same bytes that are in two splits.

    Raises:
        ValueError: there are some and they are not allowed: which splits share how many, and the
            first few.
    """
    copied = copies.identical(itertools.chain.from_iterable(s.sources for s in splits.values()))
    pairs = itertools.combinations(splits.items(), 2)
    leaks = [leak for two in pairs for leak in _shared(*two, copied) if leak.found]
    refuse(leaks, allow_leaks)
    return leaks


def _shared(
    first: tuple[str, Dataset], second: tuple[str, Dataset], copied: Sequence[Sequence[str]]
) -> Iterator[Leak]:
    (one, left), (other, right) = first, second
    parts = one, other
    for what, columns in (
        ("groups (patients)", (left.groups, right.groups)),
        ("images", (left.sources, right.sources)),
    ):
        both = sorted(set(columns[0] or ()) & set(columns[1] or ()) - {""})
        yield Leak(what, parts, [(name,) for name in both])
    yield Leak("files with the same bytes", parts, _same_bytes(left, right, copied))


def _same_bytes(
    left: Dataset, right: Dataset, copied: Sequence[Sequence[str]]
) -> list[tuple[str, str]]:
    """The first file of each group of files with the same bytes in either data set, by id."""
    lefts, rights = (dict(zip(d.sources, d.ids, strict=True)) for d in (left, right))
    pairs = []
    for group in copied:
        ends = [[path for path in group if path in side] for side in (lefts, rights)]
        if all(ends) and set(ends[0]).isdisjoint(ends[1]):
            pairs.append((lefts[ends[0][0]], rights[ends[1][0]]))
    return pairs


def _copies_within(dataset: Dataset) -> list[Leak]:
    """Files of the test with the same bytes as another of its files."""
    ids = dict(zip(dataset.sources, dataset.ids, strict=True))
    groups = [[ids[path] for path in group] for group in copies.identical(ids)]
    pairs = [(names[0], other) for names in groups for other in names[1:]]
    return [Leak("files with the same bytes", ("test", "test"), pairs)] if pairs else []


def _read_part(
    plain: Task, task: Task, name: str, folder: places.Given,
    policy: Policy, allow_missing: bool, prefer: str,
) -> Dataset:  # fmt: skip
    """Reads a part; where the data says what the classes are, it has to say the same again."""
    _, part = reading.read(plain.part(name), folder, policy, allow_missing, prefer)
    values = [c.value for c in task.classes]
    if different := sorted(set(values) ^ set(part.values)):
        raise ValueError(
            f"task {task.name}: part {name} and the test images have different classes; not in "
            f"both: {', '.join(different[:5])}{', …' if len(different) > 5 else ''}"
        )
    columns = [part.values.index(value) for value in values]
    return replace(part, labels=part.labels[:, columns], values=tuple(values), part=name)


def _groups(dataset: Dataset) -> list[str]:
    groups = dataset.groups or [""] * len(dataset)
    return [group or f"image {name}" for group, name in zip(groups, dataset.ids, strict=True)]


def _draw_groups(dataset: Dataset, seed: int, share: float = _FIFTH) -> tuple[Dataset, Dataset]:
    """The rest, and the share of the groups that is drawn."""
    groups = np.array(_groups(dataset))
    _, drawn = split_by_group(Examples(np.unique(groups).tolist()), share, seed)
    inside = np.isin(groups, list(drawn.images))
    return dataset.select(np.flatnonzero(~inside)), dataset.select(np.flatnonzero(inside))


def _drawn_by(task: Task, dataset: Dataset) -> str:
    return f"drawn by {'image' if dataset.groups is None else task.layout.groups[0]}"
