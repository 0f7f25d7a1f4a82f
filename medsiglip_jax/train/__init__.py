"""Fine-tuning: a recipe is checked, prepared, and run by a loop around the train step."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, recipe="Recipe", configs="", build="PreparedRun prepare", objectives="",
    optim="Optimizer", freeze="Partition", lora="LoRA", step="make_train_step", loop="fit",
    checkpoints="Checkpoints", finetune="", quickstart="",
)  # fmt: skip
