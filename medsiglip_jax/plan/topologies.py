"""Devices to plan for, by name: TPU slices and hosts with NVIDIA cards."""

from collections.abc import Mapping
from typing import Any

from medsiglip_jax.files import settings
from medsiglip_jax.plan import gpus, tpus

GIB = tpus.GIB
Topology = tpus.Slice | gpus.Hosts


def parse(name: str, cards: Mapping[str, gpus.Card] | None = None) -> Topology:
    """Reads the name of a TPU slice, "v5e:4x4", or of NVIDIA cards, "h100-8".

    Args:
        name: see `tpus.parse` and `gpus.parse`.
        cards: name -> card; default those of `gpus.bundled`.

    Raises:
        ValueError: there is no such topology.
    """
    cards = gpus.bundled() if cards is None else cards
    if gpus.card_of(name, cards):
        return gpus.parse(name, cards)
    try:
        return tpus.parse(name)
    except ValueError as error:
        if ":" in name or name.lower().partition("-")[0] in tpus.CHIPS:
            raise
        raise ValueError(f"{error}; or an NVIDIA card, {', '.join(cards)}: h100-8") from None


def from_dict(topology: Mapping[str, Any]) -> Topology:
    """The inverse of `to_dict` of a topology."""
    cards = {key: settings.build(gpus.Card, card) for key, card in topology["cards"].items()}
    return parse(topology["name"], cards)


def shown(size: int | None) -> str:
    """Bytes in GiB or MiB, to be read by people."""
    if size is None:
        return "unknown"
    return f"{size / GIB:.2f} GiB" if abs(size) >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
