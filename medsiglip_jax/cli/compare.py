"""compare: whether one of two evaluations is better."""

import argparse
from collections.abc import Sequence
from typing import Any

from medsiglip_jax.cli import outputs
from medsiglip_jax.cli.output import note, show, table
from medsiglip_jax.cli.parser import Parser, add_flags

_FLAGS = {
    "first A": "output folder of evaluate",
    "second B...": "another one, or several; differences are B minus A",
    "--output FILE": "write the tables as Markdown, .md",
    "--scores FILE": "which file of all folders to compare; default scores.parquet",
    "--allow-missing": "compare the images that both have; default: stop where one lacks some",
    "--margin AUC": "also say where B is not inferior to A by this margin, such as 0.02",
    "--resamples N": "number of resamples of the bootstrap of F1, kappa and the like; default 2000",
    "--seed N": "seed of the bootstrap",
}


def define_flags(sub: Parser) -> None:
    add_flags(sub, _FLAGS, resamples=2000, seed=0, margin=float)
    outputs.add_overwrite(sub, output=outputs.begins_with("# Comparison of two evaluations\n"))


def compare(args: argparse.Namespace) -> int:
    """Whether one of two evaluations is better, class by class. Both must be of the
    same images and labels. Differences are paired, by patient where patients are
    known. With more than two, each is compared with the first, and p-values are
    adjusted for all of them together; --json then has a list of comparisons.

    example:
      medsiglip-jax compare zero_shot fine_tuned --output comparison.md
      medsiglip-jax compare zero_shot probe fine_tuned --margin 0.02
      medsiglip-jax compare big_vision serving --json
    """
    from medsiglip_jax.evaluate import scores
    from medsiglip_jax.evaluate.results.comparison import compare as compare_two
    from medsiglip_jax.evaluate.results.comparison import compare_all

    options: dict[str, Any] = dict(
        file=args.scores or scores.FILE, allow_missing=args.allow_missing, margin=args.margin,
        resamples=args.resamples, seed=args.seed,
    )  # fmt: skip
    if len(args.second) == 1:
        comparisons = [compare_two(args.first, args.second[0], **options)]
    else:
        comparisons = compare_all(args.first, args.second, **options)
    if args.output:
        _write(args.output, comparisons)
    show(
        comparisons[0] if len(comparisons) == 1 else comparisons,
        args.json,
        lambda _: _text(comparisons),
    )
    return 3 if sum(map(_left_out, comparisons)) else 0


def _left_out(comparison: dict[str, Any]) -> int:
    """Says how many images were left out, and counts them."""
    lost = comparison["left_out"]
    if any(lost.values()):
        only_b = f"{lost['second']:,} that only {comparison['second']} has"
        note(f"went on without {lost['first']:,} images that only A has and {only_b}")
    return sum(lost.values())


def _write(output: str, comparisons: Sequence[dict[str, Any]]) -> None:
    from medsiglip_jax.evaluate.report.comparison import markdown
    from medsiglip_jax.files import places, storage

    with storage.new_file(places.at(output)) as partial:
        partial.write_text(markdown(*comparisons), encoding="utf-8")


def _text(comparisons: Sequence[dict[str, Any]]) -> str:
    from medsiglip_jax.evaluate.report.comparison import all_sections

    return "\n\n".join(
        "\n".join(filter(None, [section.title, section.text, *table(section.header, section.rows)]))
        for section in all_sections(comparisons)
    )
