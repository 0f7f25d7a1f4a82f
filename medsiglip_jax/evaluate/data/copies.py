"""One image in several files: which of them is read, and which files hold the same bytes."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from medsiglip_jax.files import places
from medsiglip_jax.files.places import Place
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.facts import UnreadableImage
from medsiglip_jax.preprocess.names import parse

LARGEST = "largest"
_SHOWN = 3  # images in a message
_TAIL = 4096  # bytes at the end of a file, which tell most files of one size apart


def check_rule(prefer: str, root: Place) -> None:
    """Raises ValueError unless a rule is "largest", a folder below `root`, or ""."""
    if prefer not in ("", LARGEST) and not places.below(root, prefer).is_dir():
        raise ValueError(f"--prefer {prefer}: neither {LARGEST!r} nor a folder below {root}")


def choose(several: Sequence[Sequence[str]], root: Place, prefer: str = "") -> list[str]:
    """One of the files of each image.

    Args:
        several: the files of each image, two or more, as paths below the folder.
        root: the folder.
        prefer: "largest" is the file with the most pixels (of files with the same bytes the first);
            else a folder below `root`, whose file is taken; "" is no rule.

    Raises:
        ValueError: images for which the rule does not name one file.
    """
    preferred = [_preferred(names, root, prefer) for names in several]
    pairs = zip(several, preferred, strict=True)
    if undecided := [names for names, best in pairs if len(best) != 1]:
        shown = "; ".join(" and ".join(names) for names in undecided[:_SHOWN])
        more = "; …" if len(undecided) > _SHOWN else ""
        why = f" and --prefer {prefer} does not choose between them" if prefer else ""
        raise ValueError(
            f"{root}: {len(undecided):,} images have several files{why}, which would be counted "
            f"as several images: {shown}{more}. --prefer {LARGEST} takes the file with the most "
            "pixels, --prefer FOLDER the one in that folder below --data; if they are no copies, "
            "the task needs images.several"
        )
    return [best[0] for best in preferred]


def _preferred(names: Sequence[str], root: Place, prefer: str) -> list[str]:
    """The files that the rule allows."""
    if not prefer:
        return list(names)
    if prefer != LARGEST:
        folder = places.below(root, prefer)
        return [name for name in names if str(root / name).startswith(f"{folder}/")]
    sizes = {name: _pixels(str(root / name)) for name in names}
    best = [name for name, size in sizes.items() if size == max(sizes.values())]
    groups = identical([str(root / name) for name in best])
    return best[:1] if groups and len(groups[0]) == len(best) else best


def _pixels(source: str) -> int:
    """Width times height; 0 of what cannot be read."""
    try:
        width, height = sources.size(source)
    except UnreadableImage:
        return 0
    return width * height


def identical(paths: Iterable[str]) -> list[list[str]]:
    """Groups of two or more of these files that hold the same bytes, in their order.

    Files are read only if others have their size and their last bytes. Remote files and parts of
    files are left out.
    """
    groups = [[path for path in dict.fromkeys(paths) if _is_file(path)]]
    for key in (_size, _tail, _digest):
        groups = [group for several in groups for group in _by(key, several)]
    return groups


def _is_file(path: str) -> bool:
    file, part = parse(path)
    return part is None and "://" not in path and os.path.isfile(file)


def _by(key: Callable[[str], Hashable], paths: Sequence[str]) -> Iterator[list[str]]:
    """The paths of which two or more have the same key."""
    groups = defaultdict(list)
    for path in paths:
        groups[key(parse(path)[0])].append(path)
    return (group for group in groups.values() if len(group) > 1)


def _size(file: str) -> int:
    return os.path.getsize(file)


def _tail(file: str) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(max(0, os.path.getsize(file) - _TAIL))
        return hashlib.sha256(stream.read()).digest()


def _digest(file: str) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()  # pyright: ignore[reportArgumentType]
