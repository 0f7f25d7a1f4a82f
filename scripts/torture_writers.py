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
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from fuzz_files import write_originals
from PIL import Image

State = dict[str, str]


@dataclass(frozen=True)
class Writer:
    """One output of one command.

    Attributes:
        output: the name of what it writes.
        command: the variant, "a" or "b" -> the command line; "{out}" is the output.
        replaces: writes over an earlier output of its own; else it refuses, or resumes.
        starts_with: a folder that the output is a copy of, to which the command adds files.
    """

    output: str
    command: Callable[[str], Sequence[str]]
    replaces: bool = True
    starts_with: str = ""

    def clean(self, place: Path) -> None:
        """Leaves nothing at the place but what the command starts with."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if self.starts_with:
            shutil.copytree(self.starts_with, place / self.output)


MODEL = ["--model", "originals/siglip"]
_HITS = ["--text", "lung", "--top-k", "3"]
_TASK = ["--task", "task.toml", *MODEL, "--resamples", "20"]
_TRAIN = ["--config", "lora", "--config.init=originals/siglip", "--config.batch_size=4",
          "--config.total_steps=3", "--config.checkpoint_every=1", "--config.data.text=text",
          "--config.log_every=1"]  # fmt: skip


def _search(v: str, *flags: str) -> list[str]:
    return ["search", *MODEL, "--embeddings", f"embedded-{v}", *_HITS, *flags, "{out}"]


def _predict(v: str) -> list[str]:
    return ["probe", "predict", "--probe", f"{v}.npz", "--embeddings", f"embedded-{v}",
            "--output", "{out}"]  # fmt: skip


def _fit(v: str) -> list[str]:
    return ["probe", "fit", "--data", f"{v}.csv", "--embeddings", f"embedded-{v}", "--label",
            "label", "--output", "{out}"]  # fmt: skip


def _convert(v: str, format: str) -> list[str]:
    return ["convert", f"model-{v}", "{out}", "--format", format]


def _pairs(v: str) -> list[str]:
    return ["search", "--self", "--embeddings", f"embedded-{v}", "--threshold", "0.01", "--output",
            "{out}"]  # fmt: skip


WRITERS: dict[str, Writer] = {
    "preview .html": Writer("o.html", lambda v: ["preview", v, "--output", "{out}"]),
    "preview .png": Writer("o.png", lambda v: ["preview", v, "--output", "{out}"]),
    "heatmap": Writer("o.png", lambda v: ["classify", *MODEL, "--text", "lung", f"{v}.svs",
                                          "--tissue", "0", "--heatmap", "{out}"]),
    "search .csv": Writer("o.csv", lambda v: _search(v, "--output")),
    "search .parquet": Writer("o.parquet", lambda v: _search(v, "--output")),
    "search sheet": Writer("o.html", lambda v: _search(v, "--sheet")),
    "search pairs": Writer("o.csv", _pairs),
    "search index": Writer("o", lambda v: ["search", "--build-index", "--embeddings", "{out}",
                                           "--kind", "image" if v == "a" else "any"],
                           replaces=False, starts_with="embedded-a"),
    "probe fit": Writer("o.npz", _fit),
    "probe predict": Writer("o.csv", _predict),
    "compare": Writer("o.md", lambda v: ["compare", "judged-a", f"judged-{v}", "--output",
                                         "{out}", "--resamples", "20"]),
    "embed": Writer("o", lambda v: ["embed", *MODEL, v, "--output", "{out}", "--shard-size", "4"],
                    replaces=False),
    "evaluate": Writer("o", lambda v: ["evaluate", *_TASK, "--data", f"data-{v}", "--output",
                                       "{out}"], replaces=False),
    "convert orbax": Writer("o", lambda v: _convert(v, "orbax"), replaces=False),
    "convert hf": Writer("o", lambda v: _convert(v, "huggingface"), replaces=False),
    "convert .npz": Writer("o.npz", lambda v: _convert(v, "big_vision"), replaces=False),
    "finetune": Writer("o", lambda v: ["finetune", *_TRAIN, f"--config.data.path={v}-train.csv",
                                       "--workdir", "{out}"], replaces=False),
    "quickstart": Writer("o", lambda v: ["quickstart", "--workdir", "{out}", "--seed",
                                         str("ab".index(v))], replaces=False),
}  # fmt: skip


# ------------------------------------------------------------------------------------- processes


class Process:
    """A command in a forked process of this one."""

    def __init__(self, command: Sequence[str], bytes_per_file: int | None = None):
        self._said, write_end = os.pipe()  # to which the limit on files does not apply
        self.pid = os.fork()
        if not self.pid:
            self._run(command, write_end, bytes_per_file)
        os.close(write_end)

    def _run(self, command: Sequence[str], write_end: int, bytes_per_file: int | None) -> None:
        code = 1
        try:
            for descriptor in (1, 2):
                os.dup2(write_end, descriptor)
            os.close(write_end)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            if bytes_per_file is not None:
                sys.dont_write_bytecode = True  # Python would keep the first bytes as a whole file
                resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, bytes_per_file))
            from medsiglip_jax.cli import main

            code = main(command)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:  # whatever happens: only the process that forks may go on
                os._exit(code)

    def wait(self) -> tuple[int, str]:
        """The exit code, negative for a signal that ended it, and what it said."""
        with open(self._said, encoding="utf-8", errors="replace") as file:
            text = file.read()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), text


def preload() -> None:
    """Imports what commands import, without starting JAX: a process that forks must not."""
    import importlib

    names = "jax flax optax orbax.checkpoint sklearn.datasets pyarrow.parquet scipy.stats"
    ours = "cli evaluate.run train.finetune embeddings.probe.fitting"
    for name in (*names.split(), *(f"medsiglip_jax.{name}" for name in ours.split())):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from medsiglip_jax.train import quickstart

    # Few steps are enough: how the files are written does not depend on them.
    few = replace(quickstart.QuickstartSettings(), total_steps=4, warmup_steps=2)
    quickstart.run = functools.partial(quickstart.run, settings=few)


# ---------------------------------------------------------------------------------------- inputs


def write_inputs() -> None:
    """Everything that the commands read, in the working directory, each in the variants a and b."""
    write_originals(Path("originals"))
    for number, v in enumerate("ab"):
        rng = np.random.default_rng(number)
        labels, texts = ["id,label"], ["image,text"]
        for i in range(8 + number):
            pixels = rng.integers(0, 256, (30, 30, 3), np.uint8)
            name = f"{v}{i}.png"
            for folder in (v, f"data-{v}/{'xy'[i % 2]}"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(Path(folder, name))
            labels.append(f"{name},{'xy'[i % 2]}")
            texts.append(f"{v}/{name},a chest X-ray")
        Path(f"{v}.csv").write_text("\n".join(labels) + "\n")
        Path(f"{v}-train.csv").write_text("\n".join(texts) + "\n")
        _write_slide(f"{v}.svs", rng)
    Path("task.toml").write_text(TASK)


TASK = """
title = "Two folders"
source = "made up"
trained_on = "no"
kind = "multi_class"
score = "class_softmax"
prompts_source = "made up"
[data]
adapter = "folders"
root = ["."]
[[classes]]
name = "x"
present = ["a chest X-ray"]
[[classes]]
name = "y"
present = ["lung"]
"""


def _write_slide(name: str, rng: np.random.Generator) -> None:
    import tifffile

    pixels = rng.integers(90, 180, (1024, 1024, 3), np.uint8)
    text = "Aperio Image Library v11.2.1\n1024x1024 (256x256) JPEG/RGB Q=90|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(
        name, pixels, tile=(256, 256), photometric="rgb", compression="jpeg", description=text,
        metadata=None,
    )  # fmt: skip


def prepare() -> None:
    """What commands read that other commands write."""
    for v in "ab":
        scaled(v)
        for command in (
            ["embed", *MODEL, v, "--output", f"embedded-{v}"],
            ["evaluate", *_TASK, "--data", "data-a", "--output", f"judged-{v}", "--temperature",
             "logit_scale" if v == "a" else "none"],
            ["probe", "fit", "--data", f"{v}.csv", "--embeddings", f"embedded-{v}", "--label",
             "label", "--output", f"{v}.npz"],
        ):  # fmt: skip
            code, text = Process(command).wait()
            assert code == 0, (command, text)


def scaled(v: str) -> None:
    """Copies the model under another name, with other weights."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree("originals/siglip", f"model-{v}")
    file = f"model-{v}/model.safetensors"
    tensors = load_file(file)
    save_file({name: x * (1 + (v == "b")) for name, x in tensors.items()}, file)


# ---------------------------------------------------------------------------------------- state


def state(folder: Path) -> State:
    """The files in a folder, hidden ones too, each with a digest of its content; orbax's folders of
    arrays, whose files have random names, as one."""
    arrays = [path.parent for path in sorted(folder.rglob("_METADATA"))]
    files = {
        path: hashlib.sha256(_content(path)).hexdigest()[:12]
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file()) and not set(path.parents) & set(arrays)
    }
    digests = files | {path: _digest_of_arrays(path) for path in arrays}
    return {path.relative_to(folder).as_posix(): digest for path, digest in digests.items()}


def _content(path: Path) -> bytes:
    if path.is_symlink():
        return os.readlink(path).encode()
    return _of_index(path) if path.stem == "index" else path.read_bytes()


def _of_index(path: Path) -> bytes:
    """What two builds of an index have in common: threads decide which graph of several it is. Of
    the graph that is whether it belongs to the record."""
    if not path.with_name("index.json").is_file():  # a build that was interrupted
        return path.read_bytes()
    record = json.loads(path.with_name("index.json").read_text())
    if path.name == "index.json":
        kept = {key: value for key, value in record.items() if key not in ("bytes", "sha256")}
        return json.dumps(kept).encode()
    return str(hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]).encode()


def _digest_of_arrays(folder: Path) -> str:
    """Of all arrays that orbax restores; "unreadable" if it does not."""

    def work() -> None:
        import jax
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder.absolute())
        digest = hashlib.sha256()
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(x).tobytes())
        result.write_text(digest.hexdigest()[:12])

    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "digest")
        in_child(work, quiet=True)
        return result.read_text() if result.exists() else "unreadable"


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


class Reference:
    """What a writer makes when nothing goes wrong.

    Attributes:
        whole: variant -> the files; those that differ between two runs have the digest "".
        seconds: of a run.
        largest: bytes of the largest file that the command writes.
    """

    def __init__(self, writer: Writer, place: Path):
        self.whole: dict[str, State] = {}
        for v in "ab":
            twice = []
            for _ in range(2):
                writer.clean(place)
                start = time.monotonic()
                code, text = Process(filled(writer, v, place)).wait()
                self.seconds = time.monotonic() - start
                assert code == 0, (writer, text)
                twice.append(state(place))
            first, second = twice
            assert set(first) == set(second), (first, second)
            self.whole[v] = {n: d if d == second[n] else "" for n, d in first.items()}
        given = {path.name for path in Path(writer.starts_with or place / "none").glob("*")}
        files = (path for path in place.rglob("*") if path.is_file() and path.name not in given)
        self.largest = max(path.stat().st_size for path in files)
        assert self.whole["a"] != self.whole["b"]

    def variant(self, found: State) -> str:
        """Which variant the files are, whole; "" if neither, or a mixture."""
        visible = {n: d for n, d in found.items() if not is_hidden(n) or n in self.whole["a"]}
        for v, whole in self.whole.items():
            if set(visible) == set(whole) and all(visible[n] == d for n, d in whole.items() if d):
                return v
        return ""


def filled(writer: Writer, v: str, place: Path) -> list[str]:
    return [part.replace("{out}", str(place / writer.output)) for part in writer.command(v)]


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
        self.writer.clean(self.place)
        processes = [Process(filled(self.writer, v, self.place)) for v in "ab"]
        ends = dict(zip("ab", (process.wait() for process in processes), strict=True))
        done = [v for v, (code, _) in ends.items() if code == 0]
        there = self.reference.variant(found := state(self.place))
        self.found["two: both done" if len(done) == 2 else "two: one refused"] += 1
        if there not in done or not there:
            self.wrong("mixed", f"two at once left {found or 'nothing'} after {ends}")
        for code, text in ends.values():
            self.check_end(code, text, (0, 2))
        self.check_leftovers(found)

    def links(self) -> None:
        """At the names that anybody can tell beforehand, then at the output itself."""
        own, victim = self._own(), Path("victim").absolute()
        hidden = [f"{path.parent}/.{path.name}.{end}" for path in own
                  for end in ("partial", "lock", "tmp")]  # fmt: skip
        flags = ["--overwrite"] if self.writer.replaces and not self.writer.starts_with else []
        for planted, more in ((hidden, []), (own, []), (own, flags)):
            self.writer.clean(self.place)
            victim.write_text("somebody's own")
            for link in map(Path, planted):
                link.symlink_to(victim)
            code, text = Process([*filled(self.writer, "a", self.place), *more]).wait()
            self.check_end(code, text, (0, 2))
            self.found[f"links: {'written' if code == 0 else 'refused'}"] += 1
            if victim.read_text() != "somebody's own":
                self.wrong("followed", f"a link at {planted} was followed")
            if code == 0 and self.reference.variant(found := state(self.place)) != "a":
                self.wrong("lost", f"with links at {planted}: {found}")

    def _own(self) -> list[Path]:
        """The output, or the files that are added to what it starts with."""
        if not self.writer.starts_with:
            return [self.place / self.writer.output]
        self.writer.clean(self.place)
        names = set(self.reference.whole["a"]) - set(state(self.place))
        return [self.place / name for name in sorted(names)]

    def interrupted(self, fault: Callable[[list[str]], str]) -> None:
        """A fault while the other variant is there, if the writer replaces; then the command again
        makes its own."""
        self.writer.clean(self.place)
        (self.place / "foreign.txt").write_text("somebody's own")
        before = ""
        if self.writer.replaces:
            code, text = Process(filled(self.writer, "b", self.place)).wait()
            assert code == 0, text
            before = "b"
        command = filled(self.writer, "a", self.place)
        how = fault(command)
        found = state(self.place)
        foreign = found.pop("foreign.txt", "")
        if before and self.reference.variant(found) not in ("a", "b"):
            self.wrong("lost", f"{how} left {found}")
        code, text = Process(command).wait()
        found = state(self.place)
        if found.pop("foreign.txt", "") != foreign or not foreign:
            self.wrong("foreign", f"{how} changed a file beside the output")
        if code and "already exists" in text:  # it was done before the fault
            code = 0
        if code or self.reference.variant(found) != "a":
            self.wrong("lost", f"after {how} the same command ended with {code}: {text} {found}")
        self.check_leftovers(found)

    def full_disk(self, command: list[str]) -> str:
        limit = int(self.rng.integers(0, self.reference.largest))
        code, text = Process(command, bytes_per_file=limit).wait()
        self.found["full disk: met" if code else "full disk: not met"] += 1
        self.check_end(code, text, (0, 1))
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
        self.found[f"{number.name}: {'met' if code else 'too late'}"] += 1
        # Before its first line a command has not taken over the signal yet.
        ends = (0, -number, 128 + number) if number == signal.SIGTERM else (0, -number)
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
    preload()
    names, results = [name for name in WRITERS if pattern in name], {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder, "compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["TQDM_DISABLE"] = "1"
        (Path(folder) / "work").mkdir()
        with contextlib.chdir(Path(folder) / "work"):
            in_child(write_inputs)
            prepare()
            if not as_json:
                print(f"{'writer':16}" + "".join(f"  {title}" for title in COLUMNS), flush=True)
            for name, found in torture(rounds, interruptions, seed, names):
                results[name] = found
                if not as_json:
                    print(line(name, found), *found["wrong"][:3], sep="\n  ", flush=True)
    if as_json:
        print(json.dumps(results, indent=2))
    return int(any(found["wrong"] for found in results.values()))


def in_child(work: Callable[[], None], quiet: bool = False) -> None:
    """Runs a function in a forked process, so that JAX is not started in this one.

    Args:
        work: what to do.
        quiet: it may fail.
    """
    if not (pid := os.fork()):
        code = 1
        try:
            if quiet:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert quiet or code == 0
