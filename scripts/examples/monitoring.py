# %% [markdown]
# # Monitoring: has something changed?
#
# Keeps images that are in control as a reference, compares new ones with it, and alarms (exit code
# 4) when they differ: here black and white are exchanged, as by a device with other settings.
#
# - **Before:** run `medsiglip-jax quickstart` once; `MEDSIGLIP_QUICKSTART` names its folder.
# - **With the real weights:** set `MODEL = "google/medsiglip-448"`. Take some thousand images that
#   the model was not trained on as the reference, and those of each week as a window. With a table
#   of metadata, `--by modality,scanner` also looks at each scanner by itself.
# - **Cost:** half a minute here. With the real weights, the embeddings: 4.5 s for each image on two
#   CPU cores. The tests themselves take seconds.

# %%
import json
import os
import subprocess
import sys

from PIL import Image, ImageOps

from medsiglip_jax.data import examples

QUICKSTART = os.environ.get("MEDSIGLIP_QUICKSTART", "quickstart")
MODEL = f"{QUICKSTART}/model"  # or "google/medsiglip-448"


def medsiglip(*arguments):
    command = [sys.executable, "-m", "medsiglip_jax", *arguments, "--json"]
    return subprocess.run(command, stdout=subprocess.PIPE)


# %%
table = examples.read(f"{QUICKSTART}/digits/digits.csv", label="label")
known, new = table.of_split("train").images, table.of_split("test").images
os.makedirs("inverted", exist_ok=True)
for path in new:
    ImageOps.invert(Image.open(path)).save(f"inverted/{os.path.basename(path)}")

# %%
for name, images in {"known": known, "new": new, "changed": ["inverted"]}.items():
    medsiglip("embed", "--model", MODEL, "--output", name, *images)
medsiglip("monitor", "fit", "--embeddings", "known", "--output", "reference.npz")

# %% [markdown]
# A report is a folder with `report.html`, which shows the most unusual images, `monitor.json`, and
# `metrics.prom` for Prometheus. An alarm says that images differ, not that results are wrong.

# %%
for name in ("new", "changed"):
    check = ["--reference", "reference.npz", "--embeddings", name, "--output", f"report_{name}"]
    checked = medsiglip("monitor", "check", *check)
    tests = json.loads(checked.stdout)["strata"]["all"]
    alarms = [test for test, result in tests.items() if result["alarm"]]
    print(f"{name}: exit code {checked.returncode}, alarms: {', '.join(alarms) or 'none'}")
