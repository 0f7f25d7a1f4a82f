# %% [markdown]
# # First steps on a TPU or GPU (Kaggle, Colab), and on a CPU as well
#
# Shows which devices there are, spreads batches over all of them, computes in bfloat16 where that
# is fast, and measures images per second.
#
# - **Before:** choose a TPU or GPU as the accelerator of the notebook, and install the package with
#   the matching jax: `pip install 'medsiglip-jax[tpu,quickstart]'`, or `cuda12` instead of `tpu`.
#   Run `medsiglip-jax quickstart` once; `MEDSIGLIP_QUICKSTART` names its folder.
# - **With the real weights:** set `MODEL = "google/medsiglip-448"`. They are gated: accept their
#   terms on the model page, and give the notebook a token in the variable `HF_TOKEN`.
# - **Cost:** seconds here. The real weights take 1.8 GB of memory on each device in bfloat16, and
#   the first batch compiles for minutes. This notebook has been run on CPUs only.

# %%
import os
import time
from pathlib import Path

import jax

import medsiglip_jax

QUICKSTART = os.environ.get("MEDSIGLIP_QUICKSTART", "quickstart")
MODEL = f"{QUICKSTART}/model"  # or "google/medsiglip-448"
IMAGES = sorted(Path(f"{QUICKSTART}/digits/images").glob("*.png"))
print(f"{jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# `make_mesh` takes all devices: the parameters lie on each, and every batch is split among them.
# `"auto"` is bfloat16 on accelerators and float32 on CPUs. A TPU belongs to one process at a time:
# restart the kernel of the notebook before you run a `medsiglip-jax` command that needs it.

# %%
model = medsiglip_jax.load(MODEL, dtype="auto", mesh=medsiglip_jax.make_mesh())
pixels = model.processor.images(IMAGES)
print(f"{len(pixels)} images of {pixels.shape[1]} pixels, computed in {model.compute.dtype}")

# %% [markdown]
# The first call compiles. JAX returns before a result is computed; `block_until_ready` waits.

# %%
for call in ("first call", "second call"):
    start = time.perf_counter()
    zimg = model.encode_image(pixels, batch_size=64).block_until_ready()
    print(f"{call}: {len(pixels) / (time.perf_counter() - start):.0f} images/s")
