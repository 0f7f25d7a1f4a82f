"""Lower bounds on the time of a step that hold for every program; they are no predictions."""

from collections.abc import Mapping
from typing import Any

from medsiglip_jax.plan.topologies import Topology


def seconds(answer: Mapping[str, Any], topology: Topology, dtype: str) -> dict[str, float]:
    """The bounds on one step by resource; the largest is the bound on the step.

    "mxu" of a TPU, "tensor_cores" or "fp32" of a GPU: its matrix products at the peak. "hbm" or
    "memory": its arguments read once and its results written once, as if activations never left the
    chip. "ici", "nvlink" or "pcie" and "network": what a device receives; these are left out for a
    program that was not compiled, for which they are not known.

    Args:
        answer: what `worker.ask` returned.
        topology: the devices of the step.
        dtype: of the matrix products.
    """
    memory = answer.get("memory")
    moved = memory["arguments"] + memory["outputs"] if memory else answer["state_bytes"]
    flops = answer["flops"]["model"] + answer["flops"]["recomputed"]
    bounds = topology.compute_bound(flops, dtype) | topology.memory_bound(moved)
    if (collectives := answer.get("collectives")) is not None:
        bounds |= topology.links_bound(sum(c["bytes"] for c in collectives.values()))
    return bounds


def reachable(bounds: Mapping[str, float], topology: Topology, dtype: str) -> float | None:
    """The bound on a step if matrix products are as fast as a large one in half precision was
    measured to be; None for float32, and for devices on which nobody has measured it."""
    share = topology.measured
    if share is None or dtype == "float32":
        return None
    compute = topology.compute_bound(1.0, dtype).keys()
    return max(s / share if name in compute else s for name, s in bounds.items())


def chip_hours(
    model_flops: float, topology: Topology, dtype: str, batch: int, examples: int,
    utilisation: float,
) -> float:  # fmt: skip
    """Chip-hours to train on so many examples at a given utilisation of the chips.

    Args:
        model_flops: operations of a step, without recomputation.
        topology: names the chip.
        dtype: of the matrix products.
        batch: examples of a step.
        examples: number of examples in all.
        utilisation: share of the peak, more than 0 and at most 1, recomputation not counted: model
            FLOPs utilisation (MFU), as it is published.
    """
    at_peak = topology.chips * sum(topology.compute_bound(model_flops, dtype).values())
    return at_peak / batch * examples / utilisation / 3600


def check(examples: int, utilisation: float) -> None:
    """Raises ValueError for an impossible utilisation or number of examples."""
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation is {utilisation}; expected a share of the peak, 0 to 1")
    if examples < 1:
        raise ValueError(f"examples is {examples}; expected at least 1")
