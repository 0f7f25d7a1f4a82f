"""What devices send each other in a step, read from the compiled program.

The body of a loop is in the text once, and counts as often as the loop runs: libtpu writes no trip
count beside a while, so it is taken from the constant in its condition. On TPUs an operation that
overlaps with computation is in several fusions that share a channel, and counts once; on GPUs all
operations of a `shard_map` have one channel.
"""

import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
    "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# The `called_computations` of a custom call run on a SparseCore.
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)="
    r"(?:\{([^}]*)\}|([^,\s]+))"
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")


@dataclass(frozen=True)
class Collective:
    """All operations of one kind.

    Attributes:
        operations: how many there are in the text of the program.
        runs: how many run in a step.
        bytes: what a device receives by them in a step.
    """

    operations: int
    runs: int
    bytes: int


def read(hlo: str, platform: str) -> dict[str, Collective]:
    """The collectives of an optimised program, by kind.

    Args:
        hlo: what `compiled.as_text()` is.
        platform: that it was compiled for, "tpu" or another.
    """
    bodies, entry = _computations(hlo)
    runs = _runs(bodies, entry)
    operations, channels = defaultdict(list), set()
    for name, lines in bodies.items():
        for line in lines:
            if not (operation := _OPERATION.search(line)):
                continue
            kind, number = operation[2], re.search(r"channel_id=(\d+)", line)
            channel = (kind, number[1] if number and platform == "tpu" else line)
            if channel not in channels:
                size = _received(kind, bool(operation[3]), operation[1], line)
                operations[kind].append((runs[name], runs[name] * size))
            channels.add(channel)
    return {
        kind: Collective(len(all_), sum(n for n, _ in all_), round(sum(size for _, size in all_)))
        for kind, all_ in sorted(operations.items())
    }


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the one that is the program."""
    bodies, entry, lines = {}, "", []
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return bodies, entry


def _runs(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    callers = defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            condition = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            times = int(known[1]) if known else _trips(bodies[condition[1]]) if condition else 1
            for names, name_alone in _CALLED.findall(line):
                for called in (names or name_alone).split(","):
                    callers[called.strip().lstrip("%")].append((name, times))

    @functools.cache
    def runs(name: str) -> int:
        return 1 if name == entry else sum(runs(by) * times for by, times in callers[name])

    return {name: runs(name) for name in bodies}


def _trips(condition: list[str]) -> int:
    """How often "while i < constant" runs; counters start at 0."""
    return max((int(n) for line in condition for n in re.findall(r" constant\((\d+)\)", line)),
               default=1)  # fmt: skip


def _received(kind: str, start: bool, result: str, line: str) -> float:
    """Bytes that a device receives if its group sends no more than it must (a ring)."""
    size = 1.0 * sum(
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in _ARRAY.findall(result)
        if shape
    )
    n = _group(line)
    # A tuple of one that only starts has the operands, too, except of an all-reduce.
    if start and kind in ("all-gather", "reduce-scatter"):  # one is n times as large as the other
        size *= (n if kind == "all-gather" else 1) / (n + 1)
    if start and kind in ("all-to-all", "collective-permute"):
        size /= 2
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":  # the result is one of n shares
        return size * (n - 1)
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group(line: str) -> int:
    """The number of devices that an operation connects."""
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return groups[1].count(",") + 1
    if groups := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(groups[2])
    if groups := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", groups[2]))
    return 2
