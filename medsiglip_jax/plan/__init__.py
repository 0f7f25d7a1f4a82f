"""Whether a run fits a TPU slice, and what bounds its speed: its step, compiled without a TPU."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, verdict="Question max_batch sweep", topologies="Chip Topology", program="", bound="",
    collectives="Collective",
)  # fmt: skip
