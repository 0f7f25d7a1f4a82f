"""What two parts of a data set share and should not, and what is said of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHOWN = 3  # groups or images in a message


@dataclass(frozen=True)
class Leak:
    """Something that two parts share, or that one has several times.

    Attributes:
        what: is shared, in the plural.
        parts: "train", "validation" or "test", twice the same within a part.
        count: of shared groups, images or pairs of images.
        names: the first of them: a group, an image, or a pair of images.
        at_least: whether there may be more than the count.
    """

    what: str
    parts: tuple[str, str]
    count: int
    names: Sequence[tuple[str, ...]]
    at_least: bool = False

    @staticmethod
    def first(found: Sequence[Any]) -> list[Any]:
        """Those that are named."""
        return list(found[:SHOWN])

    @property
    def refused(self) -> bool:
        """Whether results are worthless with it: not if it is within a part."""
        return self.parts[0] != self.parts[1]

    def to_dict(self) -> dict[str, Any]:
        """Its content for results.json."""
        return {**asdict(self), "refused": self.refused}

    def __str__(self) -> str:
        one, other = self.parts
        who = f"{one} and {other} share" if self.refused else f"{one} has several times"
        count = f"{'at least ' if self.at_least else ''}{self.count:,}"
        shown = ", ".join(" = ".join(names) for names in self.names)
        more = ", …" if self.count > len(self.names) else ""
        return f"{who} {count} {self.what}: {shown}{more}"


def refuse(leaks: Sequence[Leak], allowed: bool = False) -> None:
    """Refuses parts that are not disjoint, unless that is allowed.

    Raises:
        ValueError: which parts share how many of what, and the first few.
    """
    problems = [str(leak) for leak in leaks if leak.refused]
    if problems and not allowed:
        raise ValueError(
            "parts of a data set must be disjoint, or results look too good (--allow-leaks goes "
            f"on, and says so in the report); {'; '.join(problems)}"
        )
