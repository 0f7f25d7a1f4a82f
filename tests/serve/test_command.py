"""The command: what is wrong with its flags is one line, before anything is loaded."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from medsiglip_jax import cli
from medsiglip_jax.serve.errors import LOG

MODEL = ["--model", "nothing"]


@pytest.fixture(autouse=True)
def log_as_before(monkeypatch):
    """The command sends the log of the whole process to stderr, which is the test's own."""
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(LOG, name, [] if name == "handlers" else getattr(LOG, name))


@pytest.mark.parametrize("flags, said", [
    ([], "expected --model M, or AIP_STORAGE_URI"),
    ([*MODEL, "--max-body", "3x"], "--max-body is '3x'; expected a size such as 32MiB"),
    ([*MODEL, "--max-batch", "3"], "max_batch is 3; expected a power of two"),
    ([*MODEL, "--certfile", "here.pem"], "--certfile and --keyfile belong together"),
    ([*MODEL, "--certfile", "none.pem", "--keyfile", "none.pem"], "none.pem: No such file"),
    ([*MODEL, "--certfile", "text", "--keyfile", "text"], "expected a chain of certificates"),
    ([*MODEL, "--api-key-file", "text"], "text: line 1: expected an API key"),
    ([*MODEL, "--probe", "p.npz"], "no such file: p.npz"),
    ([*MODEL, "--probe", "a/p.npz", "--probe", "b/p.npz"], "several are named p; rename one"),
    ([*MODEL, "--embeddings", "none"], "no such folder: none"),
    ([*MODEL, "--allow-host", "x y"], "--allow-host 'x y': expected"),
    ([*MODEL, "--allow-prefix", "gs://b"], "--allow-prefix needs Google's application default"),
    ([*MODEL, "--port", "0"], "nothing: no such file or folder"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AIP_STORAGE_URI", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "none.json")
    (tmp_path / "text").write_text("hello world\n")
    assert cli.main(["serve", *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert len(lines) == 1 and said in lines[0]


def test_the_model_of_vertex_is_taken_from_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AIP_STORAGE_URI", str(tmp_path / "model"))
    assert cli.main(["serve", "--port", "0"]) == 2
    assert f"{tmp_path / 'model'}: no such file or folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_while_the_model_is_loaded_ends_it_without_a_word_of_cpp(checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "medsiglip_jax", "serve", "--model", str(checkpoint), "--port",
               str(port)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live"):
                break
        except OSError:
            time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 130)  # 0 if it was ready by then
    assert said.splitlines()[-1].startswith("stopped") and "terminate" not in said
