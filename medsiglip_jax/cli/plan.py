"""plan: whether a run fits devices that need not be here, and what it would cost."""

import argparse
import dataclasses
from typing import Any

from medsiglip_jax.cli.output import note, show, table
from medsiglip_jax.cli.parser import REQUIRED, Parser, add_config, add_flags, refuse_unused
from medsiglip_jax.plan.topologies import shown

_FLAGS = {
    "--topology T...": "TPUs: v5e:4x4, or v5e-16 as Cloud TPU names it, or v5e:4x4*2 for two "
    "slices; NVIDIA cards: h100, or h100-8 for a host with 8, or h100-8*4 for four hosts; several "
    "are compared in one table",
    "--card FILE": "take cards from a file in the form of plan/cards.toml, too",
    "--embed": "embed images instead of training: the computation of the image tower, beside the "
    "weights of both towers",
    "--dtype T": "with --embed: data type to compute with, instead of the config's; also float16",
    "--quick": "TPUs: tell only the least memory needed, in seconds",
    "--max-batch": "find the largest batch that fits",
    "--sweep": "compare recomputation policies, too",
    "--remat R...": "recompute so in the backward pass, instead of as in the config; several are "
    "compared in one table",
    "--no-advice": "do not search for changes that make it fit",
    "--examples N": "report the chip-hours for N examples",
    "--utilisation U": "share of the chip's peak that the chip-hours assume, default 0.4; measure "
    "your own",
}


def define_flags(sub: Parser) -> None:
    add_config(sub)
    several = {"action": "extend"}
    remat = {"choices": ("none", "dots", "block"), **several}
    add_flags(sub, _FLAGS, topology=several | REQUIRED, remat=remat, examples=int, utilisation=0.4)


def plan(args: argparse.Namespace) -> int:
    """Tell whether a run fits TPUs or GPUs and what it would cost; needs neither.
    Compiles the real train step for them, and reports its memory and communication.
    TPU generations: v4, v5e, v5p, v6e, 7x; a whole compilation takes minutes and
    2 GB, and --quick tells in seconds the least memory that is needed. NVIDIA cards:
    h100, h200, b200, a100-80, a100-40, a6000, l4, l40s, a10g, rtx4090, t4; half a
    minute and 2 GB. The exit code is 0 also when the run does not fit, for that is an
    answer. --config.KEY=VALUE changes a key of the config.

    example:
      medsiglip-jax plan --config tpu_slice --topology v5e:4x4
      medsiglip-jax plan --config contrastive --topology h100 --config.batch_size=32
      medsiglip-jax plan --config lora --topology v5e:2x2 --max-batch
      medsiglip-jax plan --config contrastive --topology v5e-16 v6e-16 h100-8 --sweep --quick
    """
    from medsiglip_jax.plan import bound, gpus, topologies, verdict
    from medsiglip_jax.train import configs

    if args.examples is None:
        refuse_unused(args, "without --examples", ("utilisation",))
    bound.check(1 if args.examples is None else args.examples, args.utilisation)
    recipe = configs.read(args.config, args.overrides)
    if args.dtype and not args.embed:
        raise ValueError("--dtype is for --embed; a train step takes --config.dtype")
    if args.embed:  # there is no backward pass
        if args.remat:
            raise ValueError("--remat is of a backward pass, and --embed has none")
        recipe = dataclasses.replace(recipe, remat="none", dtype=args.dtype or recipe.dtype)
    cards = gpus.read(args.card) if args.card else None
    places = [topologies.parse(name, cards) for name in args.topology]
    remats = args.remat or [recipe.remat]
    if args.sweep and not args.remat and not args.embed:
        remats = ["none", "dots", "block"]
    several = args.sweep or len(places) > 1 or len(remats) > 1
    if several and args.max_batch:
        raise ValueError("--max-batch takes one topology, one --remat and no --sweep")
    for place in places:
        place.check_installed()
    recipe = dataclasses.replace(recipe, remat=remats[0])
    question = verdict.Question(recipe, places[0], args.embed, args.quick)
    if several:
        plans = verdict.sweep(question, places, remats, note)
        for result in plans:
            place = next(place for place in places if str(place) == result["topology"])
            _add_chip_hours(result, place, args)
        show(plans, args.json, _sweep_text)
    else:
        show(_plan_of_one(question, args), args.json, _text)
    return 0


def _plan_of_one(question, args: argparse.Namespace) -> dict[str, Any]:
    """The plan of one run, with whatever else was asked for."""
    from medsiglip_jax.plan import verdict

    takes = "half a minute"
    if question.topology.quick:
        takes = "seconds" if args.quick else "minutes"
    elif args.quick:
        note("--quick makes no difference for cards: half a minute compiles the whole program")
    note(f"compiling for {question.topology}; this takes {takes}")
    result = verdict.plan(question)
    _add_chip_hours(result, question.topology, args)
    if args.max_batch:
        result["max_batch_per_chip"] = verdict.max_batch(question, note)
    if not result["fits"] and not args.no_advice:
        result["advice"] = verdict.advice(question, note)
    return result


def _add_chip_hours(result: dict[str, Any], topology, args: argparse.Namespace) -> None:
    from medsiglip_jax.plan import bound

    if args.examples is not None:
        result["chip_hours"] = bound.chip_hours(
            result["model_flops"], topology, result["dtype"], result["batch_size"],
            args.examples, args.utilisation,
        )  # fmt: skip
        result["examples"], result["utilisation"] = args.examples, args.utilisation


_RESOURCES = {
    "mxu": "MXU", "hbm": "HBM", "ici": "ICI", "tensor_cores": "tensor cores", "fp32": "FP32 units",
    "memory": "memory", "nvlink": "NVLink", "pcie": "PCIe", "network": "network",
}  # fmt: skip


def _text(p: dict[str, Any]) -> str:
    lines = [
        f"{p['topology']}: {p['chips']} {p['unit']}{'s' * (p['chips'] > 1)}, batch "
        f"{p['batch_size']}, {p['batch_size'] / p['chips']:g} a {p['unit']}, remat {p['remat']}: "
        + _verdict(p),
        "",
        *_memory_lines(p),
        *_collective_lines(p),
        f"attention       {p['attention']}",
        *_towers(p),
        *_speed_lines(p),
    ]
    if p["max_batch_per_chip"] is not None:
        limit = "" if p["compiled"] else "at most "  # by the least that it needs
        lines.append(f"largest batch   {limit}{p['max_batch_per_chip']:g} a {p['unit']}")
    if "chip_hours" in p:
        hours = f"{p['unit']}-hours"
        lines.append(
            f"{hours:<16}{p['chip_hours']:,.1f} for {p['examples']:,} examples at "
            f"{p['utilisation']:.0%} of the peak"
        )
    for tried in p.get("advice", []):
        fits, least = ("fits:", "") if tried["compiled"] else ("may fit:", " at the least")
        answer = fits if tried["fits"] else "not enough:"
        lines.append(f"{answer:<11} {tried['change']}  ({shown(tried['peak_bytes'])}{least})")
    return "\n".join(lines)


def _memory_lines(p: dict[str, Any]) -> list[str]:
    """What fills the memory of a device, by how much it is too little, and its largest arrays."""
    parts, unit = p["memory"] or {}, p["unit"]
    rows = [(f"  {name}", shown(size)) for name, size in parts.items() if name != "peak"]
    rows = [("state", shown(p["state_bytes"])), *rows]
    rows.append(("peak" if p["compiled"] else "at the least", shown(p["peak_bytes"])))
    rows.append((f"of {shown(p['hbm_bytes'])}", f"{shown(p['allowed_bytes'])} after 5 % headroom"))
    lines = [*table((f"memory of a {unit}", ""), rows), ""]
    if not p["fits"] and p["peak_bytes"]:
        lines += [f"too much by     {shown(p['peak_bytes'] - p['allowed_bytes'])}", ""]
    if not p["fits"]:
        rows = [(f"  {name}", shown(size)) for name, size in p["largest"].items()]
        lines += [*table((f"largest of a {unit}", ""), rows), ""]
    return lines


def _collective_lines(p: dict[str, Any]) -> list[str]:
    """What the devices send each other."""
    if p["collectives"]:
        rows = [
            (kind, str(c["operations"]), str(c["runs"]), f"{c['bytes'] / 1e9:.3f} GB")
            for kind, c in p["collectives"].items()
        ]
        header = ("collectives", "operations", "runs a step", "received by a device")
        return [*table(header, rows), ""]
    if p["compiled"] and p["collectives"] is None:
        return ["collectives     unknown: libtpu cannot parse this program; no ICI bound", ""]
    return []


def _speed_lines(p: dict[str, Any]) -> list[str]:
    """The operations of a step, and the bounds on its time."""
    bounds = ", ".join(f"{_RESOURCES[name]} {s:.4g} s" for name, s in p["bound"].items())
    lines = [
        f"FLOPs a step    {p['flops'] / 1e12:,.1f} T, {p['model_flops'] / 1e12:,.1f} T without "
        "recomputation; counted from the architecture",
        f"bound           {p['bound_seconds']:.4g} s a step, "
        f"{p['batch_size'] / p['bound_seconds']:,.0f} examples/s ({bounds}); a lower bound on "
        "the time, no prediction",
    ]
    if p["reachable_seconds"] is not None:
        lines.append(
            f"                {p['reachable_seconds']:.4g} s if matrix products are as fast as a "
            "large one was measured to be on such a card"
        )
    return lines


def _towers(p: dict[str, Any]) -> list[str]:
    """What of the model a plan of embedding is about."""
    if "tower" not in p:
        return []
    text = p["text_tower_bytes"]
    beside = f"; the {shown(text)} of the text tower are in memory, unused" if text else ""
    return [f"computes        the image tower alone{beside}"]


def _verdict(p: dict[str, Any]) -> str:
    if not p["fits"]:
        return "does not fit"
    return "fits" if p["compiled"] else "may fit, by the least it needs; omit --quick to be sure"


def _sweep_text(plans: list[dict[str, Any]]) -> str:
    hours = ("chip-hours",) if "chip_hours" in plans[0] else ()
    rows = [
        (
            p["topology"], p["remat"], "yes" if p["fits"] else "no", shown(p["peak_bytes"]),
            shown(p["allowed_bytes"]), f"{p['bound_seconds']:.4g}", p["limit"],
            f"{1e3 * p['chip_seconds_per_example']:.3g}",
            *(f"{p['chip_hours']:,.1f}" for _ in hours),
        )
        for p in plans
    ]  # fmt: skip
    header = ("topology", "remat", "fits", "needs", "of", "bound s", "limit", "chip-ms/example")
    header += hours
    return "\n".join(table(header, rows))
