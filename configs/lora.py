r"""Low-rank adapters in every block of both towers: for one GPU, or for little data.

    medsiglip-jax finetune --config lora --workdir runs/lora \
      --config.data.path=train.csv --config.lora.rank=16

At rank 16, 17.4 million adapter weights train beside the 878 million frozen ones, so that gradients
and optimiser state take 0.2 GB instead of 10. In the export the adapters are merged: it is an
ordinary checkpoint.

Hardware: one GPU of 24 GB in bfloat16 with remat "block". Expect to need a higher learning rate and
more steps than for full fine-tuning.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    """`arg`: the checkpoint to start from."""
    config = ConfigDict()
    config.init = arg or "google/medsiglip-448"
    config.data = ConfigDict(dict(path="train.csv", image="image", text="text", positives="text"))
    config.validation = 0.1
    config.batch_size = 64
    config.total_steps = 1000
    config.seed = 0
    config.lora = ConfigDict(dict(rank=16, alpha=16.0))
    config.objective = ConfigDict(dict(name="contrastive", accumulate=1, negatives="batch"))
    config.optimizer = ConfigDict(dict(name="adamw", schedule="cosine", warmup_steps=50))
    config.learning_rate = 2e-4
    config.dtype = "bfloat16"
    config.remat = "block"
    config.loss_chunk = 1024
    config.eval_every = 200
    config.checkpoint_every = 200
    return config
