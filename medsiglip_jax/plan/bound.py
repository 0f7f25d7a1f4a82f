"""Lower bounds on the time of a step that hold for every program; they are no predictions."""

from collections.abc import Mapping
from typing import Any

from medsiglip_jax.plan.topologies import Topology


def seconds(answer: Mapping[str, Any], topology: Topology) -> dict[str, float]:
    """The bounds on one step by resource; the largest is the bound on the step.

    "mxu": its matrix products at the bfloat16 peak; float32 is slower. "hbm": its arguments read
    once and its results written once, as if activations never left the chip. "ici": what a device
    receives, over all its links at once; between slices the network is slower. "ici" is left out
    for a program that was not compiled, for which it is not known.

    Args:
        answer: what `worker.ask` returned.
        topology: the devices of the step.
    """
    chip = topology.chip
    memory = answer.get("memory")
    moved = memory["arguments"] + memory["outputs"] if memory else answer["state_bytes"]
    flops = answer["flops"]["model"] + answer["flops"]["recomputed"]
    bounds = {
        "mxu": flops / topology.chips / chip.flops,
        "hbm": moved * chip.devices / chip.hbm_bandwidth,
    }
    if (collectives := answer.get("collectives")) is not None:
        received = sum(c["bytes"] for c in collectives.values())
        bounds["ici"] = received * chip.devices / chip.ici_bandwidth
    return bounds


def chip_hours(
    model_flops: float, topology: Topology, batch: int, examples: int, utilisation: float
) -> float:
    """Chip-hours to train on so many examples at a given utilisation of the chips.

    Args:
        model_flops: operations of a step, without recomputation.
        topology: names the chip.
        batch: examples of a step.
        examples: number of examples in all.
        utilisation: share of the peak, more than 0 and at most 1, recomputation not counted: model
            FLOPs utilisation (MFU), as it is published.
    """
    return model_flops / batch * examples / (topology.chip.flops * utilisation) / 3600


def check(examples: int, utilisation: float) -> None:
    """Raises ValueError for an impossible utilisation or number of examples."""
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation is {utilisation}; expected a share of the peak, 0 to 1")
    if examples < 1:
        raise ValueError(f"examples is {examples}; expected at least 1")
