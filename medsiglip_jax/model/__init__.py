"""Both towers, their weights, and the model object that people load."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, api="Model compute_for describe init load save", processor="Processor",
    config="ModelConfig TextConfig VisionConfig named two_towers",
    sharding="batch_sharding make_mesh param_shardings", processes="allgather_int run_on",
    towers="Compute", attention="ATTENTION", tree="", weights="",
)  # fmt: skip
