"""The tables of README.md: do the recipes in configs/ fit TPUs or GPUs, with what batch, how fast.

    python scripts/plan_table.py                     # about an hour of a core, 2 GB; needs libtpu
    python scripts/plan_table.py --topology v6e-16 --quick
    python scripts/plan_table.py --topology h100 l40s l4 h100-8    # needs jax[cuda12]

Finished rows are kept in the file --cache, so that an interrupted run resumes.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from medsiglip_jax.plan import topologies, verdict
from medsiglip_jax.train import configs

FSDP = ("--config.mesh.fsdp=True", "--config.remat=block", "--config.batch_size=256")
ROWS = (
    ("lora", ()), ("classification", ()), ("frozen_image", ()), ("contrastive", ()),
    ("contrastive", FSDP), ("tpu_slice", ()),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", nargs="+", default=["v5e-4", "v5e-16"])
    parser.add_argument("--quick", action="store_true", help="only the lower bound on memory")
    parser.add_argument("--cache", default="plan_table.jsonl", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = [
        (name, flags, where) for name, flags in ROWS for where in args.topology
        if topologies.parse(where).devices > 1 or not (flags or name == "tpu_slice")
    ]  # fmt: skip
    found = [_kept(args.cache, args.quick, *row) for row in rows]
    print("| recipe (batch) | devices | memory of each, GiB | largest batch of each | bound, s |")
    print("|---|---|---|---|---|")
    for row in found:
        print("| " + " | ".join(_cells(row)) + " |")


def _kept(cache: Path, quick: bool, name: str, flags: tuple[str, ...], where: str) -> dict:
    key = [name, list(flags), where, quick]
    lines = cache.read_text().splitlines() if cache.exists() else []
    for row in map(json.loads, lines):
        if row["key"] == key:
            return row
    row = {"key": key, **_row(quick, name, flags, where)}
    with cache.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _row(quick: bool, name: str, flags: tuple[str, ...], where: str) -> dict:
    """Compiles the whole step only if the lower bound on its memory fits."""
    say = lambda line: print(f"{name} {where}: {line}", file=sys.stderr, flush=True)  # noqa: E731
    asked = configs.read(name, list(flags))
    question = verdict.Question(asked, topologies.parse(where), quick=True)
    result = verdict.plan(question)
    if result["fits"] and not quick and not result["compiled"]:
        result = verdict.plan(dataclasses.replace(question, quick=False))
    say(f"{result['peak_bytes']:,} bytes, compiled {result['compiled']}")
    keys = ("fits", "compiled", "peak_bytes", "bound_seconds", "batch_size", "limit")
    return {key: result[key] for key in keys} | {"largest": verdict.max_batch(question, say)}


def _cells(row: dict) -> tuple[str, ...]:
    name, flags, where, _ = row["key"]
    changed = [flag.removeprefix("--config.") for flag in flags if "batch_size" not in flag]
    said = f" {topologies.shown(row['peak_bytes'])}".removesuffix(" GiB")
    kind = ("fits:" if row["fits"] else "no:") if row["compiled"] else "at the least"
    return (
        f"`{name}` ({row['batch_size']:,}{''.join(f', `{c}`' for c in changed)})", where,
        ("" if row["fits"] or row["compiled"] else "no, ") + kind + said,
        f"{row['largest']:g}" if row["largest"] else "none", f"{row['bound_seconds']:.3g}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
