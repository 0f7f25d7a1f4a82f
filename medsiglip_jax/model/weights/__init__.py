"""Checkpoints: what every layout shares, one file per layout, and `layouts` that opens them all."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, checkpoint="Checkpoint CheckpointError Layout Leaf",
    layouts="LAYOUTS WRITABLE digest open_checkpoint", reading="load_params", copies="",
    huggingface="", peft="", big_vision="", orbax="", hub="",
    positions="resize_positions", random="init_params",
)  # fmt: skip
