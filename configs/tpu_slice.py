r"""Full contrastive fine-tuning on a Cloud TPU slice of several hosts, large batch.

    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="medsiglip-jax finetune \
      --distributed --config configs/tpu_slice.py --workdir gs://BUCKET/run \
      --config.data.path=gs://BUCKET/train.parquet"

Started once on every worker, with the same arguments. Parameters, gradients and optimiser state are
split over all chips (FSDP), the loss rings over them: no chip holds all texts or a matrix of all
pairs. Adafactor keeps half a float per weight, as SigLIP was trained.

Expect the first step to take minutes (compilation), and every later one the same time.

Hardware: v5e-16 and up, v4, v5p, v6e. The batch must be a multiple of the number of chips.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    """`arg`: the checkpoint to start from."""
    config = ConfigDict()
    config.init = arg or "google/medsiglip-448"
    config.data = ConfigDict(
        dict(path="train.parquet", image="image", text="text", positives="text")
    )
    config.batch_size = 4096
    config.total_steps = 5000
    config.seed = 0
    config.objective = ConfigDict(dict(name="contrastive", accumulate=1, negatives="batch"))
    config.optimizer = ConfigDict(
        dict(name="adafactor", schedule="rsqrt", warmup_steps=500, cooldown_steps=500, b2=0.95,
             weight_decay=1e-6)
    )  # fmt: skip
    config.learning_rate = 1e-5
    config.mesh = ConfigDict(dict(model=1, fsdp=True))
    config.remat = "block"
    config.dtype = "bfloat16"
    config.loss_chunk = 1024
    config.checkpoint_every = 500
    return config
