"""What can be done with the files that embed wrote: search, near duplicates, probes."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, store="ArrayVectors Embeddings", provenance="Provenance", nearest="", index="",
    search="", near_duplicates="", probe="",
)  # fmt: skip
