r"""Full contrastive fine-tuning on a Cloud TPU slice of several hosts, large batch.

    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="medsiglip-jax finetune \
      --distributed --config tpu_slice --workdir gs://BUCKET/run \
      --config.data.path=gs://BUCKET/train.parquet"

It is started once on every worker, with the same arguments. Parameters, gradients and optimiser
state are split over all chips (FSDP). The texts travel from chip to chip for the loss, so that no
chip holds all of them or a matrix of all pairs. Adafactor, with which SigLIP was trained, keeps
half a float per weight.

The batch is encoded in 4 pieces, with the negatives of all of it (GradCache): one piece is 64
examples on each chip of a v5e-16.

Expect the first step to take minutes (compilation), and every later one the same time: at least
6.4 s on a v5e-16, which its matrix products take at the peak.

Hardware: v5e-16 (16 GiB a chip, of which this takes 10.1; 2 pieces need at least 16.1), or as many
chips of v4, v5p or v6e. On twice the chips half the pieces are enough. These are figures of
`medsiglip-jax plan --topology v5e-16`, not measurements. The batch must be a multiple of chips
times pieces. FSDP works on up to 128 chips, because 256 divide no width of the model.
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
    config.objective = ConfigDict(dict(name="contrastive", accumulate=4, negatives="batch"))
    config.optimizer = ConfigDict(
        dict(name="adafactor", schedule="rsqrt", warmup_steps=500, cooldown_steps=500, b2=0.95,
             weight_decay=1e-6)
    )  # fmt: skip
    config.learning_rate = 1e-5
    config.mesh = ConfigDict(dict(fsdp=True))
    config.remat = "block"
    config.dtype = "bfloat16"
    config.loss_chunk = 1024
    config.checkpoint_every = 500
    return config
