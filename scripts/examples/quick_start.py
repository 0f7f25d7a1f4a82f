# %% [markdown]
# # Quick start: images against texts
#
# Loads a model, asks which of ten texts fits each image best (zero-shot classification), and
# embeds images and texts into the same space.
#
# - **Before:** run `medsiglip-jax quickstart` once. It trains a small model of handwritten digits
#   in half a minute and writes it to `./quickstart`; `MEDSIGLIP_QUICKSTART` names another place.
# - **With the real weights:** set `MODEL = "google/medsiglip-448"`, `IMAGES` to your files (PNG,
#   JPEG, DICOM) and `TEXTS` to sentences such as "a photo of an arm with a rash".
# - **Cost:** seconds here. MedSigLIP takes 3.5 GB of memory in float32 and 4.5 s for each image on
#   two CPU cores. `load(MODEL, dtype="auto")` computes in bfloat16 on a GPU or TPU.

# %%
import os
from pathlib import Path

import numpy as np

import medsiglip_jax

QUICKSTART = os.environ.get("MEDSIGLIP_QUICKSTART", "quickstart")
MODEL = f"{QUICKSTART}/model"  # or "google/medsiglip-448"
IMAGES = sorted(Path(f"{QUICKSTART}/held_out").glob("*.png"))
WORDS = "zero one two three four five six seven eight nine".split()
TEXTS = [f"a handwritten {word}" for word in WORDS]

model = medsiglip_jax.load(MODEL)

# %% [markdown]
# The processor turns files into uint8 pixels and texts into token ids, always padded to the length
# that the model was trained with. The encoders give vectors of length 1.

# %%
zimg = model.encode_image(model.processor.images(IMAGES))
ztxt = model.encode_text(model.processor.texts(TEXTS))
print(f"images {zimg.shape}, texts {ztxt.shape}, length {np.linalg.norm(zimg[0]):.4f}")

# %% [markdown]
# `similarity` gives a logit for every pair of image and text. Its sigmoid is the model's own
# probability that the two belong together. Each pair is judged by itself, so several texts may fit
# an image, or none; the largest logit of a row is the text that fits best.

# %%
logits = np.asarray(model.similarity(zimg, ztxt))
for image, row in zip(IMAGES, logits, strict=True):
    best = row.argmax()
    print(f"{image.name}  {TEXTS[best]:20}  {1 / (1 + np.exp(-row[best])):.3f}")
