"""Whether an image is known: a reference file for embeddings that are made now."""

from medsiglip_jax.embeddings.provenance import Provenance
from medsiglip_jax.files import places, settings
from medsiglip_jax.files.failures import explained
from medsiglip_jax.inference.abstain import KnownImages


def check(known: KnownImages, made: Provenance, path: places.Given, what: str = "images") -> None:
    """Raises ValueError, with what differs, unless new embeddings are made as the reference's."""
    with explained(path, "not a reference that this version can read"):
        wanted = settings.build(Provenance, known.provenance, "provenance")
    wanted.check(made, f"{path}: these {what}")
