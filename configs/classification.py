r"""Classification on pooled image features: one class per image, or several findings.

    medsiglip-jax finetune --config classification --workdir runs/classes \
      --config.data.path=train.csv --config.data.label=diagnosis

A data set that TFDS has prepared is given as tfds:NAME, with data.label naming a ClassLabel.

For several findings at once (columns of 0, 1 or nothing) set `data.label` to a tuple of the columns
and `objective.pos_weight` to "balanced". The official dermatology notebook does that (SCIN, 10
conditions, 243 steps of 64; macro AUC 0.85 on held-out images). It splits by image; with a `group`
column this recipe splits by case, and the AUC is then lower, and right.

The first 20 of 27 blocks are frozen. Hardware: one GPU of 24 GB in bfloat16 with remat "block".
Compiled for one TPU device (`medsiglip-jax plan`) a step needs at least 13 GiB, and 56 GiB without
remat. Expect the AUC on the held-out rows to rise for a few hundred steps and then to fall; the
best checkpoint is exported.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    """`arg`: the checkpoint to start from."""
    config = ConfigDict()
    config.init = arg or "google/medsiglip-448"
    config.data = ConfigDict(dict(path="train.csv", image="image", label="label"))
    config.validation = 0.1
    config.batch_size = 64
    config.total_steps = 250
    config.seed = 0
    config.objective = ConfigDict(dict(name="classification", pool="mean", accumulate=1))
    config.freeze = (
        "img/(embedding/.*|pos_embedding)",
        "img/Transformer/encoderblock_(1?[0-9])/.*",
    )
    config.optimizer = ConfigDict(
        dict(name="adamw", schedule="cosine", warmup_steps=5, weight_decay=5e-7)
    )
    config.learning_rate = 5e-5
    config.dtype = "bfloat16"
    config.remat = "block"
    config.eval_every = 50
    config.checkpoint_every = 50
    config.best = "val_auc"
    return config
