"""Studies and series of a DICOMweb server -> the addresses of their instances."""

from collections.abc import Iterator

from medsiglip_jax.files import dicomweb
from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess.facts import Refused, UnreadableImage, describe

MOST = 1 << 20  # instances of one study or series


def instances(address: str) -> list[str]:
    """The addresses of the instances of a study or series, by series and number; that of an
    instance itself.

    Raises:
        ValueError: its server refuses, or does not answer as DICOMweb has it, or there are none.
        Outage: the network fails.
    """
    if dicomweb.is_instance(address):
        return [dicomweb.over_https(address)]
    listed = sorted(set(_listed(address)))
    if not listed:
        raise ValueError(f"{describe(address)}: no instances")
    study = dicomweb.study(address)
    return [f"{study}series/{series}/instances/{uid}" for series, _, uid in listed]


def _listed(address: str) -> Iterator[tuple[str, int, str]]:
    """Asks page by page until one has nothing new: servers have limits of their own, and some know
    no pages."""
    seen: set[str] = set()
    while len(seen) < MOST:
        new = [i for i in _page(address, len(seen)) if i[2] not in seen]
        if not new:
            return
        yield from new
        seen |= {uid for *_, uid in new}
    raise ValueError(f"{describe(address)}: more than {MOST:,} instances")


def _page(address: str, offset: int) -> list[tuple[str, int, str]]:
    try:
        return dicomweb.listed(address, content.read_bytes(dicomweb.query(address, offset)))
    except UnreadableImage as error:
        refused = isinstance(error, Refused) and ("401" in error.reason or "403" in error.reason)
        advice = f"; {dicomweb.advice(dicomweb.over_https(address))}" if refused else ""
        raise ValueError(f"{describe(address)}: {error.reason}{advice}") from None
    except dicomweb.NotSet:
        raise
    except ValueError as error:
        raise ValueError(f"{describe(address)}: {error}") from None
