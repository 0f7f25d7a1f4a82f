r"""Contrastive fine-tuning of both towers on image-text pairs: everything trains.

    medsiglip-jax finetune --config contrastive --workdir runs/contrastive \
      --config.data.path=train.csv

`train.csv` has the columns image (a path) and text, and if there are any split (train, validation)
and group (patient or study: never on both sides). Equal texts count as positive pairs. A data set
that TFDS has prepared is given as tfds:NAME, with data.image and data.text naming its features.

Hardware: one GPU of 80 GB in bfloat16 with remat "dots" for batches of 64 and more, or a TPU slice
(configs/tpu_slice.py). Parameters, gradients and AdamW's moments of 878 million weights are 14 GB.
Expect: with 282 steps of 64 from the 9 tissue classes of NCT-CRC-HE-100K the official notebook goes
from an accuracy of 0.49 to 0.96 on CRC-VAL-HE-7K; its loss cannot fall below 1.24 there, because it
takes images of one class for negatives of each other's caption. `positives` is what avoids that.
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
