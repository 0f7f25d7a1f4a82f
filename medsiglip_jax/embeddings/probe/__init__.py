"""A linear classifier on embeddings."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, linear="Probe fit open_probe", learning="few_shot learning_curve", fitting="",
    prediction="", features="Features", scaling="Scaling",
)  # fmt: skip
