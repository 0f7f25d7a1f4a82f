# %% [markdown]
# # Slides: embed the tiles with tissue, and find more of a kind
#
# Cuts a whole slide into tiles at a resolution of your choice, leaves out those without tissue,
# embeds the others, and finds the tiles that look most like one of them. The slide is made here: a
# pale and a dark piece of tissue on glass.
#
# - **Before:** run `medsiglip-jax quickstart` once; `MEDSIGLIP_QUICKSTART` names its folder. Slides
#   need `pip install 'medsiglip-jax[slides]'`, which brings OpenSlide.
# - **With the real weights:** set `MODEL = "google/medsiglip-448"`, and give `embed` your slides.
#   `medsiglip-jax classify --mpp 1 --heatmap map.png --text tumour --text normal` draws the scores
#   of texts over a slide.
# - **Cost:** seconds here. A slide of 100,000 x 100,000 pixels at 0.5 micrometres per pixel that is
#   half tissue has 25,000 tiles at `--mpp 0.5`, and a quarter as many at `--mpp 1`.

# %%
import json
import os
import subprocess
import sys

import numpy as np
import tifffile

MODEL = os.environ.get("MEDSIGLIP_QUICKSTART", "quickstart") + "/model"  # or "google/medsiglip-448"


def medsiglip(*arguments):
    command = [sys.executable, "-m", "medsiglip_jax", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


# %%
y, x = np.ogrid[:4096, :6144]
pixels = np.full((4096, 6144, 3), (243, 242, 244), np.uint8)
for middle, colour in ((1500, (224, 170, 200)), (4600, (120, 60, 140))):
    pixels[np.hypot(x - middle, y - 2048) < 1200] = colour
pixels -= np.random.default_rng(0).integers(0, 30, pixels.shape, np.uint8)
resolution = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
tifffile.imwrite("slide.tiff", pixels, tile=(256, 256), photometric="rgb", **resolution)

# %% [markdown]
# The file says 20,000 pixels per centimetre, which is 0.5 micrometres per pixel. A tile is named by
# its file and its x, y, level and size. The one that is asked for lies in the dark piece on the
# right, and so do its nearest neighbours.

# %%
manifest = medsiglip("embed", "--model", MODEL, "--output", "tiles", "--mpp", "0.5", "slide.tiff")
print(f"{manifest['embedded']} tiles with tissue")

# %%
query = ["--image", "slide.tiff#tile=4480,2240,0,448", "--top-k", "6"]
for hit in medsiglip("search", "--embeddings", "tiles", "--model", MODEL, *query)[0]["hits"]:
    print(f"{hit['score']:.4f}  {hit['id']}")
