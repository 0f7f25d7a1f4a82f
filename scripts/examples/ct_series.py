# %% [markdown]
# # A CT series: which slices show it?
#
# Embeds the slices of a DICOM series in the order of their positions, and asks how well a text fits
# each. The series is made here: a phantom of air with a tube in its middle third, which looks like
# the digit zero in a slice.
#
# - **Before:** run `medsiglip-jax quickstart` once; `MEDSIGLIP_QUICKSTART` names its folder. DICOM
#   needs `pip install 'medsiglip-jax[dicom]'`.
# - **With the real weights:** set `MODEL = "google/medsiglip-448"`, give `embed` a folder of your
#   DICOM files, and ask for a finding. Leave `--ct-window` out: then three windows become red,
#   green and blue, as in training. `--frame every=5` takes every fifth slice.
# - **Cost:** seconds here. With the real weights 4.5 s for each slice on two CPU cores.

# %%
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pydicom

import medsiglip_jax

MODEL = os.environ.get("MEDSIGLIP_QUICKSTART", "quickstart") + "/model"  # or "google/medsiglip-448"

# %% [markdown]
# pydicom brings a CT slice of 128 x 128 pixels, whose tags are kept. The names of the files say
# nothing about the order, as is usual.

# %%
os.makedirs("series", exist_ok=True)
y, x = np.ogrid[-1:1:128j, -1:1:128j]
tube = np.abs(np.hypot(1.6 * x, y) - 0.7) < 0.17
for place in range(12):
    file = pydicom.examples.ct
    hounsfield = np.where(tube & (4 <= place < 8), 300, -1000).astype(np.int16)
    file.set_pixel_data(hounsfield - int(file.RescaleIntercept), "MONOCHROME2", 16)
    file.ImagePositionPatient = [0, 0, 5 * place]
    file.save_as(f"series/{5 * place % 12:02}.dcm")

# %%
embed = "medsiglip_jax embed --output ct --series --frame all --ct-window 2000/0 --model".split()
subprocess.run([sys.executable, "-m", *embed, MODEL, "series"], check=True)

# %%
rows = pq.read_table("ct/part-00000.parquet").to_pylist()
model = medsiglip_jax.load(MODEL)
zimg = np.array([row["embedding"] for row in rows])
ztxt = model.encode_text(["a handwritten zero"])
for row, logits in zip(rows, model.similarity(zimg, ztxt), strict=True):
    print(f"{row['source']}  {logits[0]:5.1f}")
