# %% [markdown]
# # Your own training loop in JAX
#
# For people who have a loop already, or want one: the model is a plain dict of arrays
# (`model.params`), a `Model` of parameters that are being differentiated is as good as any other,
# and batches are dicts of numpy arrays. The rest is JAX and optax as everywhere.
#
# - **Before:** run `medsiglip-jax quickstart` once; `MEDSIGLIP_QUICKSTART` names its folder.
# - **With the real weights:** set `MODEL = "google/medsiglip-448"` and read a table of yours with
#   the columns image and text. Parameters, gradients and AdamW's moments take 14 GB in float32.
#   `medsiglip-jax finetune` is this loop with checkpoints, several hosts and a report.
# - **Cost:** 20 seconds here, most of it compiling.

# %%
import os

import jax
import optax

from medsiglip_jax import Model, data, load, losses

QUICKSTART = os.environ.get("MEDSIGLIP_QUICKSTART", "quickstart")
MODEL = f"{QUICKSTART}/model"  # or "google/medsiglip-448"
model = load(MODEL)

# %% [markdown]
# The captions are the labels: single words, which the model has only read within sentences. Rows of
# equal text are positive pairs of each other. A batch has `image`, `text`, `mask` (false where an
# image could not be read) and `positives`, and depends on nothing but the seed and its number.

# %%
train = data.examples.read(f"{QUICKSTART}/digits/digits.csv", text="label", positives="text")
order, side = data.Order((len(train),), seed=0), model.config.image_size
source = data.Input((train,), order, side, tokenize=model.processor.texts)
optimizer = optax.adamw(2e-4)


# %%
def loss(params, image, text, **pairs):
    learner = Model(params, model.config, compute=model.compute)
    zimg, ztxt = learner.encode_image(image), learner.encode_text(text)
    return losses.sigmoid_loss(zimg, ztxt, params["t"], params["b"], **pairs)


@jax.jit
def step(params, state, batch):
    value, gradients = jax.value_and_grad(loss)(params, **batch)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


# %%
params, state, values = model.params, optimizer.init(model.params), []
for batch in data.batches(source, batch_size=32, total_steps=100):
    params, state, value = step(params, state, batch)
    values.append(value)
print(f"mean loss of steps 1-20: {sum(values[:20]) / 20:.3f}, 81-100: {sum(values[-20:]) / 20:.3f}")
