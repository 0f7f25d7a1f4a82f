"""What two parts of a data set share and should not, and what is said of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_SHOWN = 3  # groups or images in a message
_LISTED = 1000  # in results.json


@dataclass(frozen=True)
class Leak:
    """Something that two parts share, or that one has several times.

    Attributes:
        what: the name of what is shared, in the plural.
        parts: "train", "validation" or "test", twice the same within a part.
        found: each a group, an image or a pair of images.
        at_least: whether there may be more.
    """

    what: str
    parts: tuple[str, str]
    found: Sequence[tuple[str, ...]]
    at_least: bool = False

    @property
    def refused(self) -> bool:
        """Whether results are worthless with it: not if it is within a part."""
        return self.parts[0] != self.parts[1]

    @property
    def note(self) -> str:
        """What it is, without names."""
        one, other = self.parts
        count = f"{'at least ' if self.at_least else ''}{len(self.found):,}"
        if self.refused:
            return f"{one} and {other} share {count} {self.what}"
        return f"among the {one} images are {count} pairs of {self.what}"

    def to_dict(self) -> dict[str, Any]:
        """Its content for results.json."""
        count, refused = len(self.found), self.refused
        return {**asdict(self), "found": self.found[:_LISTED], "count": count, "refused": refused}

    def __str__(self) -> str:
        shown = ", ".join(" = ".join(names) for names in self.found[:_SHOWN])
        return f"{self.note}: {shown}{', …' if len(self.found) > _SHOWN else ''}"


def refuse(leaks: Sequence[Leak], allowed: bool = False) -> None:
    """Refuses parts that are not disjoint, unless that is allowed.

    Raises:
        ValueError: which parts share how many of what, and the first few.
    """
    problems = [str(leak) for leak in leaks if leak.refused]
    if problems and not allowed:
        raise ValueError(
            "parts of a data set must be disjoint, or results look too good (--allow-leaks goes "
            f"on, says so in the report and lists them in results.json); {'; '.join(problems)}"
        )
