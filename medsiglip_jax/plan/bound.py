"""What a step cannot be faster than, whatever the program: a bound, and no prediction."""

from collections.abc import Mapping
from typing import Any

from medsiglip_jax.plan.topologies import Topology


def seconds(answer: Mapping[str, Any], topology: Topology) -> dict[str, float]:
    """The bounds of one step, by what limits it; the step's is the largest.

    "mxu": its matrix products at the bfloat16 peak, float32's being slower. "hbm": its arguments
    read once and its results written once, as if activations never left the chip. "ici": what a
    device receives, over all its links at once; between slices the network is slower. Of a program
    that did not compile the last is not known and left out.

    Args:
        answer: of `worker.ask`.
        topology: that was asked for.
    """
    chip = topology.chip
    memory = answer.get("memory")
    moved = memory["arguments"] + memory["outputs"] if memory else answer["state_bytes"]
    flops = answer["flops"]["model"] + answer["flops"]["again"]
    bounds = {
        "mxu": flops / topology.chips / chip.flops,
        "hbm": moved * chip.devices / chip.hbm_bandwidth,
    }
    if (found := answer.get("collectives")) is not None:
        received = sum(c["bytes"] for c in found.values())
        bounds["ici"] = received * chip.devices / chip.ici_bandwidth
    return bounds


def chip_hours(
    model_flops: float, topology: Topology, batch: int, examples: int, utilisation: float
) -> float:
    """Chip-hours for so many examples at a share `utilisation` of the peak, recomputation not
    counted as use: what is published as model FLOPs utilisation (MFU).

    Args:
        model_flops: of a step.
        topology: for its chip.
        batch: examples of a step.
        examples: in all.
        utilisation: more than 0, at most 1.
    """
    return model_flops / batch * examples / (topology.chip.flops * utilisation) / 3600


def check(examples: int, utilisation: float) -> None:
    """Raises ValueError for a utilisation that is none, or no examples."""
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation is {utilisation}; expected a share of the peak, 0 to 1")
    if examples < 1:
        raise ValueError(f"examples is {examples}; expected at least 1")
