"""Which image files the rows of a table name, and which of those exist."""

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from medsiglip_jax.data.listing import IMAGE_SUFFIXES, each, waiting
from medsiglip_jax.evaluate.data import copies
from medsiglip_jax.evaluate.data.dataset import where_to_get
from medsiglip_jax.evaluate.data.layout import ImageFiles
from medsiglip_jax.evaluate.tasks import Task
from medsiglip_jax.files import places
from medsiglip_jax.files.places import Place
from medsiglip_jax.files.threads import Step, watched
from medsiglip_jax.preprocess.names import escaped, parse

TableRow = Mapping[str, str]


@dataclass
class FoundImages:
    """Which images belong to which rows.

    Attributes:
        pairs: (number of a row, path of an image below the folder); a row may have several images,
            and an image several rows.
        missing: images that were expected and do not exist.
        counts: of images that are neither.
    """

    pairs: list[tuple[int, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def find(
    task: Task, layout: ImageFiles, root: Place, rows: Sequence[TableRow], prefer: str = ""
) -> FoundImages:
    """Finds the images of rows, as the layout says.

    Args:
        task: for messages.
        layout: see `ImageFiles`.
        root: the folder of the data.
        rows: the rows of the table.
        prefer: which of several files of one image is taken, see `copies.choose`.

    Raises:
        FileNotFoundError: none exists.
        Stalled: a disk does not answer, see `threads.watched`.
        ValueError: images have several files, and the rule does not choose one.
    """
    look = functools.partial(_search, prefer=prefer) if layout.find else _look_up
    images = watched(
        lambda on_step: look(layout, root, rows, on_step), f"the list of images in {root}"
    )
    if not images.pairs:
        raise FileNotFoundError(
            f"{root}: none of the {len(images.missing)} images of {task.title} exists; expected "
            f"{', '.join(images.missing[:3])}, …{where_to_get(task)}"
        )
    return images


def stem(name: str) -> str:
    """A file name in lower case, without folders and without the suffix of an image."""
    path = PurePosixPath(name)
    return (path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name).lower()


def below(root: Place, path: Place) -> str:
    """The path below a folder, with slashes."""
    if isinstance(path, Path):
        return path.relative_to(str(root)).as_posix()
    return str(path).removeprefix(str(root)).lstrip("/")


def _look_up(
    layout: ImageFiles, root: Place, rows: Sequence[TableRow], on_step: Step
) -> FoundImages:
    """Images at the paths that the rows name."""
    images, absent, others = FoundImages(), 0, 0
    for i, row in enumerate(each(rows, on_step)):
        for alternatives in _paths(row, layout, root):
            existing = [name for name in alternatives if _exists(root, name)]
            if existing:
                images.pairs.append((i, existing[0]))
                others += len(existing) - 1 if isinstance(root, Path) else 0
            elif set(layout.known_missing).isdisjoint(alternatives):
                images.missing.append(" or ".join(alternatives))
            else:
                absent += 1
    if layout.known_missing:
        images.counts["missing in the data set itself"] = absent
    images.counts |= {"copies not read (the task's first path is)": others} if others else {}
    return images


def _paths(row: TableRow, layout: ImageFiles, root: Place) -> Iterator[list[str]]:
    """The paths where each image of a row may be; those that begin with the name of the folder
    itself, also without it."""
    top = f"{root.absolute().name}/"
    images = [[template.format_map(row) for template in layout.path]] if layout.path else []
    images += [[name] for template in layout.each if (name := template.format_map(row))]
    for names in images:
        yield [*names, *(name.removeprefix(top) for name in names if name.startswith(top))]


def _exists(root: Place, name: str) -> bool:
    """Remote files are assumed to exist: asking would take a request for each; `embed` will say.

    Raises:
        ValueError: the path leads out of the folder.
    """
    place = places.below(root, name)
    return not isinstance(root, Path) or Path(parse(str(place))[0]).is_file()


def _search(
    layout: ImageFiles, root: Place, rows: Sequence[TableRow], on_step: Step, prefer: str
) -> FoundImages:
    """Images that a glob finds, matched with the rows."""
    files, unmatched = _index(layout, root, on_step)
    on_step()
    keys, images = [_key(row, layout) for row in rows], FoundImages()
    used = {key: files[key] for key in dict.fromkeys(keys) if key in files}
    unused = sum(map(len, files.values())) - sum(map(len, used.values()))
    images.counts = {"images without a label": unused + unmatched}
    chosen = _without_copies(used, layout, root, prefer)
    if left := sum(map(len, used.values())) - sum(map(len, chosen.values())):
        images.counts[f"copies not read (--prefer {prefer})"] = left
    for i, key in enumerate(keys):
        images.pairs += [(i, name) for name in chosen.get(key, ())]
        if key not in files:
            images.missing.append(f"{layout.find} for {'/'.join(key)}")
    return images


def _without_copies(
    files: Mapping[tuple, list[str]], layout: ImageFiles, root: Place, prefer: str
) -> dict[tuple, list[str]]:
    """The files of each row; of several for one image the one that is preferred."""
    images = defaultdict(list)
    for key, names in files.items():
        for name in names:
            images[key, stem(name) if layout.several else ""].append(name)
    several = {image: names for image, names in images.items() if len(names) > 1}
    preferred = copies.choose([*several.values()], root, prefer)
    images |= {image: [name] for image, name in zip(several, preferred, strict=True)}
    chosen = defaultdict(list)
    for (key, _), names in images.items():
        chosen[key] += names
    return chosen


def _index(layout: ImageFiles, root: Place, on_step: Step) -> tuple[dict[tuple, list[str]], int]:
    """Files by key, and how many the pattern does not match; hidden files are none."""
    files, unmatched = defaultdict(list), 0
    with waiting(str(root), on_step):
        paths = sorted(each(root.glob(layout.find), on_step), key=str)
    for path in paths:
        name = escaped(below(root, path))
        if path.suffix.lower() not in IMAGE_SUFFIXES or "/." in f"/{name}":
            continue
        if layout.name or not layout.parse:
            files[(stem(name),)].append(name)
        elif match := re.search(layout.parse, name):
            files[tuple(match[column] for column in layout.on)].append(name)
        else:
            unmatched += 1
    return files, unmatched


def _key(row: TableRow, layout: ImageFiles) -> tuple[str, ...]:
    if layout.name:
        return (stem(layout.name.format_map(row)),)
    return tuple(row[column] for column in layout.on)
