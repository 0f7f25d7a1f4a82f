"""The command line: help, exit codes, one line on stderr for a mistake."""

import json
import os
import subprocess
import sys

import pytest

from medsiglip_jax.cli import app


@pytest.fixture
def wrong(checkpoint, pictures, tmp_path):
    """Command lines that are somebody's mistake, and a word the answer must hold."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    image, ok = pictures / "0.png", ["--model", checkpoint, "--text", "a"]
    out = ["--output", tmp_path / "out"]
    return {
        "no command": ([], "COMMAND"),
        "unknown command": (["clasify"], "clasify"),
        "unknown flag": (["info", checkpoint, "--jsn"], "--jsn"),
        "no model": (["classify", "--text", "a", image], "--model"),
        "no text": (["classify", "--model", checkpoint, image], "--text"),
        "empty text": (["classify", "--model", checkpoint, "--text", " ", image], "none of them"),
        "no image": (["classify", *ok], "IMAGE"),
        "no such model": (["classify", "--model", "/no/model", "--text", "a", image], "/no/model"),
        "empty model": (["info", tmp_path / "empty"], "no config.json"),
        "a file": (["info", tmp_path / "file"], "not a checkpoint"),
        "preset": (["classify", *ok, "--preprocess", "clip", image], "big_vision"),
        "dtype": (["classify", *ok, "--dtype", "int4", image], "bfloat16"),
        "attention": (["classify", *ok, "--attention", "flash", image], "xla"),
        "batch": (["classify", *ok, "--batch-size", "0", image], "batch_size"),
        "not a number": (["classify", *ok, "--batch-size", "x", image], "--batch-size"),
        "tokenizer": (["classify", *ok, "--tokenizer", "gone.model", image], "gone.model"),
        "empty input": (["embed", "--model", checkpoint, *out, tmp_path / "empty"], "nothing to"),
        "no input": (["embed", "--model", checkpoint, *out, "gone"], "gone"),
        "output is a file": (
            ["embed", "--model", checkpoint, "--output", tmp_path / "file", image], "is a file"),
        "output below a file": (
            ["embed", "--model", checkpoint, "--output", tmp_path / "file" / "x", image], "is a"),
        "DST exists": (
            ["convert", checkpoint, pictures, "--format", "orbax"], "already exists"),
        "format": (["convert", checkpoint, tmp_path / "x", "--format", "onnx"], "onnx"),
        "resolution": (
            ["convert", checkpoint, tmp_path / "x", "--format", "orbax", "--resolution", "5"],
            "patch_size"),
    }  # fmt: skip


def test_mistakes_are_one_line_and_exit_2_and_leave_nothing(run, wrong, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for name, (argv, word) in wrong.items():
        code, out, err = run(*argv)
        assert code == 2, (name, code, err)
        assert out == "" and err.count("\n") == 1 and word in err, (name, out, err)
        assert sorted(tmp_path.rglob("*")) == before, name


def test_machine_failures_are_exit_1(run, checkpoint, pictures, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    code, out, err = run("embed", "--model", checkpoint, "--output", tmp_path / "out", pictures)
    assert code == 1 and out == "" and "No space left" in err
    assert not list((tmp_path / "out").glob("*part*"))


def test_ctrl_c_is_one_line(run, checkpoint, pictures, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("medsiglip_jax.inference.embed.embed", interrupt)
    code, _, err = run("embed", "--model", checkpoint, "--output", tmp_path / "out", pictures)
    assert code == 130 and "resumes" in err


def test_installed_command(checkpoint):
    """In a process of its own: stdout is the document alone, whatever libraries print."""
    command = [sys.executable, "-m", "medsiglip_jax", "info", str(checkpoint), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=True)
    assert json.loads(done.stdout)["parameters"] > 0
    assert done.stderr == ""


def test_a_closed_pipe_is_no_error(checkpoint):
    command = [sys.executable, "-m", "medsiglip_jax", "info", str(checkpoint)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env=buffered, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="its shells cannot close them")
@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_quiet_and_reach_no_file(untouched_pictures, tmp_path, closed):
    """The file that is opened next must not take the place of standard output."""
    command = f"{sys.executable} -m medsiglip_jax preview {untouched_pictures} --output sheet.html"
    done = subprocess.run(f"{command} {closed}", shell=True, cwd=tmp_path, capture_output=True)
    assert done.returncode == 3  # one of the pictures is damaged
    assert done.stdout == b"" and b"Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["sheet.html"]
    assert (tmp_path / "sheet.html").read_text().endswith("</html>\n")


def test_every_command_has_help_with_an_example(run):
    """The groups probe and monitor, too, whose example begins with what comes before them."""
    listed = run("--help")[1]
    commands = app.parser().commands()
    assert len(commands) == len(app.COMMANDS) and "probe" in commands
    for name, command in commands.items():
        assert f"\n    {name}" in listed
        for action in ("", *command.commands()):
            code, out, _ = run(name, *action.split(), "--help")
            example = out.partition("\nexample:\n")[2]
            assert code == 0 and f"  medsiglip-jax {name} {action}".rstrip() + " " in example


def test_help_says_what_is_easily_missed(run):
    examples = run("embed", "--help")[1].partition("example:")[2]
    assert all(flag in examples for flag in ("--series", "--mpp", "--volume"))
    numbers = run("classify", "--help")[1]
    assert all(word in numbers for word in ("sigmoid", "softmax", "calibrate"))


def test_help_names_what_the_tables_hold(run):
    from medsiglip_jax.model.attention import ATTENTION
    from medsiglip_jax.model.weights.layouts import WRITABLE
    from medsiglip_jax.preprocess.image import PRESETS

    words = run("classify", "--help")[1] + run("convert", "--help")[1]
    assert all(name in words for name in (*ATTENTION, *WRITABLE, *PRESETS))
