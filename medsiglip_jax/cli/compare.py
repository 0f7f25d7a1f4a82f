"""The command `compare`."""

import argparse
from typing import Any

from medsiglip_jax.cli import outputs
from medsiglip_jax.cli.output import note, show, table
from medsiglip_jax.cli.parser import Parser, add_flags

_FLAGS = {
    "first A": "output folder of evaluate",
    "second B": "another one; differences are B minus A",
    "--output FILE": "write the tables as Markdown, .md",
    "--scores FILE": "which file of both folders to compare; default scores.parquet",
    "--allow-missing": "compare the images that both have; default: stop where one lacks some",
    "--resamples N": "default 2000",
    "--seed N": "of the bootstrap",
}


def define_flags(sub: Parser) -> None:
    add_flags(sub, _FLAGS, resamples=2000, seed=0)
    outputs.add_overwrite(sub, output=outputs.begins_with("# Comparison of two evaluations\n"))


def compare(args: argparse.Namespace) -> int:
    """Whether one of two evaluations is better, class by class. Both must be of the
    same images and labels. Differences are paired, by patient where patients are
    known.

    example:
      medsiglip-jax compare zero_shot fine_tuned --output comparison.md
      medsiglip-jax compare big_vision serving --json
    """
    from medsiglip_jax.evaluate import scores
    from medsiglip_jax.evaluate.results.comparison import compare as run

    comparison = run(
        args.first, args.second, file=args.scores or scores.FILE, allow_missing=args.allow_missing,
        resamples=args.resamples, seed=args.seed,
    )  # fmt: skip
    if args.output:
        _write(args.output, comparison)
    show(comparison, args.json, _text)
    lost = comparison["left_out"]
    if any(lost.values()):
        only_b = f"{lost['second']:,} that only B has"
        note(f"went on without {lost['first']:,} images that only A has and {only_b}")
    return 3 if any(lost.values()) else 0


def _write(output: str, comparison: dict[str, Any]) -> None:
    from medsiglip_jax.evaluate.report.comparison import markdown
    from medsiglip_jax.files import places, storage

    with storage.new_file(places.at(output)) as partial:
        partial.write_text(markdown(comparison), encoding="utf-8")


def _text(comparison: dict[str, Any]) -> str:
    from medsiglip_jax.evaluate.report.comparison import sections

    return "\n\n".join(
        "\n".join(filter(None, [section.title, section.text, *table(section.header, section.rows)]))
        for section in sections(comparison)
    )
