r"""A test that everything runs here: a tiny random model on your data, in a minute on a CPU.

    medsiglip-jax finetune --config smoke:spiece.model --workdir runs/smoke \
      --config.data.path=train.csv

The argument is a SentencePiece model (`spiece.model` of any SigLIP checkpoint). The data are read
as in the real run, so that mistakes in a table show here. Expect nothing of the model.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    """`arg`: the SentencePiece model."""
    tower = dict(width=64, depth=2, mlp_dim=128, num_heads=2)
    config = ConfigDict()
    config.model = ConfigDict(
        dict(
            vision=dict(image_size=64, patch_size=16, pool="map", **tower),
            text=dict(vocab_size=32_000, context_length=64, embed_dim=64, **tower),
        )
    )
    config.tokenizer = arg or "spiece.model"
    config.data = ConfigDict(dict(path="train.csv", image="image", text="text", positives="text"))
    config.validation = 0.2
    config.batch_size = 16
    config.total_steps = 20
    config.seed = 0
    config.learning_rate = 1e-3
    config.log_every = 5
    config.checkpoint_every = 10
    return config
