"""Kills runs and damages files, many times more than the test suite does.

python scripts/torture.py --times 20          # 100 kills, 20,000 mutated images
python scripts/torture.py --times 10 -k kill  # only the kills
"""

import argparse
import os
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--times", type=int, default=20, help="multiple of what the test suite does; default 20"
    )
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="choose tests, as in pytest")
    args = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "torture", "--optimised", "-v"]
    command += ["--durations=0"]
    command += ["-k", args.k] if args.k else []
    return subprocess.run(
        command, env={**os.environ, "MEDSIGLIP_TORTURE": str(args.times)}
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
