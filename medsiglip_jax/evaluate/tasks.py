"""Tasks as data: what is asked of which images, by which prompts, and what was published."""

import dataclasses
import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from medsiglip_jax.evaluate import zero_shot

KINDS = ("multi_label", "multi_class", "pairs")
ADAPTERS = ("csv", "folders", "npz", "h5")
PARTS = ("train", "validation")
RETRIEVAL = ("", "text", "prompts")
# Columns of images.parquet beside those of attributes.
RESERVED = ("id", "group", "part")


@dataclass(frozen=True)
class Class:
    """What an image may show.

    Attributes:
        name: in tables.
        value: what the data calls it: a column, a folder, a cell or a number; default `name`.
        present: prompts of images that show it.
        absent: prompts of images that do not, where the score rule compares the two.
    """

    name: str
    value: str = ""
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "value", self.value or self.name)


@dataclass(frozen=True)
class Published:
    """Figures that a run is set beside.

    Attributes:
        where: that published them.
        mean: macro AUC.
        auc: class name -> AUC.
        images: how many there were.
        probe_mean: macro AUC of a linear probe on the embeddings.
        probe_auc: of the probe, class name -> AUC.
        same_images: whether the task's images are those, or others of the same kind.
        note: whatever else should be known.
    """

    where: str
    mean: float | None = None
    auc: Mapping[str, float] = field(default_factory=dict)
    probe_mean: float | None = None
    probe_auc: Mapping[str, float] = field(default_factory=dict)
    images: int | None = None
    same_images: bool = True
    note: str = ""


@dataclass(frozen=True)
class Reading:
    """Another way to read prompts that were published ambiguously; class name -> prompts."""

    about: str
    present: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One evaluation.

    Attributes:
        name: of the file, without .toml.
        title: one line.
        data: the adapter's settings.
        kind: "multi_label", every class present or not, "multi_class", one class an image, or
            "pairs", images with texts and without classes, for retrieval only.
        score: a rule of `zero_shot.RULES`; none for pairs.
        parts: "train" and "validation", if the data set has them -> settings in place of those of
            `data`, whole keys; an empty value or false drops the key.
        retrieval: what texts are searched for by image: "text", those of `data.text`, "prompts",
            the first of the class of each image, or "", nothing.
        classes: in the order of tables; none where `template` makes them of what the data holds.
        source: where the data is had.
        access: on what terms.
        trained_on: whether MedSigLIP was trained on it.
        prompts_source: who wrote the prompts.
        template: "present" and "absent" prompts of classes that bring none, {} being the name.
        readings: other prompts that the publication allows.
        published: figures to compare with.
        means: name -> classes, of means over some of them.
        ordinal_from: for grades, the first of those to be told from the ones below; 0 is none.
        notes: whatever a reader of the result must know.
    """

    name: str
    title: str
    data: Mapping[str, Any]
    kind: str
    score: str = ""
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    retrieval: str = ""
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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def part(self, name: str) -> "Task":
        """What is asked of another part of the data set.

        Raises:
            ValueError: the data set has no part of that name.
        """
        if name not in self.parts:
            there = ", ".join(self.parts) or "none"
            raise ValueError(f"task {self.name} has no part {name!r}; there are: {there}")
        data = {key: value for key, value in {**self.data, **self.parts[name]}.items() if value}
        return replace(self, title=f"{self.title}, part {name}", data=data, parts={})

    def with_classes(self, names: Sequence[str]) -> "Task":
        """The classes that the data turned out to have, with prompts of the template."""
        return _templated(replace(self, classes=tuple(Class(name) for name in names)))

    def with_reading(self, name: str) -> "Task":
        """The prompts read another way.

        Raises:
            ValueError: no reading of that name.
        """
        if name not in self.readings:
            there = ", ".join(self.readings) or "none"
            raise ValueError(f"task {self.name} has no reading {name!r}; there are: {there}")
        reading = self.readings[name]
        return self._with(reading.present, reading.absent)

    def with_prompts(self, path: str | os.PathLike) -> "Task":
        """Prompts of a .toml or .json file: class = [prompts], or class = {present, absent}.

        Raises:
            ValueError: a class that the task does not have, or no list of strings.
        """
        given = _load(Path(path))
        tables = {k: v if isinstance(v, dict) else {"present": v} for k, v in given.items()}
        known, problems = {c.name for c in self.classes}, []
        if unknown := sorted(tables.keys() - known):
            problems.append(f"no classes of task {self.name}: {', '.join(unknown)}")
        for name, table in tables.items():
            if odd := [k for k, v in table.items() if k not in _PROMPTS or not _strings(v)]:
                problems.append(f"{name}: {', '.join(odd)}: expected lists of strings")
        if problems:
            raise ValueError(f"{path}: {'; '.join(problems)}")
        read = {p: {n: tuple(t[p]) for n, t in tables.items() if p in t} for p in _PROMPTS}
        source = f"given, {Path(path).name}"
        return replace(self._with(**read), prompts_source=source, readings={})

    def prompts_sha256(self) -> str:
        """Identity of the prompts and their order."""
        prompts = [(c.name, c.present, c.absent) for c in self.classes]
        return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()

    def check_prompts(self) -> None:
        """Raises ValueError with all classes that lack the prompts that the score rule needs."""
        if not self.classes:  # pairs
            return
        needed = _PROMPTS if zero_shot.RULES[self.score].pairs else _PROMPTS[:1]
        lacking = [c.name for c in self.classes if not all(getattr(c, p) for p in needed)]
        if lacking:
            raise ValueError(
                f"task {self.name} has no {' and '.join(needed)} prompts for "
                f"{', '.join(lacking)}; give them with --prompts FILE (class = [prompts])"
            )

    def _with(self, present: Mapping, absent: Mapping) -> "Task":
        classes = [
            replace(c, present=present.get(c.name, c.present), absent=absent.get(c.name, c.absent))
            for c in self.classes
        ]
        return replace(self, classes=tuple(classes))


_PROMPTS = ("present", "absent")
_OF_CLASSES = ("classes", "template", "score", "readings", "means", "ordinal_from")
_FOLDER = "library"


def names() -> list[str]:
    """Tasks that come with the package."""
    return sorted(name for name, _ in _bundled())


def read(task: str) -> Task:
    """A task that comes with the package, by name, or the user's own, a .toml or .json file.

    Raises:
        FileNotFoundError: neither.
        ValueError: all that is wrong with the file.
    """
    found = dict(_bundled())
    if task in found:
        return parse(task, tomllib.loads(found[task]))
    path = Path(task)
    if not path.is_file():
        raise FileNotFoundError(
            f"{task}: neither a file nor a task; tasks are {', '.join(sorted(found))}"
        )
    return parse(path.stem, _load(path))


def parse(name: str, content: Mapping[str, Any]) -> Task:
    """A task of the content of its file.

    Raises:
        ValueError: all that is wrong with it.
    """
    problems = list(_problems(content))
    if problems:
        raise ValueError(f"task {name}: {'; '.join(problems)}")
    made: dict[str, Any] = {"classes": tuple(_made(Class, c) for c in content.get("classes", ()))}
    readings = content.get("readings", {})
    made["readings"] = {key: _reading(value) for key, value in readings.items()}
    for key in ("template", "means"):
        made[key] = _lists(content.get(key, {}))
    made["notes"] = tuple(content.get("notes", ()))
    if "published" in content:
        made["published"] = _made(Published, content["published"])
    return _templated(Task(name, **{**content, **made}))


def _bundled() -> Iterator[tuple[str, str]]:
    for file in (resources.files(__package__) / _FOLDER).iterdir():
        if file.name.endswith(".toml"):
            yield file.name.removesuffix(".toml"), file.read_text(encoding="utf-8")


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: not readable as TOML (or .json as JSON): {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a table, got a {type(content).__name__}")
    return content


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """All that can be wrong with a task file."""
    yield from _keys("", content, Task, {"name"})
    for table in content.get("classes", ()):
        yield from _keys(f"classes {table.get('name', '?')}: ", table, Class)
    if "published" in content:
        yield from _keys("published: ", content["published"], Published)
    for name, table in content.get("readings", {}).items():
        yield from _keys(f"readings.{name}: ", table, Reading)
    choices = {"kind": KINDS, "score": tuple(zero_shot.RULES), "retrieval": RETRIEVAL}
    for key, allowed in choices.items():
        if key in content and content[key] not in allowed:
            yield f"{key} is {content[key]!r}, expected one of {', '.join(filter(None, allowed))}"
    yield from _data_problems(content)
    known = [table.get("name") for table in content.get("classes", ())]
    if twice := sorted({str(n) for n in known if known.count(n) > 1}):
        yield f"classes given twice: {', '.join(twice)}"
    pairs = content.get("kind") == "pairs"
    if pairs and (odd := [key for key in _OF_CLASSES if content.get(key)]):
        yield f"kind is 'pairs', which has no {', '.join(odd)}"
    if not pairs and "score" not in content:
        yield "lacks score"
    if not pairs and not known and not content.get("template"):
        yield "neither classes nor a template for those that the data holds"
    for where, named in _named(content):
        if unknown := sorted(set(named) - set(known)):
            yield f"{where} names no classes: {', '.join(unknown)}"


def _data_problems(content: Mapping[str, Any]) -> Iterator[str]:
    """What can be wrong with where images, parts and texts are."""
    data, parts, kind = content.get("data"), content.get("parts", {}), content.get("kind")
    data = data if isinstance(data, Mapping) else {}
    if data and data.get("adapter") not in ADAPTERS:
        yield f"data.adapter is {data.get('adapter')!r}, expected one of {', '.join(ADAPTERS)}"
    tables = parts if isinstance(parts, Mapping) else {}
    odd = [n for n, table in tables.items() if n not in PARTS or not isinstance(table, Mapping)]
    if odd or tables is not parts:
        yield f"parts {', '.join(odd) or repr(parts)}: expected tables named {' or '.join(PARTS)}"
    settings = {"data": data, **{f"parts.{name}": table for name, table in tables.items()}}
    for where, table in settings.items():
        attributes = table.get("attributes") if isinstance(table, Mapping) else None
        if taken := [name for name in RESERVED if name in (attributes or ())]:
            yield f"{where}.attributes: {', '.join(taken)} stands for something else; rename it"
    retrieval = "text" if kind == "pairs" else content.get("retrieval")
    if retrieval == "text" and not data.get("text"):
        yield "retrieval by text needs data.text, the column of texts"
    if retrieval == "prompts" and kind != "multi_class":
        yield "retrieval by prompts needs kind 'multi_class', one class an image"


def _keys(where: str, table: Mapping, kind: type, made: frozenset | set = frozenset()):
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in made}
    if unknown := sorted(table.keys() - fields.keys()):
        yield f"{where}unknown {', '.join(unknown)}; expected {', '.join(fields)}"
    missing = dataclasses.MISSING
    needed = [n for n, f in fields.items() if f.default is f.default_factory is missing]
    if absent := [name for name in needed if name not in table]:
        yield f"{where}lacks {', '.join(absent)}"


def _named(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping]]:
    for key in ("auc", "probe_auc"):
        yield f"published.{key}", content.get("published", {}).get(key, {})
    for name, classes in content.get("means", {}).items():
        yield f"means.{name}", dict.fromkeys(classes)
    for name, reading in content.get("readings", {}).items():
        for part in _PROMPTS:
            yield f"readings.{name}.{part}", reading.get(part, {})


def _made(kind: Any, table: Mapping[str, Any]) -> Any:
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()})


def _reading(table: Mapping[str, Any]) -> Reading:
    return Reading(table["about"], *(_lists(table.get(part, {})) for part in _PROMPTS))


def _lists(table: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(value) for name, value in table.items()}


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)


def _templated(task: Task) -> Task:
    """Fills the prompts that classes do not bring."""

    def fill(c: Class, part: str) -> tuple[str, ...]:
        made = tuple(p.replace("{}", c.name) for p in task.template.get(part, ()))
        return getattr(c, part) or made

    classes = [
        replace(c, present=fill(c, "present"), absent=fill(c, "absent")) for c in task.classes
    ]
    return replace(task, classes=tuple(classes))
