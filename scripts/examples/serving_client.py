# %% [markdown]
# # Serving: start the server and ask it
#
# Starts `medsiglip-jax serve`, sends an image and a text to `/predict` in the JSON of the official
# container on Vertex AI, and compares the answer with the model called directly.
#
# - **Before:** run `medsiglip-jax quickstart` once; `MEDSIGLIP_QUICKSTART` names its folder. The
#   server needs `pip install 'medsiglip-jax[serve]'`.
# - **With the real weights:** set `MODEL = "google/medsiglip-448"`. Where a server runs already,
#   set `ADDRESS` to it and leave out the cell that starts one.
# - **Cost:** 15 seconds here. With the real weights the server first reads 3.5 GB and compiles;
#   after that an image takes as long as it does in Python.

# %%
import base64
import json
import os
import subprocess
import sys
import urllib.request

import numpy as np

import medsiglip_jax

QUICKSTART = os.environ.get("MEDSIGLIP_QUICKSTART", "quickstart")
MODEL = f"{QUICKSTART}/model"  # or "google/medsiglip-448"
IMAGE = f"{QUICKSTART}/held_out/3.png"

# %% [markdown]
# `--port 0` takes a free port. The server prints its address once it is ready to answer.

# %%
serve = "medsiglip_jax serve --port 0 --drain-delay 0 --model".split()
server = subprocess.Popen([sys.executable, "-m", *serve, MODEL], stdout=subprocess.PIPE, text=True)
ADDRESS = server.stdout.readline().split()[-1]

# %%
image = base64.b64encode(open(IMAGE, "rb").read()).decode()
instances = [{"image": {"input_bytes": image}}, {"text": "a handwritten three"}]
body = json.dumps({"instances": instances}).encode()
request = urllib.request.Request(f"{ADDRESS}/predict", body, {"Content-Type": "application/json"})
predictions = json.load(urllib.request.urlopen(request))["predictions"]
server.terminate()

# %% [markdown]
# This route prepares pixels as the official container does: zero-padded to a square. That preset is
# called `serving`; compare embeddings only with those that were prepared in the same way.

# %%
zimg, ztxt = np.array([prediction["embedding"] for prediction in predictions])
model = medsiglip_jax.load(MODEL)
direct = model.encode_image(model.processor.images(IMAGE, preprocess="serving"))[0]
print(f"cosine of image and text: {zimg @ ztxt:.4f}")
print(f"largest difference to the model called directly: {np.abs(zimg - direct).max():.0e}")
