"""The scripts that shells read to complete commands, flags and files."""

import argparse
import builtins
import json
import shutil
import subprocess

import pytest

from medsiglip_jax.cli import app, completion


def commands(parser, words=()):
    """Words of a command -> its parser, for all that do something."""
    inner = parser.commands()
    if not inner:
        return {words: parser}
    return {w: p for name, sub in inner.items() for w, p in commands(sub, (*words, name)).items()}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script for bash in a file."""
    pytest.importorskip("shtab")
    path = tmp_path_factory.mktemp("completion") / "medsiglip-jax.bash"
    path.write_text(completion.script(app.parser(), "bash"))
    return path


def completed(script, folder, *words):
    """What bash offers for the last of the words."""
    code = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        'function_name=$(complete -p "$1" | sed -E "s/.*-F ([^ ]+).*/\\1/"); '
        '$function_name "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    run = ["bash", "-c", code, str(script), "medsiglip-jax", *words]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@needs_bash
def test_bash_can_read_it_and_offers_every_command_and_flag(script, tmp_path):
    subprocess.run(["bash", "-n", script], check=True)
    (tmp_path / "x-ray.png").touch()
    names = [module.__name__.rpartition(".")[2] for module in app.COMMANDS]
    assert completed(script, tmp_path, "") == names
    assert completed(script, tmp_path, "monitor", "") == ["fit", "check"]
    for words, parser in commands(app.parser()).items():
        flags = [name for action in parser._actions for name in action.option_strings]
        assert sorted(completed(script, tmp_path, *words, "-")) == sorted(flags), words
        assert len(flags) > 5, "flags are added when a command is parsed"
    assert completed(script, tmp_path, "convert", "--format", "hu") == ["huggingface"]
    assert completed(script, tmp_path, "classify", "--model", "x-") == ["x-ray.png"]
    assert completed(script, tmp_path, "embed", "x-") == ["x-ray.png"]
    assert completed(script, tmp_path, "embed", "--batch-size", "x-") == []


@pytest.mark.parametrize("shell", [name for name in completion.SHELLS if name != "bash"])
def test_other_shells_get_every_flag(shell):
    pytest.importorskip("shtab")
    parser = app.parser()
    text = completion.script(parser, shell)
    for words, sub in commands(parser).items():
        assert words[-1] in text
        for action in sub._actions:
            assert all(flag.lstrip("-") in text for flag in action.option_strings), words
    checker = shutil.which(shell)
    if checker and shell in ("zsh", "fish"):
        subprocess.run([checker, "-n"], input=text, text=True, check=True)


def test_without_shtab_it_says_what_to_install(run, monkeypatch):
    def find(name, *rest, original=builtins.__import__):
        if name == "shtab":
            raise ModuleNotFoundError("No module named 'shtab'")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", find)
    code, out, err = run("completion", "bash")
    assert code == 1 and not out and "pip install 'medsiglip-jax[completion]'" in err


def test_the_script_is_all_that_is_printed(run):
    pytest.importorskip("shtab")
    code, out, err = run("completion", "bash")
    assert code == 0 and not err and out == completion.script(app.parser(), "bash").rstrip() + "\n"
    assert json.loads(run("completion", "fish", "--json")[1])["shell"] == "fish"
    assert run("completion", "ksh")[0] == 2
    assert run("completion", "--help")[1].count("powershell") == 1
    assert isinstance(app.parser(), argparse.ArgumentParser)
