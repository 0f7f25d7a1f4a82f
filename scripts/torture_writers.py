"""Every output of every command under the faults of a bad day.

Each writer makes one of two outputs, A or B, at one place. In its rounds it meets

* two at once: A and B start together; what is there then is A or B, whole;
* a full disk (RLIMIT_FSIZE at a random size) while B is there, SIGTERM and SIGKILL at a random
  moment: B or nothing is there, or what the same command finishes; then that command makes A.

Once per writer links are planted where temporary files, locks and the output itself would be; they
lead to somebody else's file, which stays as it was.

Files beside the output must never change, and no temporary file may be left in the end. Commands
run in forked processes, which have imported everything already.
"""

import collections
import contextlib
import functools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torture_process import Process, in_child, limit_files, preload, remember_shapes
from torture_state import State, is_hidden, state
from torture_table import WRITERS, Writer, prepare, write_inputs


class Reference:
    """What a writer makes when nothing goes wrong.

    Attributes:
        whole: variant -> the files; those that differ between two runs have the digest "".
        sizes: of the files that the command writes, in bytes.
        seconds: of a run.
    """

    def __init__(self, writer: Writer, place: Path):
        self.writer, self.whole = writer, dict[str, State]()
        self._b = place.with_name(f"{place.name}-b")
        for v in "ab":
            first, second = (self._run(v, place) for _ in range(2))
            assert set(first) == set(second), (first, second)
            self.whole[v] = {n: d if d == second[n] else "" for n, d in first.items()}
        shutil.rmtree(self._b, ignore_errors=True)
        shutil.copytree(place, self._b, symlinks=True)
        given = {path.name for path in writer.start("b").glob("*")} if writer.starts_with else set()
        files = (path for path in place.rglob("*") if path.is_file() and path.name not in given)
        self.sizes = sorted(path.stat().st_size for path in files)
        assert self.whole["a"] != self.whole["b"] or not writer.replaces

    def _run(self, v: str, place: Path) -> State:
        self.writer.clean(place, v)
        start = time.monotonic()
        code, text = Process(self.writer.filled(v, place)).wait()
        self.seconds = time.monotonic() - start
        assert code in self.writer.codes, (self.writer, text)
        return state(place)

    def begin(self, place: Path) -> State:
        """Makes the place what it is before a fault: somebody's own file, and B if the writer
        replaces, else what the command starts with. Returns the earlier output."""
        if self.writer.replaces:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self._b, place, symlinks=True)
        else:
            self.writer.clean(place, "a")
        before = state(place)
        (place / FOREIGN).write_text("somebody's own")
        return before

    def variant(self, found: State) -> str:
        """Which variant the files are, whole; "" if neither, or a mixture."""
        visible = {n: d for n, d in found.items() if not is_hidden(n) or n in self.whole["a"]}
        for v, whole in self.whole.items():
            if set(visible) == set(whole) and all(visible[n] == d for n, d in whole.items() if d):
                return v
        return ""


# A file beside the output.
FOREIGN = "foreign.txt"


# ---------------------------------------------------------------------------------------- faults


class Round:
    """One writer meets faults; `found` counts what came of them."""

    def __init__(self, writer: Writer, reference: Reference, rng: np.random.Generator):
        self.writer, self.reference, self.rng = writer, reference, rng
        self.place, self.found = Path("out"), collections.Counter[str]()
        self.problems: list[str] = []

    def interrupt(self) -> None:
        """A full disk and each signal, one after the other."""
        for fault in (self.full_disk, self.sigterm, self.sigkill):
            self.interrupted(fault)

    def two_at_once(self) -> None:
        self.writer.clean(self.place, "a")
        processes = [Process(self.writer.filled(v, self.place)) for v in "ab"]
        ends = dict(zip("ab", (process.wait() for process in processes), strict=True))
        done = [v for v, (code, _) in ends.items() if code in self.writer.codes]
        there = self.reference.variant(found := state(self.place))
        self.found["two: both done" if len(done) == 2 else "two: one refused"] += 1
        if there not in done or not there:
            self.wrong("mixed", f"two at once left {found or 'nothing'} after {ends}")
        for code, text in ends.values():
            self.check_end(code, text, (*self.writer.codes, 2))
        self.check_leftovers(found)

    def links(self) -> None:
        """At the names that anybody can tell beforehand, then at the output itself."""
        own, victim = self._own(), Path("victim").absolute()
        hidden = [f"{path.parent}/.{path.name}.{end}" for path in own
                  for end in ("partial", "lock", "tmp")]  # fmt: skip
        flags = ["--overwrite"] if self.writer.replaces and not self.writer.starts_with else []
        for planted, more in ((hidden, []), (own, []), (own, flags)):
            self.writer.clean(self.place, "a")
            victim.write_text("somebody's own")
            for link in map(Path, planted):
                link.symlink_to(victim)
            code, text = Process([*self.writer.filled("a", self.place), *more]).wait()
            self.check_end(code, text, (*self.writer.codes, 2))
            written = code in self.writer.codes
            self.found[f"links: {'written' if written else 'refused'}"] += 1
            if victim.read_text() != "somebody's own":
                self.wrong("followed", f"a link at {planted} was followed")
            if written and self.reference.variant(found := state(self.place)) != "a":
                self.wrong("lost", f"with links at {planted}: {found}")

    def _own(self) -> list[Path]:
        """The output, or the files that are added to what it starts with."""
        if not self.writer.starts_with:
            return [self.place / self.writer.output]
        self.writer.clean(self.place, "a")
        names = set(self.reference.whole["a"]) - set(state(self.place))
        return [self.place / name for name in sorted(names)]

    def interrupted(self, fault: Callable[[list[str]], str]) -> None:
        """A fault while the other variant is there, if the writer replaces; then the command again
        makes its own."""
        before = self.reference.begin(self.place)
        command = self.writer.filled("a", self.place)
        how = fault(command)
        found = state(self.place)
        foreign = found.pop(FOREIGN, "")
        if self.writer.replaces and before and self.reference.variant(found) not in ("a", "b"):
            self.wrong("lost", f"{how} left {found}")
        code, text = Process(command).wait()
        found = state(self.place)
        if found.pop(FOREIGN, "") != foreign or not foreign:
            self.wrong("foreign", f"{how} changed a file beside the output")
        if code and "already exists" in text:  # it was done before the fault
            code = 0
        if code not in self.writer.codes or self.reference.variant(found) != "a":
            self.wrong("lost", f"after {how} the same command ended with {code}: {text} {found}")
        self.check_leftovers(found)

    def full_disk(self, command: list[str]) -> str:
        limit = int(self.rng.integers(0, self.reference.sizes[-1]))
        code, text = Process(command, functools.partial(limit_files, limit)).wait()
        self.found["full disk: met" if code == 1 else "full disk: not met"] += 1
        self.check_end(code, text, (*self.writer.codes, 1))
        return f"a full disk at {limit} bytes"

    def sigterm(self, command: list[str]) -> str:
        return self._signal(command, signal.SIGTERM)

    def sigkill(self, command: list[str]) -> str:
        return self._signal(command, signal.SIGKILL)

    def _signal(self, command: list[str], number: signal.Signals) -> str:
        process, delay = Process(command), self.rng.uniform(0.02, self.reference.seconds)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        code, text = process.wait()
        late = code in self.writer.codes
        self.found[f"{number.name}: {'too late' if late else 'met'}"] += 1
        # Before its first line a command has not taken over the signal yet.
        ends = -number, *[128 + number] * (number == signal.SIGTERM), *self.writer.codes
        self.check_end(code, text, ends)
        return f"{number.name} after {delay:.2f} s"

    def check_end(self, code: int, text: str, allowed: Sequence[int]) -> None:
        if "Traceback" in text or code not in allowed:
            self.wrong("ends", f"exit code {code}, expected one of {allowed}: {text[-600:]}")

    def check_leftovers(self, found: State) -> None:
        own = self.reference.whole["a"]  # the quickstart marks its folder by a hidden file
        if left := [name for name in found if is_hidden(name) and name not in own]:
            self.wrong("leftovers", f"left {left}")

    def wrong(self, kind: str, what: str) -> None:
        self.found[f"WRONG {kind}"] += 1
        self.problems.append(f"{kind}: {what}")


def torture(
    rounds: int, interruptions: int, seed: int, names: Sequence[str]
) -> Iterator[tuple[str, dict]]:
    """Yields the name of each writer, and counts of what came of its rounds."""
    for name in names:
        writer = WRITERS[name]
        reference = Reference(writer, Path("out"))
        total, problems = collections.Counter[str](), []
        for number in range(max(rounds, interruptions)):
            round_ = Round(writer, reference, np.random.default_rng([seed, number]))
            if not number:
                round_.links()
            if number < rounds:
                round_.two_at_once()
            if number < interruptions:
                round_.interrupt()
            total += round_.found
            problems += round_.problems
        yield name, {"seconds": reference.seconds, **dict(sorted(total.items())), "wrong": problems}


COLUMNS = {
    "two at once": ("two: both done", "two: one refused"),
    "links": ("links: written", "links: refused"),
    "disk full": ("full disk: met",),
    "SIGTERM": ("SIGTERM: met",),
    "SIGKILL": ("SIGKILL: met",),
    "mixed": ("WRONG mixed",),
    "lost": ("WRONG lost",),
    "foreign": ("WRONG foreign", "WRONG followed"),
    "left over": ("WRONG leftovers",),
    "bad ends": ("WRONG ends",),
}


def line(name: str, found: dict) -> str:
    cells = (sum(found.get(key, 0) for key in keys) for keys in COLUMNS.values())
    widths = map(len, COLUMNS)
    return f"{name:16}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths, strict=True))


def run(rounds: int, interruptions: int, seed: int, pattern: str, as_json: bool) -> int:
    """Prints a table, a line for each writer as it is done; 1 if anything went wrong."""
    # Ray's cluster would be started anew for each of its rounds; `kills` keeps one.
    names = [name for name in WRITERS if pattern in name and "ray" not in name]
    results = {}
    with tempfile.TemporaryDirectory() as folder, work_in(Path(folder)):
        if not as_json:
            print(f"{'writer':16}" + "".join(f"  {title}" for title in COLUMNS), flush=True)
        for name, found in torture(rounds, interruptions, seed, names):
            results[name] = found
            if not as_json:
                print(line(name, found), *found["wrong"][:3], sep="\n  ", flush=True)
    if as_json:
        print(json.dumps(results, indent=2))
    return int(any(found["wrong"] for found in results.values()))


@contextlib.contextmanager
def work_in(folder: Path) -> Iterator[None]:
    """Makes the inputs in a folder, unless they are there, and what compiles to be kept there; it
    is the working directory meanwhile."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["TQDM_DISABLE"] = "1"
    # How files are written does not depend on how well programs are compiled.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    preload()  # after the variables, which jax reads when it is imported
    remember_shapes(folder / "shapes")
    work, ready = folder / "work", folder / "ready"
    if not ready.exists():
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)
    with contextlib.chdir(work):
        if not ready.exists():
            in_child(write_inputs)
            prepare()
            ready.touch()
        yield
