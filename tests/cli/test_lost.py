"""Two processes over jax.distributed, of which one is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torture_lost

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]  # fmt: skip


@pytest.mark.parametrize("kind, victim, wanted, resumes", [
    ("embed", 0, "part-*.parquet", "embeds what is missing"),
    ("finetune", 1, "checkpoints/5", r"resumes from step \d+"),
])  # fmt: skip
def test_the_other_names_it_and_the_same_command_goes_on(
    tmp_path, monkeypatch, kind, victim, wanted, resumes
):
    """Process 0 is the one that jax itself cannot lose without aborting all others."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.chdir(tmp_path)
    # In a process of its own, since it forks, which jax, once it has begun, warns of.
    write = "import torture_lost; torture_lost.write_inputs()"
    subprocess.run([sys.executable, "-c", write], check=True)
    whole = torture_lost.Pair([*torture_lost.COMMANDS[kind][0], f"{kind}-whole"])
    assert [whole.wait(i)[0] in (0, 3) for i in range(2)] == [True, True], whole.said
    command = [*torture_lost.COMMANDS[kind][0], "out"]
    pair = torture_lost.Pair(command)
    while not any(Path("out").glob(wanted)) and pair.processes[victim].poll() is None:
        time.sleep(0.05)
    pair.processes[victim].send_signal(signal.SIGKILL)
    pair.wait(victim)
    code, lines = pair.wait(1 - victim)
    assert code == 1 and torture_lost.told(lines, victim, pair.processes[victim].pid), lines
    assert any(re.search(resumes, line) for line in lines), lines
    assert torture_lost.rerun(kind, command) == "bytes identical"
