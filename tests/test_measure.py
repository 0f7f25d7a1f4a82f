"""The limit on CPU time of scripts/measure.py."""

import signal
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_only_what_computes_meets_a_limit_on_cpu_time():
    """Waiting for longer than the limit is what a busy machine makes of every block."""

    def ended(block):
        code = f"import time, measure\nwith measure.cpu_limit(0.2):\n    {block}\nprint('on')"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True)

    waited = ended("time.sleep(0.5)")
    assert (waited.returncode, waited.stdout) == (0, "on\n")
    computed = ended("sum(iter(int, 1))")
    assert computed.returncode == -signal.SIGPROF and "most recent call first" in computed.stderr
