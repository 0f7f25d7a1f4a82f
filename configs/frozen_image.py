r"""LiT: the image tower stays as it is, the text tower learns to describe it (arXiv 2111.07991).

    medsiglip-jax finetune --config frozen_image --workdir runs/lit \
      --config.data.path=train.csv

For new vocabulary or another language with the same kind of images. The image tower has no gradient
and no optimiser state, and image embeddings that were made before stay valid.

Hardware: one GPU of 24 GB, for the text tower costs a twentieth of the image tower, of which only
the forward pass is left. Expect a third of the time of full fine-tuning.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    """`arg`: the checkpoint to start from."""
    config = ConfigDict()
    config.init = arg or "google/medsiglip-448"
    config.data = ConfigDict(dict(path="train.csv", image="image", text="text", positives="text"))
    config.validation = 0.1
    config.batch_size = 256
    config.total_steps = 2000
    config.seed = 0
    config.freeze = ("img/.*",)
    config.objective = ConfigDict(dict(name="contrastive", accumulate=4, negatives="batch"))
    config.optimizer = ConfigDict(
        dict(name="adamw", schedule="cosine", warmup_steps=100, weight_decay=1e-6)
    )
    config.learning_rate = 5e-5
    config.dtype = "bfloat16"
    config.loss_chunk = 1024
    config.eval_every = 500
    config.checkpoint_every = 500
    return config
