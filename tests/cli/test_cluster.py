"""The recipes of scripts/cluster: commands that our parser takes, shells that pass signals and exit
codes on, and a page that tells what checked each file."""

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import check_cluster
import pytest

from medsiglip_jax.cli import app
from medsiglip_jax.train import configs

PAGES = sorted(check_cluster.FOLDER.glob("*.md"))
RECIPES = check_cluster.recipes()


def commands(path: Path) -> list[list[str]]:
    """The words of every command of ours in a file, with values for its variables."""
    text = re.sub(r"^# ?", "", path.read_text(encoding="utf-8"), flags=re.M)
    text = re.sub(r"\\\n\s*", " ", text)
    start = "^" if path in PAGES else ""
    return [words(line) for line in re.findall(rf"{start}medsiglip-jax (.*)", text, re.M)]


def words(line: str) -> list[str]:
    """Up to the operator of the shell that ends a command."""
    line = re.sub(r"\$\w+", lambda name: "64" if name[0] == "$parts" else "1", line.rstrip('"'))
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    return list(itertools.takewhile(lambda word: word[0] not in "&|;<>", lexer))


@pytest.mark.parametrize("path", [*RECIPES, *PAGES], ids=lambda path: path.name)
def test_our_parser_takes_every_command(path):
    found = commands(path)
    assert found or path in PAGES
    for line in found:
        args = app._parse(line)
        if line[0] in ("finetune", "plan"):  # its keys exist
            configs.read(args.config, args.overrides)


@pytest.mark.parametrize("name", ["kubernetes.yaml", "gke_tpu.yaml", "vertex.yaml"])
def test_shells_of_containers_pass_exit_codes_and_signals_on(name, tmp_path):
    pytest.importorskip("yaml")
    (script,) = check_cluster.scripts(check_cluster.FOLDER / name)
    stub = tmp_path / "medsiglip-jax"
    stub.write_text(
        "#!/bin/sh\ntrap 'echo saved > saved; exit 143' TERM\n"
        '[ -z "$LONG" ] || { echo started; sleep 20 & wait $!; }\nexit "$CODE"\n'
    )
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0", "LONG": ""}
    run = dict(cwd=tmp_path, stdout=subprocess.PIPE)
    for code, expected in ((0, 0), (1, 1), (2, 2), (3, 0)):
        done = subprocess.run(["sh", "-c", script], env={**env, "CODE": str(code)}, **run)
        assert done.returncode == expected
    with subprocess.Popen(["sh", "-c", script], env={**env, "LONG": "1"}, **run) as shell:
        assert shell.stdout and shell.stdout.readline() == b"started\n"
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(60) == 143 and (tmp_path / "saved").exists()


def test_the_page_says_what_checked_each_file():
    page = (check_cluster.FOLDER / "README.md").read_text(encoding="utf-8")
    for path in RECIPES:
        (row,) = re.findall(rf"^\| `{path.name}` \|.*$", page, re.M)
        for tool in check_cluster.CHECKS[check_cluster.kind(path)]:
            assert check_cluster.PINS[tool].replace("==", " ") in row


def blocks(language: str) -> list[str]:
    page = (check_cluster.FOLDER / "ten_million.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def printed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


def test_the_figures_of_the_page_are_those_that_it_computes():
    compute, *_ = blocks("python")
    assert printed(compute) in blocks("text")
    rates = (check_cluster.FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for row in (
        r"JPEG to 448 px, images/s, 1 core.*\n.*\n.* without TensorFlow, 1 core.* 93 ",
        "CT 512x512.* 4.0 ", "DX 3000x2500.* 43 ", "a head.* 6.5;", "1 core, .* 154 ",
    ):  # fmt: skip
        assert re.search(row, rates)


def test_the_page_finds_a_result_that_is_not_whole(
    run, checkpoint, untouched_pictures, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = "--stored float16 --shard-size 3 --output embeddings --model".split()
    assert run("embed", *flags, checkpoint, untouched_pictures)[0] == 3
    shutil.copytree("embeddings", "again")
    _, count, compare = (code.replace("part-00700", "part-00001") for code in blocks("python"))
    assert printed(count) == "8 rows: 7 embedded, 1 errors\n"
    assert float(printed(compare).split()[-1]) == pytest.approx(1, abs=2e-3)
    shutil.copy("again/part-00000.parquet", "again/part-00001.parquet")
    with pytest.raises(AssertionError):
        exec(compare, {})
    Path("embeddings/part-00001.parquet").unlink()
    with pytest.raises(AssertionError):
        exec(count, {})
