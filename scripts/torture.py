"""Faults, many times more than the test suite has time for.

    python scripts/torture.py tests --times 20          # 100 kills, 20,000 mutated images
    python scripts/torture.py tests --times 10 -k kill  # only the kills
    python scripts/torture.py writers                   # every writer under five faults, hours
    python scripts/torture.py writers --rounds 2 --interruptions 1 -k search --json
    python scripts/torture.py kills --folder DIR      # every writer, killed at its writes, hours
    python scripts/torture.py kills --times 40 -k 'embed|card' --folder DIR   # goes on with some
    python scripts/torture.py parts --times 20          # of three processes one is killed
    python scripts/torture.py ray --times 20            # of two Ray actors one is killed
    python scripts/torture.py lost --times 10           # of two hosts one is killed or hangs

`tests` repeats the tests that are marked torture. `writers` is what `torture_writers.py` says; its
exit code is 1 if anything was mixed, lost, changed or left over, as is that of `kills`, which is
what `torture_kills.py` says. `parts` and `ray` are in `torture_shards.py`, `lost` is in
`torture_lost.py`.
"""

import argparse
import os
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    tests = commands.add_parser("tests", help="repeat the tests that kill runs and damage files")
    tests.add_argument(
        "--times", type=int, default=20, help="multiple of what the test suite does; default 20"
    )
    tests.add_argument("-k", default="", metavar="EXPRESSION", help="choose tests, as in pytest")
    tests.set_defaults(run=run_tests)
    writers = commands.add_parser("writers", help="every output of every command under faults")
    writers.add_argument("--rounds", type=int, default=20, help="of two at once; default 20")
    writers.add_argument(
        "--interruptions", type=int, default=20,
        help="full disks, SIGTERMs and SIGKILLs, of each so many; default 20",
    )  # fmt: skip
    writers.add_argument("--seed", type=int, default=0, help="of sizes and moments; default 0")
    writers.add_argument("-k", default="", metavar="WORD", help="only writers whose name holds it")
    writers.add_argument("--json", action="store_true")
    writers.set_defaults(run=run_writers)
    kills = commands.add_parser("kills", help="every writer, killed at its writes, and run again")
    kills.add_argument(
        "--times", type=int, default=40, help="at random moments, and at writes, each; default 40"
    )
    kills.add_argument(
        "-k", default="", metavar="REGEX", help="only writers of such names, as 'embed|card'"
    )
    kills.add_argument(
        "--folder", default="", metavar="DIR",
        help="keep inputs and results here; the same command again goes on where it was stopped",
    )  # fmt: skip
    kills.add_argument("--json", action="store_true", help="all counts, and what was wrong")
    kills.set_defaults(run=run_kills)
    for kind in ("parts", "ray"):
        shards = commands.add_parser(kind, help="processes that share a run, one of them killed")
        shards.add_argument("--times", type=int, default=20, help="rounds; default 20")
        shards.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
        shards.set_defaults(run=run_shards, kind=kind)
    lost = commands.add_parser("lost", help="two processes that train or embed, one of them lost")
    lost.add_argument("--times", type=int, default=10, help="rounds of each command; default 10")
    lost.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    lost.add_argument("-k", default="", metavar="WORD", help="only embed, or only finetune")
    lost.set_defaults(run=run_lost)
    args = parser.parse_args()
    return args.run(args)


def run_tests(args: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "torture", "--optimised", "-v"]
    command += ["--durations=0"]
    command += ["-k", args.k] if args.k else []
    return subprocess.run(
        command, env={**os.environ, "MEDSIGLIP_TORTURE": str(args.times)}
    ).returncode


def run_writers(args: argparse.Namespace) -> int:
    import torture_writers

    return torture_writers.run(args.rounds, args.interruptions, args.seed, args.k, args.json)


def run_kills(args: argparse.Namespace) -> int:
    import torture_kills

    return torture_kills.run(args.times, args.k, args.folder, args.json)


def run_shards(args: argparse.Namespace) -> int:
    import torture_shards

    return torture_shards.run(args.kind, args.times, args.seed)


def run_lost(args: argparse.Namespace) -> int:
    import torture_lost

    return torture_lost.run(args.times, args.seed, args.k)


if __name__ == "__main__":
    sys.exit(main())
