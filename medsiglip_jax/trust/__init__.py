"""What a hospital asks before it trusts an embedding: why this score, and is this image known."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, explanation="ExplainOptions Explainer Explanation explain",
)  # fmt: skip
