r"""Contrastive fine-tuning of both towers on image-text pairs: everything trains.

    medsiglip-jax finetune --config contrastive --workdir runs/contrastive \
      --config.data.path=train.csv

`train.csv` has the columns image (a path) and text, and optionally split (train, validation) and
group (a patient or study, which stays on one side of the split). Equal texts count as positive
pairs. A data set that TFDS has prepared is given as tfds:NAME, with data.image and data.text naming
its features.

Hardware: one GPU of 80 GB in bfloat16 with remat "dots" for batches of 64 and more, or a TPU slice
(recipe tpu_slice). Parameters, gradients and AdamW's moments of 878 million weights are 14 GB.
Expect: with 282 steps of 64 on the 9 tissue classes of NCT-CRC-HE-100K, the official notebook
raises the accuracy on CRC-VAL-HE-7K from 0.49 to 0.96. Its loss cannot fall below 1.24 there,
because images of a class count as negatives of each other's caption; `positives` avoids that.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    """`arg`: the checkpoint to start from."""
    config = ConfigDict()
    config.init = arg or "google/medsiglip-448"
    config.data = ConfigDict(dict(path="train.csv", image="image", text="text", positives="text"))
    config.validation = 0.1  # of the groups
    config.batch_size = 64
    config.total_steps = 1000
    config.seed = 0
    config.objective = ConfigDict(dict(name="contrastive", accumulate=1, negatives="batch"))
    config.optimizer = ConfigDict(
        dict(name="adamw", schedule="cosine", warmup_steps=50, weight_decay=1e-6)
    )
    config.learning_rate = 1e-5
    config.dtype = "bfloat16"
    config.remat = "dots"
    config.loss_chunk = 1024
    config.eval_every = 200
    config.checkpoint_every = 200
    return config
