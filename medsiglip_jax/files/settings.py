"""Turns settings that people write (nested tables) into frozen dataclasses, by their type hints.

They may come from a Python config, a TOML or a JSON file. One ValueError lists all problems:
unknown keys (with the most similar known one), missing keys, wrong types, wrong values.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """A condition on a value beyond its type, written `Annotated[int, at_least(1)]`.

    None is never checked: `Annotated[int | None, at_least(1)]`.

    Attributes:
        holds: value -> whether it is allowed.
        expected: what is allowed, in the words after "expected" of a message.
    """

    holds: Callable[[Any], bool]
    expected: str


def one_of(choices: Collection[Any]) -> Check:
    """The value is among these."""
    return Check(lambda value: value in choices, f"one of {', '.join(map(str, choices))}")


def at_least(bound: int | float) -> Check:
    """The value is `bound` or more."""
    return Check(lambda value: value >= bound, f"at least {bound}")


def more_than(bound: int | float) -> Check:
    """The value is more than `bound`."""
    return Check(lambda value: value > bound, f"more than {bound}")


def between(low: int | float, high: int | float) -> Check:
    """The value is from `low` to `high`, both included."""
    return Check(lambda value: low <= value <= high, f"{low} to {high:,}")


@dataclass(frozen=True)
class Variants:
    """The dataclasses that a table may become, written `Annotated[Base, Variants(KINDS)]`.

    Attributes:
        kinds: value of the table's key `name` -> dataclass, which has a field of that name; the
            first is the default.
    """

    kinds: Mapping[str, Any]

    def choose(self, value: Any, where: str, problems: list[str]) -> Any:
        """The dataclass for a table, or for a string, which stands for a table of only a name."""
        if dataclasses.is_dataclass(value):
            return type(value)
        default = next(iter(self.kinds))
        name = value.get("name", default) if isinstance(value, Mapping) else default
        name = value if isinstance(value, str) else name
        if not isinstance(name, str) or name not in self.kinds:
            expected = one_of(self.kinds).expected
            problems.append(f"{where}.name is {shown(name)}; expected {expected}")
            return Any
        return self.kinds[name]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80  # Python's 30 cut paths and sentences


def shown(value: Any) -> str:
    """A value in a message: its start, if it is long."""
    return _SHORT.repr(value)


def build(kind: type[T], values: Mapping[str, Any], title: str = "config", **given: Any) -> T:
    """Builds a dataclass from a nested mapping.

    Lists become tuples, ints become floats where a float is expected, and tables become the
    dataclasses of the hints. There are three short forms: one table for `tuple[Kind, ...]`, a
    string for a dataclass with a field `name`, and None for a table of defaults. A field whose key
    is a Python keyword ends in an underscore (`except_`).

    Args:
        kind: a dataclass. ValueErrors of its `__post_init__` are listed with the other problems.
        values: key -> value.
        title: the name of `values` in messages.
        **given: fields that the mapping may not set, such as the name of its file.

    Raises:
        ValueError: lists all problems.
    """
    problems: list[str] = []
    made = _table(values, kind, "", problems, title, given)
    if problems:
        raise ValueError("; ".join(problems))
    return made


def verify(made: Any) -> None:
    """Raises a ValueError for the first field of a dataclass that one of its checks refuses."""
    for name, hint in typing.get_type_hints(type(made), include_extras=True).items():
        for check in getattr(hint, "__metadata__", ()):
            if (value := getattr(made, name)) is not None and not check.holds(value):
                raise ValueError(f"{name} is {shown(value)}; expected {check.expected}")


def tables(hint: Any) -> list[Any]:
    """The dataclasses that a value of this hint may hold, all variants included."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    arguments = typing.get_args(hint)
    if variants := next((x for x in arguments if isinstance(x, Variants)), None):
        return list(variants.kinds.values())
    return [kind for argument in arguments for kind in tables(argument)]


def _table(
    values: Any, kind: Any, where: str, problems: list[str], title: str = "", given: Any = None
) -> Any:
    """Turns `values` into `kind`; `where` is its key, `title` its name if it has no key."""
    if isinstance(values, kind):
        return values
    given, title, before = given or {}, where or title, len(problems)
    fields = {f.name.removesuffix("_"): f for f in dataclasses.fields(kind) if f.name not in given}
    if isinstance(values, str) and "name" in fields:
        values = {"name": values}
    if not isinstance(values, Mapping):
        problems.append(f"{title} is {shown(values)}; expected a mapping of {', '.join(fields)}")
        return None
    problems += _key_problems(values, fields, title)
    made, hints = dict(given), typing.get_type_hints(kind, include_extras=True)
    for key, f in fields.items():
        if key not in values or (values[key] is None and (_required(f) or tables(hints[f.name]))):
            continue
        path = f"{where}.{key}" if where else key
        made[f.name] = _value(values[key], hints[f.name], path, problems)
    if len(problems) > before:
        return None
    try:
        return kind(**made)
    except ValueError as error:
        problems.append(f"{where}: {error}" if where else str(error))


def _key_problems(values: Mapping, fields: Mapping[str, Any], title: str) -> Iterator[str]:
    for key in sorted(map(str, values.keys() - fields.keys())):
        near = difflib.get_close_matches(key, fields, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        yield f"{title} has no key {key}{meant}; there are {', '.join(fields)}"
    missing = [key for key, f in fields.items() if _required(f) and values.get(key) is None]
    if missing:
        yield f"{title} lacks {', '.join(missing)}"


def _required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _value(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Converts `value` to the type `hint`; adds a problem where it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _annotated(value, arguments[0], arguments[1:], where, problems)
    if dataclasses.is_dataclass(hint):
        return _table(value, hint, where, problems)
    if origin in (typing.Union, types.UnionType):
        return _union(value, hint, where, problems)
    if origin is tuple and isinstance(value, Mapping) and tables(hint):
        return (_value(value, arguments[0], where, problems),)
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        kinds = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        if len(kinds) == len(value):
            parts = enumerate(zip(value, kinds, strict=True))
            return tuple(_value(x, kind, f"{where}[{i}]", problems) for i, (x, kind) in parts)
    if origin and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {k: _value(x, arguments[1], f"{where}.{k}", problems) for k, x in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{where} is {shown(value)}; expected a finite number")
    elif not _fits(value, hint):
        problems.append(f"{where} is {shown(value)}; expected {_spelled(hint)}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):  # an int in Python, but not in settings
        return hint in (bool, Any)
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _annotated(value: Any, hint: Any, extras: tuple, where: str, problems: list[str]) -> Any:
    before = len(problems)
    for extra in extras:
        if isinstance(extra, Variants):
            hint = extra.choose(value, where, problems)
    made = _value(value, hint, where, problems)
    if made is not None and len(problems) == before:
        problems += [
            f"{where} is {shown(value)}; expected {extra.expected}"
            for extra in extras
            if isinstance(extra, Check) and not extra.holds(made)
        ]
    return made


def _union(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Converts `value` to the first alternative that fits."""
    if value is None and type(None) in typing.get_args(hint):
        return None
    choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
    if len(choices) == 1:
        return _value(value, choices[0], where, problems)
    for choice in choices:
        wrong: list[str] = []
        made = _value(value, choice, where, wrong)
        if not wrong:
            return made
    problems.append(f"{where} is {shown(value)}; expected {_spelled(hint)}")
    return value


def _spelled(hint: Any) -> str:
    """A hint in the form that messages show: "str | tuple[str, ...] | None"."""
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", hint.__name__ if type(hint) is type else str(hint))
