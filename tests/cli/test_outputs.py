"""An input is never an output: what a command would replace is not what it reads."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torture_table
from PIL import Image

from medsiglip_jax import cli
from medsiglip_jax.cli import app, compare, outputs, parser, runners
from medsiglip_jax.cli import search as search_command
from medsiglip_jax.embeddings import output as table
from medsiglip_jax.embeddings import search
from medsiglip_jax.evaluate.report import tables
from medsiglip_jax.model.weights import layouts


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(folder / name)
    (tmp_path / "link.png").symlink_to(folder / "a.png")
    os.link(folder / "a.png", tmp_path / "same.png")
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "part-00000.parquet").write_bytes(b"vectors")
    (tmp_path / "labels.csv").write_text("image,label\na.png,1\n")
    return tmp_path


MODEL = ["--model", "model"]
COMMANDS = {
    "itself": ["preview", "scans/a.png", "--output", "scans/a.png"],
    "another way to it": ["preview", "scans/a.png", "--output", "scans/../scans/a.png"],
    "a link to it": ["preview", "scans/a.png", "--output", "link.png"],
    "another name of it": ["preview", "scans/a.png", "--output", "same.png"],
    "in the folder": ["preview", "scans", "--output", "scans/b.png"],
    "sheet": ["search", *MODEL, "--embeddings", "embeddings", "--image", "scans/a.png",
              "--sheet", "scans/a.png"],
    "heatmap": ["classify", *MODEL, "--text", "a", "scans/a.png", "--heatmap", "scans/a.png"],
    "search": ["search", *MODEL, "--embeddings", "embeddings", "--text", "a",
               "--output", "embeddings/part-00000.parquet"],
    "probe fit": ["probe", "fit", "--data", "labels.csv", "--embeddings", "embeddings",
                  "--output", "labels.csv"],
    "probe predict": ["probe", "predict", "--probe", "p.npz", "--embeddings", "embeddings",
                      "--output", "embeddings/part-00000.parquet"],
    "monitor fit": ["monitor", "fit", "--embeddings", "embeddings", "--metadata", "labels.csv",
                    "--output", "labels.csv"],
    "evaluate": ["evaluate", "--task", "idrid", *MODEL, "--data", "scans", "--output", "scans"],
    "embed": ["embed", *MODEL, "scans", "--output", "scans"],
}  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_an_input_is_never_an_output(scans, command, capsys, monkeypatch):
    monkeypatch.chdir(scans)
    before = {path: path.read_bytes() for path in scans.rglob("*") if path.is_file()}
    assert cli.main(command) == 2
    err = capsys.readouterr().err.strip()
    assert "choose another name for the output" in err and "\n" not in err
    assert {path: path.read_bytes() for path in scans.rglob("*") if path.is_file()} == before


def test_a_page_of_ours_is_replaced_where_it_lies(scans, monkeypatch):
    monkeypatch.chdir(scans)
    for _ in range(2):
        assert cli.main(["preview", "scans", "--output", "scans/sheet.html"]) == 0


# Somebody's own file under the name of an output, of the suffix that is asked for.
OWN = {
    "scan.png": (b"\x89PNG\r\n\x1a\n of a scan", ["preview", "scans", "--output", "scan.png"]),
    "page.html": (b"<!doctype html><p>mine", ["preview", "scans", "--output", "page.html"]),
    "hits.png": (b"\x89PNG\r\n\x1a\n", ["search", *MODEL, "--embeddings", "embeddings", "--text",
                                       "a", "--sheet", "hits.png"]),
    "mine.csv": (b"id,label\n1,0\n", ["search", *MODEL, "--embeddings", "embeddings", "--text",
                                      "a", "--output", "mine.csv"]),
    "scores.csv": (b"id,rank\n1,0\n", ["probe", "predict", "--probe", "p.npz", "--embeddings",
                                       "embeddings", "--output", "scores.csv"]),
    "part.parquet": (b"PAR1", ["search", "--self", "--embeddings", "embeddings", "--output",
                               "part.parquet"]),
    "model.npz": (b"PK\x03\x04", ["probe", "fit", "--data", "labels.csv", "--embeddings",
                                  "embeddings", "--output", "model.npz"]),
    "known.npz": (b"PK\x03\x04", ["monitor", "fit", "--embeddings", "embeddings", "--output",
                                  "known.npz"]),
    "notes.md": (b"# Mine\n", ["compare", "a", "b", "--output", "notes.md"]),
    "heat.parquet": (b"PAR1", ["classify", *MODEL, "--text", "a", "scans/a.png", "--heatmap",
                               "heat.png"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_file_that_the_command_did_not_write_is_kept(scans, name, capsys, monkeypatch):
    monkeypatch.chdir(scans)
    content, command = OWN[name]
    (scans / name).write_bytes(content)
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert f"{name} exists, and is not a file that this command wrote" in err
    assert err.count("\n") == 1 and (scans / name).read_bytes() == content
    cli.main([*command, "--overwrite"])  # whatever is wrong with the rest
    assert "this command wrote" not in capsys.readouterr().err


# How help texts say that something is written, and flags of which they say it that name no output.
_WORDS = r"write|file for|folder for|new folder|draw the \w+ o[nv]|gets|recompute|upload|the card"
WRITES = re.compile(rf"\b({_WORDS})")
NO_OUTPUTS = {
    "--protocols": "of what is read and written", "--overwrite": "of an output",
    "--keep-uids": "of a column", "--remat": "of memory", "--log-requests": "to stderr",
    "--push-to-hub": "to the hub",
}  # fmt: skip


def _written(sub: parser.Parser, name: str = "") -> Iterator[tuple[str, str]]:
    """(command, flag) of every output, as help texts tell it."""
    for action, inner in sub.commands().items():
        yield from _written(inner, f"{name} {action}".strip())
    for action in sub._actions:
        flag = action.option_strings[-1] if action.option_strings else action.dest
        if name and flag not in NO_OUTPUTS:
            if flag == "--output" or WRITES.search(action.help or ""):
                yield name, flag


def test_the_torture_run_has_a_writer_for_every_output():
    """A command that learns to write something else fails here until it is killed there, too."""
    commands = [" ".join(writer.command("a")) + " " for writer in torture_table.WRITERS.values()]
    found = set(_written(app.parser()))
    assert {("convert", "destination"), ("search", "--build-index")} < found and len(found) > 20
    lacking = [
        (name, flag) for name, flag in found
        if not any(command.startswith(f"{name} ") and (f" {flag} " in command or flag[:1] != "-")
                   for command in commands)
    ]  # fmt: skip
    assert not lacking


def test_the_torture_run_has_every_layout_and_every_runner():
    commands = [writer.command("a") for writer in torture_table.WRITERS.values()]
    formats = {command[-1] for command in commands if command[0] == "convert"}
    assert formats == set(layouts.WRITABLE)
    embed = parser.Parser()
    runners.add_runners(embed)
    (runner,) = (a for a in embed._actions if "--runner" in a.option_strings)
    asked = {word for command in commands if command[0] == "embed" for word in command}
    assert runner.choices and set(runner.choices) - {runner.default} <= asked and "--part" in asked


def test_overwrite_replaces_it_and_an_empty_file_needs_no_flag(scans, monkeypatch):
    monkeypatch.chdir(scans)
    (scans / "page.html").write_text("mine")
    (scans / "made").mkdir()
    (scans / "made" / "by-mktemp.png").touch()
    assert cli.main(["preview", "scans", "--output", "page.html", "--overwrite"]) == 0
    assert cli.main(["preview", "scans", "--output", "made/by-mktemp.png"]) == 0
    assert (scans / "page.html").read_text().startswith("<!doctype html>")


def test_what_the_commands_write_is_known_as_theirs(tmp_path):
    for suffix in ".csv", ".parquet":
        for name, columns in (("hits", search.HIT_COLUMNS), ("pairs", search.PAIR_COLUMNS)):
            table.write(path := tmp_path / f"{name}{suffix}", {c: [1] for c in columns})
            own = search_command.define_flags(flags := parser.Parser()) or flags.get_default("own")
            assert own["output"](str(path))
            assert not outputs.is_table_of("id,.*,positive")(str(path))
        table.write(path := tmp_path / f"p{suffix}", {c: [1] for c in ("id", "a,b", "positive")})
        assert outputs.is_table_of("id,.*,positive")(str(path))
    comparison = tables.markdown("Comparison of two evaluations", [])
    (tmp_path / "c.md").write_text(comparison)
    own = compare.define_flags(flags := parser.Parser()) or flags.get_default("own")
    assert own["output"](str(tmp_path / "c.md"))


WAITING = """
import pathlib, signal, sys, time, types
from medsiglip_jax.cli import app
from medsiglip_jax.files import storage

def embed(args):
    with storage.new_file(pathlib.Path(sys.argv[1]) / "out"):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            if len(sys.argv) > 2:  # cleaning up takes long
                print("leaving", flush=True)
                time.sleep(60)

for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background jobs ignore them
    signal.signal(number, signal.SIG_DFL)
app._parse = lambda argv: types.SimpleNamespace(
    run=embed, protocols=None, max_bytes=None, timeout=None, workers=None
)
sys.exit(app.main([]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_end_a_command_in_one_line_and_leave_nothing(tmp_path, name, code):
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    with subprocess.Popen(command, text=True, stdout=-1, stderr=-1) as child:
        assert child.stdout and child.stdout.readline() == "ready\n"
        child.send_signal(getattr(signal, name))
        err = child.communicate(timeout=30)[1].strip()
    assert child.returncode == code
    assert (
        err
        == f"medsiglip-jax embed: {name}: stopped; the same command again starts over or resumes"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_that_comes_while_rubbish_is_collected_is_not_lost(tmp_path):
    """Python drops what is raised in `__del__`, and in the callbacks that JAX has there."""
    collected = WAITING.replace(
        "def embed(args):",
        "class Rubbish:\n"
        "    def __del__(self):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n\n"
        "def embed(args):\n"
        "    Rubbish()",
    )
    command = [sys.executable, "-c", collected, str(tmp_path)]
    with subprocess.Popen(command, text=True, stdout=-1, stderr=-1) as child:
        assert child.stdout and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        err = child.communicate(timeout=30)[1].strip()
    assert child.returncode == 143 and err.startswith("medsiglip-jax embed: SIGTERM: stopped")
    assert "\n" not in err and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_is_told_even_where_a_library_raises_its_own_interrupt():
    """As Ray does, which looks for signals itself while it waits for its actors."""
    with pytest.raises(app.Interrupted, match="SIGTERM: stopped") as raised, app._signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None
    assert raised.value.exit_code == 143
    with pytest.raises(KeyboardInterrupt) as raised, app._signals():
        raise KeyboardInterrupt
    assert not isinstance(raised.value, app.Interrupted)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_second_signal_ends_at_once_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-c", WAITING, str(tmp_path), "slowly"]
    with subprocess.Popen(command, text=True, stdout=-1, stderr=-1) as child:
        for said in ("ready\n", "leaving\n"):
            assert child.stdout and child.stdout.readline() == said
            child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=30)[1] == ""
    assert child.returncode == 130
