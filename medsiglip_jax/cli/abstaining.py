"""The flags of commands that give no answer for images which a reference does not know."""

import argparse
from collections.abc import Callable
from typing import Any

from medsiglip_jax.cli.parser import Parser, add_flags

_AT = 0.99
_FLAGS = {
    "--reference FILE": "file of monitor fit: images unlike those that it knows get no_assist with "
    "the reason",
    "--abstain-at X": f"share of known images that do get an answer, default {_AT}",
}
_UNSURE = {
    "--unsure LOW HIGH": "also no answer where the probability of any finding lies between these "
    "two, or the highest of exclusive classes is below HIGH; needs --reference",
}


def add_abstention(sub: Parser, unsure: bool = False) -> None:
    """Flags of `abstention`; with `unsure` also that for calibrated probabilities."""
    group = sub.add_argument_group("no answer for unknown images")
    add_flags(group, _FLAGS, abstain_at=float)
    if unsure:
        add_flags(group, _UNSURE, unsure={"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")})


def known_images(args: argparse.Namespace) -> Any:
    """The `KnownImages` of --reference, or None without it; read before anything that takes long.

    Raises:
        ValueError: other flags are given without it, or it is no reference.
    """
    from medsiglip_jax.inference.abstain import open_reference

    if args.reference is not None:
        known = open_reference(args.reference)
        limits(args, known)  # fail now if the flags are wrong
        return known
    if args.abstain_at is not None or getattr(args, "unsure", None) is not None:
        raise ValueError(
            "--abstain-at and --unsure need --reference FILE, which monitor fit writes"
        )
    return None


def abstention(args: argparse.Namespace, known: Any, made: Callable[[], Any]) -> Any:
    """The `Abstention` for embeddings that are made in a way, or None.

    Args:
        args: with the flags.
        known: of `known_images`.
        made: gives the `Provenance` of the embeddings, for which all weights may be hashed; called
            only if there is a reference.

    Raises:
        ValueError: the reference is of other weights, pixels or rules.
    """
    from medsiglip_jax.trust import known as trust

    if known is not None:
        trust.check(known, made(), args.reference)
    return limits(args, known)


def limits(args: argparse.Namespace, known: Any) -> Any:
    """The same without a look at how the embeddings are made."""
    if known is None:
        return None
    unsure = getattr(args, "unsure", None)
    at = _AT if args.abstain_at is None else args.abstain_at
    return known.abstention(at, tuple(unsure) if unsure else None)
