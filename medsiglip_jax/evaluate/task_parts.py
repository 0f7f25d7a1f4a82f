"""What a task consists of: classes, published figures, other readings of its prompts; and what is
wrong with what its file says of them, in sentences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medsiglip_jax.evaluate.data import layout
from medsiglip_jax.evaluate.options import AS_GIVEN, GridCell
from medsiglip_jax.files import places

PARTS = ("train", "validation")
FIGURES = ("accuracy", "weighted_f1")  # that may be published of tasks with one class an image


@dataclass(frozen=True)
class Class:
    """What an image may show.

    Attributes:
        name: in tables.
        value: what the data calls it: a column, a folder, a cell or a number; default `name`.
        present: prompts of images that show it.
        absent: prompts of images that do not, for score rules that compare the two.
    """

    name: str
    value: str = ""
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "value", self.value or self.name)


@dataclass(frozen=True)
class Published:
    """Published figures, to compare with.

    Attributes:
        where: the publication.
        mean: macro AUC.
        auc: class name -> AUC.
        probe_mean: macro AUC of a linear probe on the embeddings.
        probe_auc: class name -> AUC of that probe.
        accuracy: share of images whose class is named, where an image has one.
        weighted_f1: mean F1 of the classes, weighted by their images, likewise.
        others: name of another model, such as "fine-tuned" -> "accuracy" or "weighted_f1" -> its
            figure.
        images: how many images the figures are of.
        same_images: whether the images of the task are those, or others of the same kind.
        note: whatever else should be known.
    """

    where: str
    mean: float | None = None
    auc: Mapping[str, float] = field(default_factory=dict)
    probe_mean: float | None = None
    probe_auc: Mapping[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    weighted_f1: float | None = None
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    images: int | None = None
    same_images: bool = True
    note: str = ""


@dataclass(frozen=True)
class Reading:
    """Another way to read prompts that were published ambiguously; class name -> prompts."""

    about: str
    present: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# --------------------------------------------------------------------------------------- problems


def data_problems(data: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is wrong with where the images of a task and of its parts are."""
    tables = {"data": data}
    for name, changes in parts.items():
        if name not in PARTS:
            yield f"parts.{name}: expected {' or '.join(PARTS)}"
        tables[f"parts.{name}"] = {k: v for k, v in {**data, **changes}.items() if v}
    for where, table in tables.items():
        try:
            layout.build(table)
        except ValueError as error:
            yield f"{where}: {error}"


def region_problems(regions: Mapping[str, Any], classes: Sequence[Class]) -> Iterator[str]:
    """What is wrong with the file of regions, and classes of it that the task does not have."""
    try:
        file = layout.build_regions(regions)
    except ValueError as error:
        yield f"regions: {error}"
        return
    named = {*file.names.values(), *filter(None, [getattr(file, "class_", "")])}
    known = {c.name for c in classes}
    if known and (unknown := sorted(named - known)):
        yield f"regions name no classes: {', '.join(unknown)}"


def reading_problems(readings: Mapping[str, Any]) -> Iterator[str]:
    """Names that are no part of a path, or that would give two files of scores the same name."""
    files: dict[str, str] = {}
    for name in (AS_GIVEN, *readings):
        if not places.is_plain_name(name):
            yield f"readings.{name!r} names files of scores; expected {places.PLAIN_NAME}"
        file = GridCell("", name, "").file.casefold()  # as on disks of Windows and macOS
        if file in files:
            yield f"readings.{name!r} and {files[file]!r} name the same file of scores; rename one"
        files[file] = name


def figure_problems(published: Published, exclusive: bool) -> Iterator[str]:
    """Published figures of images with one class that are no shares, or of images with several."""
    shares = {key: getattr(published, key) for key in FIGURES}
    shares = {key: value for key, value in shares.items() if value is not None}
    for name, figures in published.others.items():
        if unknown := sorted(set(figures) - set(FIGURES)):
            yield f"published.others.{name}: {unknown[0]!r}; expected {' or '.join(FIGURES)}"
        shares |= {f"others.{name}.{key}": value for key, value in figures.items()}
    if shares and not exclusive:
        yield f"published.{next(iter(shares))} needs kind 'multi_class', one class per image"
    for key, value in shares.items():
        if not 0 <= value <= 1:
            yield f"published.{key} is {value:g}; expected a share from 0 to 1"
