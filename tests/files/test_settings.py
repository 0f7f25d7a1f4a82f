"""Nested tables into dataclasses: short forms, conversions, and every problem at once."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from medsiglip_jax.files.settings import Variants, at_least, build, one_of, tables


@dataclass(frozen=True)
class Folder:
    name: str = "folder"
    path: str = "."
    except_: tuple[str, ...] = ()


@dataclass(frozen=True)
class Csv:
    name: str = "csv"
    delimiter: str = ","
    limit: Annotated[int | None, at_least(1)] = None


@dataclass(frozen=True)
class Label:
    name: str
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    where: str
    auc: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    name: str
    kind: Annotated[str, one_of(("pairs", "classes"))]
    data: Annotated[Any, Variants({"folder": Folder, "csv": Csv})] = Folder()
    classes: tuple[Label, ...] = ()
    published: Published | None = None
    share: str | float = 0.5
    weights: tuple[float, float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False

    def __post_init__(self):
        if self.kind == "pairs" and self.classes:
            raise ValueError("kind is 'pairs', which has no classes")


def test_a_toml_file_becomes_dataclasses():
    made = build(Task, tomllib.loads("""
        kind = "classes"
        weights = [1, 2]
        share = 1
        extra = {any = [1, "thing"]}
        [data]
        except = ["a"]
        [[classes]]
        name = "cat"
        prompts = ["a cat"]
        [[classes]]
        name = "dog"
        [published]
        where = "a paper"
        auc = {cat = 1}
    """), name="pets")  # fmt: skip
    assert made == Task(
        "pets", "classes", Folder(except_=("a",)), (Label("cat", ("a cat",)), Label("dog")),
        Published("a paper", {"cat": 1.0}), 1.0, (1.0, 2.0), {"any": [1, "thing"]},
    )  # fmt: skip
    assert type(made.share) is float and type(made.weights[0]) is float
    again = Task("x", "pairs", Csv(limit=3))
    assert build(Task, dataclasses.asdict(again)) == again


def test_short_forms():
    made = build(Task, {"name": "x", "kind": "classes", "data": "csv", "classes": {"name": "cat"},
                        "published": None})  # fmt: skip
    assert made.data == Csv() and made.classes == (Label("cat"),) and made.published is None
    assert build(Task, {"name": "x", "kind": "classes", "classes": ["a"]}).classes == (Label("a"),)
    assert build(Task, {"name": "x", "kind": "pairs", "data": None}).data == Folder()
    assert tables(Task.__annotations__["data"]) == [Folder, Csv]
    assert tables(Annotated[int | None, at_least(1)]) == []


@pytest.mark.parametrize("changes, message", [
    ({"kindd": 1}, r"task x has no key kindd \(did you mean kind\?\); there are kind, data, clas"),
    ({"kind": None}, "task x lacks kind"),
    ({"kind": "cls"}, "kind is 'cls'; expected one of pairs, classes"),
    ({"kind": 3}, "kind is 3; expected str"),
    ({"data": {"name": "zip"}}, "data.name is 'zip'; expected one of folder, csv"),
    ({"data": {"name": "csv", "path": "x"}}, "data has no key path; there are name, delim"),
    ({"data": {"name": "csv", "limit": 0}}, "data.limit is 0; expected at least 1"),
    ({"data": 3}, "data is 3; expected a mapping of name, path, except"),
    ({"data": {"except": "a"}}, r"data.except is 'a'; expected tuple\[str, ...\]"),
    ({"classes": [{"name": "a"}, {"nam": "b"}]}, r"classes\[1\] has no key nam \(did you mean"),
    ({"published": {}}, "published lacks where"),
    ({"published": {"where": "x", "auc": {"cat": "a"}}}, "published.auc.cat is 'a'; expected"),
    ({"share": [1]}, r"share is \[1\]; expected str | float"),
    ({"weights": [1]}, r"weights is \[1\]; expected tuple\[float, float\]"),
    ({"weights": [1, "x"]}, r"weights\[1\] is 'x'; expected float"),
    ({"quick": 1}, "quick is 1; expected bool"),
    ({"weights": [1, True]}, r"weights\[1\] is True; expected float"),
    ({"weights": [1, float("inf")]}, r"weights\[1\] is inf; expected a finite number"),
    ({"kind": "pairs", "classes": ["a"]}, "kind is 'pairs', which has no classes"),
    ({"name": "y"}, "task x has no key name"),
])  # fmt: skip
def test_problems(changes, message):
    with pytest.raises(ValueError, match=message):
        build(Task, {"kind": "classes"} | changes, "task x", name="x")


def test_all_problems_at_once():
    with pytest.raises(ValueError) as error:
        build(Task, {"kin": 1, "data": {"pth": 2, "path": 3}, "quick": "yes"})
    for part in ("no key kin", "lacks name, kind", "data has no key pth", "path is 3", "quick"):
        assert part in str(error.value)
