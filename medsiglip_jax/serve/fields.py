"""The fields of a JSON document, checked one by one; what is wrong is told with its place."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from medsiglip_jax.serve.errors import wrong_field

# Of a list: ten million, which 32 MiB hold, would keep the event loop busy for half a minute.
MOST_ELEMENTS = 65_536
T = TypeVar("T")
_NAMES = {str: "a string", int: "a whole number", bool: "true or false", list: "a list",
          dict: "an object"}  # fmt: skip


def checked(value: Any, kind: type[T], where: str) -> T:
    """The value, if it is of this kind of JSON; bool is no number, and 2.0 is a whole one.

    Google's clients send whole numbers as 2.0, since protobuf's `Value` has no others.

    Raises:
        RequestError: 400, with the place and what was expected, never the value.
    """
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise wrong_field(where, f"expected {_NAMES[kind]}")


class Fields:
    """One object of the document.

    Attributes:
        where: its place, such as "instances[3].image"; "" of the document.
    """

    def __init__(self, value: Any, where: str = ""):
        self.where = where
        self._values: dict[str, Any] = checked(value, dict, where or "the body")

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_a(self, name: str, kind: type) -> bool:
        """Whether a field is there and of this kind of JSON."""
        value = self._values.get(name)
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

    def at(self, name: str) -> str:
        """The place of a field."""
        return f"{self.where}.{name}" if self.where else name

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A field; without a default it must be there. null is as if it were not."""
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise wrong_field(self.at(name), f"missing; expected {_NAMES[kind]}")
            return default
        return checked(value, kind, self.at(name))

    def value(self, name: str) -> Any:
        """A field of any kind; None if it is not there."""
        return self._values.get(name)

    def number(self, name: str, least: int, default: int | None = None) -> int:
        """A whole number from `least` on, and no more than a picture may have pixels."""
        value = self.get(name, int, default)
        if not least <= value < 1 << 31:
            raise wrong_field(self.at(name), f"expected a whole number from {least}")
        return value

    def one_of(self, name: str, choices: Sequence[str], default: str) -> str:
        """A string that is one of `choices`."""
        value = self.get(name, str, default)
        if value not in choices:
            raise wrong_field(self.at(name), f"expected one of {', '.join(choices)}")
        return value

    def fields(self, name: str) -> "Fields":
        """A field that is an object."""
        return Fields(self.get(name, dict), self.at(name))

    def items(self, name: str, kind: type[T]) -> list[T]:
        """A field that is a list of things of one kind."""
        values = enumerate(self.elements(name))
        return [checked(value, kind, f"{self.at(name)}[{i}]") for i, value in values]

    def elements(self, name: str) -> list[Any]:
        """A field that is a list of anything, of at most `MOST_ELEMENTS`."""
        values = self.get(name, list)
        if len(values) > MOST_ELEMENTS:
            problem = f"{len(values):,} elements; expected at most {MOST_ELEMENTS:,}"
            raise wrong_field(self.at(name), problem)
        return values

    def objects(self, name: str) -> Iterator["Fields"]:
        """A field that is a list of objects."""
        for i, value in enumerate(self.items(name, dict)):
            yield Fields(value, f"{self.at(name)}[{i}]")

    def strings(self, name: str) -> list[str]:
        """A field that is a string or a list of strings."""
        if isinstance(value := self._values.get(name), str):
            return [value]
        return self.items(name, str)

    def only(self, *names: str) -> None:
        """Raises RequestError if there are other fields: they would be ignored."""
        unknown = [name for name in self._values if name not in names]
        if unknown:
            expected = f"expected {', '.join(names)}"
            raise wrong_field(self.where or "the body", f"a field that is not known; {expected}")
