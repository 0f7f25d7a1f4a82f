"""Tasks: which question is asked of which images, by which prompts, and what was published.

A task is a file, NAME.toml. Those in `library/` come with the package.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from medsiglip_jax.evaluate import zero_shot
from medsiglip_jax.evaluate.data import layout
from medsiglip_jax.evaluate.data.layout import RegionFile
from medsiglip_jax.evaluate.task_parts import (
    Class,
    Published,
    Reading,
    data_problems,
    figure_problems,
    reading_problems,
    region_problems,
)
from medsiglip_jax.files import settings
from medsiglip_jax.files.documents import parse as parse_json
from medsiglip_jax.files.documents import parse_toml
from medsiglip_jax.files.failures import explained
from medsiglip_jax.files.json_text import to_hash

_RETRIEVAL = ("text", "prompts")
_PROMPTS = ("present", "absent")


def _empty_or(choices: Sequence[str]) -> settings.Check:
    return settings.Check(("", *choices).__contains__, f"one of {', '.join(choices)}")


@dataclass(frozen=True)
class Task:
    """One evaluation.

    Attributes:
        name: of the file, without .toml.
        title: one line.
        data: what `data.layout` describes; its `adapter` names one of `layout.LAYOUTS`.
        kind: "multi_label" (an image may show several classes), "multi_class" (exactly one), or
            "pairs" (images with texts and without classes, for retrieval only).
        score: a rule of `zero_shot.RULES`; "" for pairs.
        parts: "train" and "validation", if the data set has them -> settings that replace those of
            `data`, key by key; an empty value or false removes the key.
        regions: what `data.layout` describes, of a file that says where classes lie in images of
            `data`; its `kind` names one of `layout.REGIONS`.
        retrieval: which texts are searched for with an image: "text" (the column `data.text`),
            "prompts" (the first prompt of the image's class), or "" (no retrieval).
        classes: in the order of tables; empty where the data says what they are.
        source: where to get the data.
        access: on what terms.
        trained_on: whether MedSigLIP was trained on it.
        prompts_source: who wrote the prompts.
        template: "present" and "absent" prompts of classes that bring none, {} being the name.
        readings: other prompts that the publication allows.
        published: figures to compare with.
        means: name -> classes, of means over some of them.
        ordinal_from: where classes are grades: the first grade of the upper group; 0 is none.
        notes: whatever a reader of the result must know.

    Raises:
        ValueError: all that does not fit together.
    """

    name: str
    title: str
    data: Mapping[str, Any]
    kind: Annotated[str, settings.one_of(("multi_label", "multi_class", "pairs"))]
    score: Annotated[str, _empty_or(tuple(zero_shot.RULES))] = ""
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    regions: Mapping[str, Any] = field(default_factory=dict)
    retrieval: Annotated[str, _empty_or(_RETRIEVAL)] = ""
    classes: tuple[Class, ...] = ()
    source: str = ""
    access: str = ""
    trained_on: str = ""
    prompts_source: str = ""
    template: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    readings: Mapping[str, Reading] = field(default_factory=dict)
    published: Published | None = None
    means: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ordinal_from: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind == "pairs":
            object.__setattr__(self, "retrieval", "text")
        problems = [*data_problems(self.data, self.parts)]
        if self.regions:
            problems += region_problems(self.regions, self.classes)
        problems += [*_kind_problems(self), *_name_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Its content for JSON, which `from_dict` reads back."""
        return asdict(self)

    @functools.cached_property
    def layout(self) -> Any:
        """How the data lies on disk, as its adapter takes it."""
        return layout.build(self.data)

    @functools.cached_property
    def region_file(self) -> RegionFile | None:
        """The file of regions; None where the task has none."""
        return layout.build_regions(self.regions) if self.regions else None

    @property
    def figures(self) -> Published:
        """What was published; empty if nothing was."""
        return self.published or Published("")

    @property
    def exclusive(self) -> bool:
        """Whether an image shows exactly one class."""
        return self.kind == "multi_class"

    def part(self, name: str) -> "Task":
        """The same task on another part of the data set.

        Raises:
            ValueError: the data set has no part of that name.
        """
        data = {**self.data, **self._named("part", self.parts, name)}
        data = {key: value for key, value in data.items() if value}
        return replace(self, title=f"{self.title}, part {name}", data=data, parts={})

    def with_classes(self, names: Sequence[str]) -> "Task":
        """The classes that the data turned out to have, with prompts of the template."""
        return _fill_template(replace(self, classes=tuple(map(Class, names))))

    def by(self, columns: Sequence[str]) -> "Task":
        """The same with these columns of its tables as attributes, for subgroups.

        Raises:
            ValueError: the data has no tables, or an attribute cannot have such a name.
        """
        if columns and self.data["adapter"] != "csv":
            raise ValueError(f"task {self.name} has no table with columns {', '.join(columns)}")
        attributes = {**dict.fromkeys(columns), **self.data.get("attributes", {})}
        named = {name: column or name for name, column in attributes.items()}
        return replace(self, data={**self.data, "attributes": named}) if columns else self

    def with_reading(self, name: str) -> "Task":
        """The prompts read another way.

        Raises:
            ValueError: no reading of that name.
        """
        reading = self._named("reading", self.readings, name)
        return self._worded(lambda c, key: getattr(reading, key).get(c.name, getattr(c, key)))

    def with_prompts(self, path: str | os.PathLike) -> "Task":
        """Prompts of a .toml or .json file: class = [prompts], or class = {present, absent}.

        Raises:
            ValueError: a class that the task does not have, or no list of strings.
        """
        given = _load(Path(path)).items()
        tables = {name: v if isinstance(v, dict) else {"present": v} for name, v in given}
        problems = [
            f"{name}: {key}: expected {' or '.join(_PROMPTS)}, a list of strings"
            for name, table in tables.items()
            for key, value in table.items()
            if key not in _PROMPTS or not _strings(value)
        ]
        if unknown := sorted(tables.keys() - {c.name for c in self.classes}):
            problems.insert(0, f"no classes of task {self.name}: {', '.join(unknown)}")
        if problems:
            raise ValueError(f"{path}: {'; '.join(problems)}")
        changed = self._worded(lambda c, key: tables.get(c.name, {}).get(key, getattr(c, key)))
        return replace(changed, prompts_source=f"given, {Path(path).name}", readings={})

    def prompts_sha256(self) -> str:
        """Identity of the prompts and their order."""
        prompts = [(c.name, c.present, c.absent) for c in self.classes]
        return hashlib.sha256(to_hash(prompts)).hexdigest()

    def check_prompts(self) -> None:
        """Raises ValueError with all classes that lack the prompts that the score rule needs."""
        if not self.classes or self.score == zero_shot.CLASSIFIER:  # pairs, or no prompts
            return
        needed = _PROMPTS if zero_shot.RULES[self.score].pairs else _PROMPTS[:1]
        lacking = [c.name for c in self.classes if not all(getattr(c, p) for p in needed)]
        if lacking:
            raise ValueError(
                f"task {self.name} has no {' and '.join(needed)} prompts for "
                f"{', '.join(lacking)}; give them with --prompts FILE (class = [prompts])"
            )

    def _worded(self, prompts: Callable[[Class, str], Sequence[str]]) -> "Task":
        """The same classes with other prompts: (class, "present" or "absent") -> prompts."""
        changed = [replace(c, **{k: tuple(prompts(c, k)) for k in _PROMPTS}) for c in self.classes]
        return replace(self, classes=tuple(changed))

    def _named(self, what: str, table: Mapping[str, Any], name: str) -> Any:
        if name not in table:
            names = ", ".join(table) or "none"
            raise ValueError(f"task {self.name} has no {what} {name!r}; there are: {names}")
        return table[name]


# ---------------------------------------------------------------------------------------- reading


def names() -> list[str]:
    """The tasks that come with the package."""
    files = (path.name for path in _library().iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def library() -> Iterator[Task]:
    """Reads the tasks that come with the package, in the order of their names."""
    return map(read, names())


def read(task: str) -> Task:
    """Reads a task of the package, by name, or one of your own, a .toml or .json file.

    Raises:
        FileNotFoundError: neither.
        ValueError: all that is wrong with the file.
    """
    bundled = _library() / f"{task}.toml"
    if Path(task).name == task and bundled.is_file():
        return parse(task, parse_toml(bundled.read_text(encoding="utf-8")))
    path = Path(task)
    if not path.is_file():
        raise FileNotFoundError(
            f"{task}: neither a file nor a task; tasks are {', '.join(names())}"
        )
    content = _load(path)
    with explained(path, "not a task"):
        return parse(path.stem, content)


def parse(name: str, content: Mapping[str, Any]) -> Task:
    """Makes a task of the content of its file.

    Raises:
        ValueError: all that is wrong with it.
    """
    try:
        return _fill_template(settings.build(Task, content, "the file", name=name))
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from None


def from_dict(content: Mapping[str, Any]) -> Task:
    """Reads what `Task.to_dict` wrote, and JSON kept."""
    return settings.build(Task, content)


def _library() -> Any:
    return resources.files(__name__.rpartition(".")[0]) / "library"


def _load(path: Path) -> dict[str, Any]:
    with explained(path, "not readable as TOML (or .json as JSON)"):
        text = path.read_text(encoding="utf-8")
        return parse_json(text) if path.suffix == ".json" else parse_toml(text)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)


def _fill_template(task: Task) -> Task:
    """Gives the prompts of the template to classes that bring none."""

    def prompts(c: Class, key: str) -> Sequence[str]:
        made = [text.replace("{}", c.name) for text in task.template.get(key, ())]
        return getattr(c, key) or made

    return task._worded(prompts)


# --------------------------------------------------------------------------------------- problems


def _kind_problems(task: Task) -> Iterator[str]:
    """What does not fit the kind of the task."""
    if task.retrieval == "text" and not task.data.get("text"):
        yield "retrieval by text needs data.text, the column of texts"
    if task.retrieval == "prompts" and not task.exclusive:
        yield "retrieval by prompts needs kind 'multi_class', one class per image"
    if task.kind == "pairs":
        of_classes = (
            "classes", "template", "score", "readings", "means", "ordinal_from", "regions",
        )  # fmt: skip
        if unused := [key for key in of_classes if getattr(task, key)]:
            yield f"kind is 'pairs', which has no {', '.join(unused)}"
        return
    if not task.score:
        yield "lacks score"
    yield from figure_problems(task.figures, task.exclusive)
    if not task.classes and not task.template:
        yield "neither classes nor a template for those that the data holds"


def _name_problems(task: Task) -> Iterator[str]:
    """Names of classes that are given twice, or that no class has."""
    known = [c.name for c in task.classes]
    if twice := sorted({name for name in known if known.count(name) > 1}):
        yield f"classes given twice: {', '.join(twice)}"
    named: dict[str, Sequence[str] | Mapping] = {
        f"means.{name}": classes for name, classes in task.means.items()
    }
    yield from reading_problems(task.readings)
    for name, reading in task.readings.items():
        named |= {f"readings.{name}.{key}": getattr(reading, key) for key in _PROMPTS}
    if task.published:
        named |= {f"published.{key}": getattr(task.published, key) for key in ("auc", "probe_auc")}
    for where, used in named.items():
        if unknown := sorted(set(used) - set(known)):
            yield f"{where} names no classes: {', '.join(unknown)}"
