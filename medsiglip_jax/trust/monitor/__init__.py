"""Has something changed: windows of new embeddings against a reference that is in control."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(__name__)
