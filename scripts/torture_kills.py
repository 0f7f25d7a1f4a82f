"""Every writer is killed where it writes, and the same command runs again.

* moment: SIGKILL at a random moment, from half of the time to a writer's first write to its last.
* write: SIGKILL before each of the calls that change files: opening to write, fsync, rename, link,
  unlink, mkdir, rmdir. Of many calls as many are taken, evenly, as there are rounds; few are taken
  in turns.
* byte: SIGXFSZ, which ends a process as SIGKILL does, in the middle of a file at a random byte of
  it. It also meets libraries in C++, whose calls Python does not see.

Before that an earlier output of the command is there, where the command replaces one. After the
kill every file of it is still there, whole, or is the new one (else it is lost); and every file
under a name that is no temporary one is whole: that of an undisturbed run, or of its format and
readable to the end (else it is torn). Then the same command makes what an undisturbed run makes, to
the byte (arrays of orbax, whose files have random names, as they are restored), and leaves nothing
else. `serve` is in `torture_serve.py`.

Commands run in forked processes that have imported everything already: what is not covered is a
kill while Python starts, imports or ends. Programs are compiled beforehand.
"""

import collections
import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torture_serve
from torture_process import Process, Writes, limit_files
from torture_state import State, is_temporary, is_whole, state
from torture_table import WRITERS, Writer
from torture_writers import FOREIGN, Reference, work_in

KINDS = ("moment", "write", "byte")
_BYTES = 4  # of so many rounds of the other kinds there is one of this


# ---------------------------------------------------------------------------------------- rounds


@dataclass
class Measured:
    """A writer without faults: what it makes, how many calls write, and when."""

    reference: Reference
    calls: int
    first: float
    last: float


def measure(writer: Writer, place: Path) -> Measured:
    reference = Reference(writer, place)
    reference.begin(place)
    counted = Writes(place)
    code, text = Process(writer.filled("a", place), counted).wait()
    assert code in writer.codes, text
    return Measured(reference, *counted.told)


class Kill:
    """One round: a fault, what is there then, and the same command again."""

    def __init__(self, measured: Measured, place: Path, kind: str, number: int, times: int):
        self.measured, self.place, self.kind = measured, place, kind
        self.number, self.times = number, times
        self.reference, self.writer = measured.reference, measured.reference.writer
        self.rng = np.random.default_rng([KINDS.index(kind), number])
        self.found, self.wrong = collections.Counter[str](), list[str]()

    def run(self) -> None:
        before = self.reference.begin(self.place)
        command = self.writer.filled("a", self.place)
        how, code, text = self._killed(command)
        if code in self.writer.codes:
            self.found["missed"] += 1
        elif code in (-signal.SIGKILL, -signal.SIGXFSZ):
            self.found["kills"] += 1
        else:
            self._note("bad ends", f"{how}: exit code {code}: {text[-600:]}")
        self._check(how, before, state(self.place))
        self._run_again(how, command)

    def _killed(self, command: list[str]) -> tuple[str, int, str]:
        if self.kind == "write":
            at = self._call()
            return f"call {at}", *Process(command, Writes(self.place, at)).wait()
        if self.kind == "byte":
            size = int(self.rng.integers(self.rng.choice(self.reference.sizes) + 1))
            first = functools.partial(limit_files, size, ends=True)
            return f"byte {size}", *Process(command, first).wait()
        delay = self.rng.uniform(self.measured.first / 2, self.measured.last)
        process = Process(command)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        return f"after {delay:.3f} s", *process.wait()

    def _call(self) -> int:
        count = min(self.measured.calls, self.times)
        return int(np.linspace(1, self.measured.calls, count).round()[self.number % count])

    def _check(self, how: str, before: State, found: State) -> None:
        whole = self.reference.whole["a"]
        own = {name: digest for name, digest in found.items() if name != FOREIGN}
        variant = self.reference.variant(own)
        lost = [] if variant == "a" else [n for n, d in before.items() if self._is_lost(n, d, own)]
        if lost:
            self._note("lost", f"{how}: {lost}; left {found}")
        torn = [name for name, digest in own.items() if not is_temporary(name)
                and digest not in (before.get(name), whole.get(name))
                and not self._is_whole(name, digest)]  # fmt: skip
        if torn:
            self._note("torn", f"{how}: {torn}")
        if self.writer.replaces and not lost and not variant:
            self._note("mixed", f"{how}: {own}")

    def _is_lost(self, name: str, digest: str, found: State) -> bool:
        new = self.reference.whole["a"].get(name, digest)  # "" if that is another in each run
        return name not in found or (new != "" and found[name] not in (digest, new))

    def _is_whole(self, name: str, digest: str) -> bool:
        path = self.place / name
        return digest != "unreadable" if path.is_dir() else is_whole(path)

    def _run_again(self, how: str, command: list[str]) -> None:
        code, text = Process(command).wait()
        found = state(self.place)
        self.found["reruns"] += 1
        foreign = found.pop(FOREIGN, "")
        done = code in self.writer.codes or "exists" in text  # it was done before the kill
        if not done or not foreign or self.reference.variant(found) != "a":
            self._note("differ", f"{how}, then code {code}: {text[-600:]} {self._unlike(found)}")
        own = self.reference.whole["a"]
        if left := [name for name in found if is_temporary(name) and name not in own]:
            self._note("left over", f"{how}: {left}")

    def _unlike(self, found: State) -> dict[str, Any]:
        whole = self.reference.whole["a"]
        names = {n for n in {*found, *whole} if whole.get(n) != "" and found.get(n) != whole.get(n)}
        return {name: (found.get(name), whole.get(name)) for name in sorted(names)}

    def _note(self, kind: str, what: str) -> None:
        self.found[kind] += 1
        self.wrong.append(f"{kind}: {what}")


def rounds_of(name: str, times: int, done: Mapping[str, Mapping]) -> Iterator[tuple[str, Any]]:
    """Yields the kind of each round that is not done yet, and its counts with what was wrong; of
    each kind until so many have killed, but twice as many at most.

    Args:
        name: of a writer.
        times: kills of a kind.
        done: kind -> counts of earlier rounds.
    """
    place, measured = Path("out").absolute(), None
    for kind in KINDS:
        wanted = times // _BYTES if kind == "byte" else times
        number, kills = (done.get(kind, {}).get(key, 0) for key in ("rounds", "kills"))
        while kills < wanted and number < 2 * wanted:
            measured = measured or measure(WRITERS[name], place)
            kill = Kill(measured, place, kind, number, times)
            kill.run()
            number, kills = number + 1, kills + kill.found["kills"]
            yield kind, {"calls": measured.calls, **kill.found, "wrong": kill.wrong}


# ---------------------------------------------------------------------------------------- results

# name of a writer -> kind -> counts, "rounds" and "wrong".
Results = dict[str, dict[str, dict[str, Any]]]
COLUMNS = ("kills", "lost", "torn", "mixed", "reruns", "equal", "left over", "bad ends")


def add(results: Results, name: str, kind: str, found: dict[str, Any]) -> None:
    total = results.setdefault(name, {}).setdefault(kind, {"rounds": 0, "wrong": []})
    total["rounds"] += 1
    total["calls"] = found.pop("calls")
    total["wrong"] += found.pop("wrong")
    for key, count in found.items():
        total[key] = total.get(key, 0) + count


def row(name: str, kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one writer."""
    sums = collections.Counter[str]()
    for counts in kinds.values():
        sums.update({key: n for key, n in counts.items() if isinstance(n, int)})
    sums["equal"] = sums["reruns"] - sums["differ"]
    kills = {kind: kinds.get(kind, {}).get("kills", 0) for kind in KINDS}
    calls = max(counts["calls"] for counts in kinds.values())
    return {"writer": name, "calls": calls, **kills, **{key: sums[key] for key in COLUMNS[1:]}}


def table(results: Results) -> str:
    rows = [row(name, kinds) for name, kinds in results.items()]
    header = list(rows[0]) if rows else []
    lines = [" | ".join(header), "|".join("---" for _ in header)]
    lines += [" | ".join(map(str, r.values())) for r in rows]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def run(times: int, pattern: str, folder: str, as_json: bool) -> int:
    """Runs what is not done yet; 1 if anything went wrong.

    Args:
        times: rounds of each kind and writer.
        pattern: regular expression of the names of writers.
        folder: keeps inputs, compiled programs and results, so that the same command goes on
            where it was stopped; "" for one that is removed.
        as_json: the results in full, instead of a table.
    """
    with contextlib.ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory())
        base = Path(place).absolute()
        base.mkdir(parents=True, exist_ok=True)
        stack.enter_context(work_in(base))
        names = [name for name in (*WRITERS, torture_serve.NAME) if re.search(pattern, name)]
        results = go_on(names, times, base / "results.json")
    print(json.dumps(results, indent=2) if as_json else table(results))
    wrong = (c["wrong"] for kinds in results.values() for c in kinds.values())
    return int(any(wrong))


def go_on(names: Sequence[str], times: int, file: Path) -> Results:
    """Adds the rounds that are missing to the results in a file, one by one."""
    results: Results = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        rounds = torture_serve.rounds if name == torture_serve.NAME else rounds_of
        with cluster() if "ray" in name else contextlib.nullcontext():
            for kind, found in rounds(name, times, results.get(name, {})):
                for line in found["wrong"]:
                    print(f"{name}, {kind}: {line}", file=sys.stderr, flush=True)
                add(results, name, kind, found)
                (partial := file.with_suffix(".partial")).write_text(json.dumps(results, indent=1))
                os.replace(partial, file)
    return results


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster for all rounds, whose address takes the place of "{ray}" in command lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["ray", "start", "--head", "--block", "--port", address.rpartition(":")[2]]
    command += ["--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats"]
    command += ["--object-store-memory", str(128 << 20)]
    with tempfile.TemporaryFile() as said:
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        head = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "PATH": path})
        os.environ["TORTURE_RAY"] = address
        try:
            yield
        finally:
            head.terminate()
            head.wait(60)
