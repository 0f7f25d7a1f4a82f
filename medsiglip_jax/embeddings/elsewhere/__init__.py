"""Vectors that other programs made, read as if `embed` had written them."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(__name__, formats="open_embeddings FORMATS", found="Found")
