"""Flags that several commands share."""

import argparse
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import replace

import jax
import pytest
import source_files
from jax._src import distributed

from medsiglip_jax import cli
from medsiglip_jax.cli import app, finetune, loading, parser, reading
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.parts import Parts
from medsiglip_jax.train import loop


def test_queries_are_read_as_it_is_recorded():
    flagged = parser.Parser()
    reading.add_queries(flagged)
    recorded = Rules(frame=5, volume="ct")
    for flags, frame, series in (([], 5, False), (["--series"], 5, True), (["--frame", "3"], 3, 0)):
        rules, parts = reading.queries(flagged.parse_args(flags), recorded)
        assert (rules, parts) == (replace(recorded, frame=frame), Parts(frame, bool(series)))


@pytest.fixture
def no_launcher(monkeypatch):
    """No variable of Slurm, Open MPI, Kubernetes or JAX, wherever the tests run."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORD", "JAX_PROC", "KUBERNETES_", "TPU_")):
            monkeypatch.delenv(name)
    # What `jax.distributed.initialize` calls after it has checked that JAX has not started yet.
    monkeypatch.setattr("jax.distributed.initialize", distributed.global_state.initialize)


@pytest.mark.parametrize("flags", [
    ["--processes", "2"], ["--process-id", "1"], ["--distributed", "--processes", "2"],
    ["--coordinator", "localhost:1"], ["--coordinator", "localhost:1", "--processes", "2"],
])  # fmt: skip
def test_a_process_of_several_has_to_know_where_the_others_are(flags, no_launcher):
    flagged = parser.Parser()
    loading.add_processes(flagged)
    with pytest.raises(ValueError, match="--processes and --process-id need --coordinator"):
        loading.join_other_processes(flagged.parse_args(flags), str)
    assert loading.join_other_processes(flagged.parse_args([]), str)


def test_bare_distributed_on_one_machine_is_one_process_and_says_so(no_launcher, capsys):
    flagged = parser.Parser()
    loading.add_processes(flagged)
    assert loading.join_other_processes(flagged.parse_args(["--distributed"]), str)
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert "this process runs alone" in err and "--coordinator" in err
    assert distributed.global_state.client is None and jax.process_count() == 1


def test_no_flag_is_short_for_another(capsys):
    assert cli.main(["embed", "x", "--model", "m", "--output", "o", "--max-error=3"]) == 2
    assert "unrecognized arguments: --max-error=3" in capsys.readouterr().err
    assert cli.main(["--versio"]) == 2


def test_only_commands_that_read_inputs_take_the_time_to_read_one(capsys):
    for argv in (
        "info m", "convert a b --format orbax", "compare a b", "examples", "completion bash",
        "plan --config lora --topology h100", "card a --output c.md", "quickstart",
        "serve --model m", "probe fit --data d --embeddings e --output p.npz",
        "probe curve --data d --embeddings e", "monitor fit --embeddings e --output r.npz",
        "monitor check --reference r.npz --embeddings e --output o",
    ):  # fmt: skip
        assert cli.main([*argv.split(), "--read-timeout=1"]) == 2
        assert "unrecognized arguments: --read-timeout=1" in capsys.readouterr().err, argv
    for argv in (
        "classify --model m i", "preview --output o i", "embed --model m --output o i",
        "search --embeddings e", "probe predict --probe p", "evaluate --list", "finetune --keys",
        "explain --model m --output o i",
    ):  # fmt: skip
        assert app._parse([*argv.split(), "--read-timeout=1"]).read_timeout == 1.0


# Flags of other programs that messages and comments name, a style of CSS, and flags of XLA.
OF_OTHERS = {"--dereference", "--hard-dereference", "--sparse", "--file", "--local-dir", "--images",
             "--depth", "--c", "--xla"}  # fmt: skip


def flags(parsed: argparse.ArgumentParser) -> Iterator[str]:
    """The flags of a parser and of the commands below it."""
    if isinstance(parsed, parser.Parser) and (add := parsed._add_flags):
        parsed._add_flags = None
        add(parsed)
    for action in parsed._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags(command)


def named(text: str) -> set[str]:
    """The flags that a program names."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def test_every_flag_that_a_message_names_exists():
    known = {*flags(app.parser()), *OF_OTHERS}
    found = {path: named(text) for path, text in source_files.texts().items()}
    assert {"--id-column", "--output", "--tissue"} <= set().union(*found.values())
    assert not {path: wrong for path, flags in found.items() if (wrong := flags - known)}
    assert named("name it (--id COLUMN, --label)") - known == {"--id"}


def test_a_name_with_a_hyphen_is_a_name_behind_two():
    """In every command that takes names, also where others stand before the flags."""
    for argv in (
        ["classify", "--model", "M", "--text", "T", "--", "-5669.png", "-b.png"],
        ["classify", "-5669.png", "--model", "M", "--text", "T", "--", "-b.png"],
        ["embed", "a.png", "--model", "M", "--output=-out", "--", "-5669.png", "--b.png"],
        ["probe", "predict", "--model", "M", "a.png", "--json", "--", "-b.png"],
        ["preview", "--output", "o", "--", "-a.png"], ["card", "a", "--output", "c", "--", "-b"],
        ["compare", "a", "b", "--output", "c", "--", "-c"], ["info", "--", "-m"],
    ):  # fmt: skip
        if argv[1].startswith("-5669"):
            argv[1] = "./-5669.png"
        args = app._parse(argv)
        names = getattr(args, "inputs", None) or getattr(args, "images", None)
        names = names or getattr(args, "second", None) or args.source
        after = argv[argv.index("--") + 1 :]
        assert list(names)[-len(after) :] == after or names == after[0], argv
        assert "a.png" not in argv or "a.png" in names


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("classify --model M --text T -5669.png", "write ./-5669.png, or -- before the last names"),
        ("classify --model M --text -T x.png", "-T begins with a hyphen and is read as a flag: "
         "write --text=-T "),
        ("embed x.png --model M --output -out", "write --output=-out "),
        ("compare -a b", "write ./-a, "),
    ],
)  # fmt: skip
def test_a_name_with_a_hyphen_that_was_taken_for_a_flag_is_explained(argv, said, capsys):
    assert cli.main(argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_mistyped_flag_is_no_name(capsys):
    assert cli.main("embed x.png --model M --outptu o".split()) == 2
    assert "hyphen" not in capsys.readouterr().err


def test_what_finetune_resumes_from_is_said_in_time_whatever_the_disk_does(monkeypatch):
    """A mount that hangs, and a bucket whose client raises what is no OSError."""
    held = threading.Event()
    monkeypatch.setattr(finetune, "_LOOK_SECONDS", 0.05)

    def fails(workdir):
        raise RuntimeError("503")

    for look, said in (
        (lambda workdir: held.wait(), "its last checkpoint"), (fails, "its last checkpoint"),
        (lambda workdir: [5, 10], "step 10"),
    ):  # fmt: skip
        monkeypatch.setattr(loop, "saved_steps", look)
        assert finetune._resumes("run") == f"resumes from {said}"
    held.set()
