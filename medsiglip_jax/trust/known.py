"""Whether an image is known: a reference file for embeddings that are made now."""

from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.files import places, settings
from medsiglip_jax.files.failures import explained
from medsiglip_jax.inference.abstain import Abstention, KnownImages, open_reference


def open_abstention(
    path: places.Given,
    made: Provenance,
    at: float = 0.99,
    unsure: tuple[float, float] | None = None,
) -> Abstention:
    """Reads a reference and checks that new embeddings can be compared with it.

    Args:
        path: of the file that `monitor fit` wrote.
        made: how the new embeddings are made.
        at, unsure: as `Abstention` has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no reference, of other weights, pixels or rules, or too small for `at`.
    """
    known = open_reference(path)
    check(known, made, path)
    return known.abstention(at, unsure)


def check(known: KnownImages, made: Provenance, path: places.Given, what: str = "images") -> None:
    """Raises ValueError, with what differs, unless new embeddings are made as the reference's."""
    with explained(path, "not a reference that this version can read"):
        wanted = settings.build(Provenance, known.provenance, "provenance")
    wanted.check(made, f"{path}: these {what}")
