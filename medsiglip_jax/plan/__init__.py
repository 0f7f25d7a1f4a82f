"""Whether a run fits TPUs or GPUs, and what bounds its speed: its step, compiled without them."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, verdict="Question max_batch sweep", topologies="Topology", tpus="Chip", gpus="Card",
    program="", bound="", collectives="Collective",
)  # fmt: skip
