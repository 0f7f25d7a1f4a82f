"""What a cell of a label column means, for training, probes and evaluation alike.

A finding has a column of its own: 1, true, yes, positive or present; 0, false, no, negative or
absent; -1 (or "uncertain") and nothing are what a `Policy` says. Any other label is the name of a
class, in one column for all classes.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64

# What messages say of a cell that is no label.
EXPECTED = "expected 0, 1, true, false, yes, no, -1 (uncertain) or nothing, got"

_TRUE = frozenset("1 1.0 true yes positive present".split())
_FALSE = frozenset("0 0.0 false no negative absent".split())
_UNCERTAIN = frozenset("-1 -1.0 uncertain".split())
_CHOICE = {"ignore": np.nan, "positive": 1.0, "negative": 0.0}
OTHERS = "*"  # the findings that a policy does not name


PARTS = ("train", "validation", "test")
_ALLOWED = {"uncertain": tuple(_CHOICE), "blank": ("ignore", "negative")}

# A choice for all findings, or by finding, where "*" stands for those that are not named.
Choice = str | Mapping[str, str]


@dataclass(frozen=True)
class Policy:
    """What labels mean that are neither 0 nor 1.

    Attributes:
        uncertain: -1 is "ignore" (unknown), "positive" or "negative"; or finding -> one of these,
            as published for CheXpert, where "*" stands for the others, which are else ignored.
        blank: an empty cell is "ignore" (unknown) or "negative"; or by finding, too.
    """

    uncertain: Choice = "ignore"
    blank: Choice = "ignore"

    def __post_init__(self):
        for name, allowed in _ALLOWED.items():
            given = getattr(self, name)
            choices = list(given.values()) if isinstance(given, Mapping) else [given]
            if wrong := [choice for choice in choices if choice not in allowed]:
                raise ValueError(f"{name} is {wrong[0]!r}; expected one of {', '.join(allowed)}")

    def of(self, finding: str) -> "Policy":
        """The policy of one finding."""
        return Policy(self.choice(finding), _chosen(self.blank, finding))

    def choice(self, finding: str = OTHERS) -> str:
        """What -1 is in one finding."""
        return _chosen(self.uncertain, finding)

    def label(self, cell: str) -> float:
        """What a cell that is -1 or empty means, of a policy of one finding."""
        return _CHOICE[_chosen(self.uncertain if cell else self.blank, OTHERS)]

    def check_names(self, findings: Collection[str]) -> None:
        """Raises ValueError if it names a finding that there is not."""
        for name in _ALLOWED:
            given = getattr(self, name)
            named = given if isinstance(given, Mapping) else ()
            if unknown := [finding for finding in named if finding not in (*findings, OTHERS)]:
                raise ValueError(
                    f"{name} names {', '.join(map(repr, unknown))}; the findings are "
                    f"{', '.join(findings)}"
                )


def _chosen(choice: Choice, finding: str) -> str:
    if isinstance(choice, str):
        return choice
    return choice.get(finding, choice.get(OTHERS, "ignore"))


def parse_uncertain(text: str) -> Choice:
    """What a command line says of -1: "positive", or by finding "Edema=positive,Fracture=negative",
    where a word by itself is for the others."""
    if "=" not in text:
        return text
    parts = (part.rpartition("=") for part in text.split(","))
    return {finding.strip() or OTHERS: choice.strip() for finding, _, choice in parts}


def parse_policies(uncertain: str, blank: str) -> dict[str, Policy]:
    """What a command line says of labels, which may differ by part of the data.

    Args:
        uncertain: as for `parse_uncertain`; a rule may begin with a part, such as
            "test:ignore,train:positive,train:Edema=negative". A rule of a part goes before one of
            all parts, and a rule of a finding before one of all findings.
        blank: the same for empty cells.

    Returns:
        "" -> the policy of parts that no rule names, and the policies of the others.
    """
    flags = {"uncertain": _by_part(uncertain), "blank": _by_part(blank)}
    parts = dict.fromkeys(("", *(part for rules in flags.values() for part in rules)))
    policies = {}
    for part in parts:
        rules = {name: {**r.get("", {}), **r.get(part, {})} for name, r in flags.items()}
        policies[part] = Policy(**{name: _shortened(of_part) for name, of_part in rules.items()})
    return policies


_RULE = re.compile(rf"(?:({'|'.join(PARTS)}):)?(?:(.*)=)?([^=]*)", re.DOTALL)


def _by_part(text: str) -> dict[str, dict[str, str]]:
    """The rules of each part by finding; those of "" are of all parts."""
    rules: dict[str, dict[str, str]] = {}
    for match in (_RULE.fullmatch(rule.strip()) for rule in text.split(",")):
        assert match is not None  # anything may be a choice
        part, finding, choice = match.groups("")
        rules.setdefault(part, {})[finding.strip() or OTHERS] = choice.strip()
    return rules


def _shortened(rules: Mapping[str, str]) -> Choice:
    """A word, where one rule is of all findings."""
    return rules.get(OTHERS, "ignore") if rules.keys() <= {OTHERS} else rules


def value(cell: str, policy: Policy = Policy()) -> float | None:
    """The label in a cell of a finding: 0, 1 or NaN (unknown); None if the cell is no label."""
    if is_uncertain(cell) or not cell:
        return policy.label(cell)
    cell = cell.lower()
    return 1.0 if cell in _TRUE else 0.0 if cell in _FALSE else None


def finding(
    cells: Sequence[str], policy: Policy = Policy()
) -> tuple[Float32[np.ndarray, " n"], list[int]]:
    """The labels of a finding, and the rows of cells that are none (`EXPECTED`), NaN meanwhile."""
    known = {cell: value(cell, policy) for cell in set(cells)}
    wrong = [row for row, cell in enumerate(cells) if known[cell] is None]
    return np.array([known[cell] for cell in cells], np.float32), wrong


def is_uncertain(cell: str) -> bool:
    """Whether a cell is -1 or "uncertain"."""
    return cell.lower() in _UNCERTAIN


def is_finding(cells: Iterable[str]) -> bool:
    """Whether a column is that of a finding, as its cells are nothing else than its labels."""
    return all(value(cell) is not None for cell in set(cells))


def warn_of_uncertain(
    path: str, columns: Mapping[str, Sequence[str]], policy: Policy = Policy()
) -> None:
    """Warns once, with counts, if findings have labels -1 where they are ignored.

    Args:
        path: of the table, for the message.
        columns: name of each finding -> its cells.
        policy: what -1 means.
    """
    ignored = {n: cells for n, cells in columns.items() if policy.choice(n) == "ignore"}
    counts = {name: sum(map(is_uncertain, cells)) for name, cells in ignored.items()}
    if named := [f"{name} {count:,}" for name, count in counts.items() if count]:
        warnings.warn(
            f"{path}: labels of -1 (uncertain) are ignored, as if unknown: {', '.join(named)}",
            stacklevel=2,
        )


def lacking(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """What cannot be learned from labels, a line each.

    Args:
        labels: int32 [n] of classes, -1 unknown; or float32 [n, C] of findings, NaN unknown.
        classes: their names.
    """
    if labels.ndim == 1:
        counts = np.bincount(labels[labels >= 0], minlength=len(classes))
        empty = [name for name, count in zip(classes, counts, strict=True) if not count]
        lines = [f"no image of the class {', '.join(empty)}"] if empty else []
        if np.count_nonzero(counts) == 1:
            lines.append(f"all images are of one class, {classes[int(counts.argmax())]}")
        return lines
    problems = (("no known label", np.isfinite), ("no positive", _is_1), ("no negative", _is_0))
    lines, done = [], np.zeros(labels.shape[1], bool)
    for problem, holds in problems:
        without = ~holds(labels).any(axis=0) & ~done
        done |= without
        if names := [classes[k] for k in np.flatnonzero(without).tolist()]:
            lines.append(f"{problem} of the finding {', '.join(names)}")
    return lines


def two_valued(
    labels: Int32[np.ndarray, " n"] | Int64[np.ndarray, " n"] | Float[np.ndarray, "n c"],
    classes: int,
) -> Bool[np.ndarray, " c"]:
    """Whether a class is shown by some images and known to be absent from others, as for an AUC.

    Args:
        labels: of classes, negative unknown; or of findings, NaN unknown.
        classes: how many there are.
    """
    columns = label_columns(labels, classes)
    return (columns == 1).any(axis=0) & (columns == 0).any(axis=0)


def label_columns(
    labels: Int32[np.ndarray, " n"] | Int64[np.ndarray, " n"] | Float[np.ndarray, "n c"],
    classes: int,
) -> Float64[np.ndarray, "n c"]:
    """A column of 0, 1 and NaN (unknown) for each class.

    Args:
        labels: of classes, negative unknown; or of findings, NaN unknown.
        classes: how many there are.
    """
    if labels.ndim == 2:
        return labels.astype(np.float64)
    one_hot = labels[:, None] == np.arange(classes)
    return np.where(labels[:, None] < 0, np.nan, one_hot)


def _is_1(labels: np.ndarray) -> np.ndarray:
    return labels == 1


def _is_0(labels: np.ndarray) -> np.ndarray:
    return labels == 0


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """The class names among cells of which some may be empty; sorted as numbers if all are."""
    classes = sorted(set(names) - {""})
    return tuple(sorted(classes, key=int) if all(map(str.isdecimal, classes)) else classes)
