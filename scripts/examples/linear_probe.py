# %% [markdown]
# # Data-efficient classification: a linear probe on embeddings
#
# Embeds images once, learns a finding from a few labels with logistic regression, and shows how
# good the probe is with how many labels. Here the finding is whether a digit encloses an area
# (0, 6, 8 and 9), which nobody told the model.
#
# - **Before:** run `medsiglip-jax quickstart` once; `MEDSIGLIP_QUICKSTART` names its folder.
# - **With the real weights:** set `MODEL = "google/medsiglip-448"`, give `embed` your images, and
#   write a table with the id of each image (its path below the folder), the label and, if you know
#   them, the split and the patient (`--group patient`).
# - **Cost:** seconds here. With the real weights nearly all time goes into `embed`, 4.5 s for each
#   image on two CPU cores; the probe itself takes seconds, and no GPU.

# %%
import csv
import json
import os
import subprocess
import sys

QUICKSTART = os.environ.get("MEDSIGLIP_QUICKSTART", "quickstart")
MODEL = f"{QUICKSTART}/model"  # or "google/medsiglip-448"
TABLE = f"{QUICKSTART}/digits/digits.csv"  # with the columns id, image, label and split
LOOP = "zero six eight nine".split()


def medsiglip(*arguments):
    command = [sys.executable, "-m", "medsiglip_jax", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


# %%
with open(TABLE) as file, open("loops.csv", "w", newline="") as table:
    labels = [(row["id"], int(row["label"] in LOOP), row["split"]) for row in csv.DictReader(file)]
    csv.writer(table).writerows([("id", "loop", "split"), *labels])
medsiglip("embed", "--model", MODEL, "--output", "embeddings", TABLE)

# %% [markdown]
# `probe fit` chooses the strength of the regularisation and the threshold on the validation rows.
# The probe is a small file without pickle; `probe predict --probe loop.npz` scores new images.

# %%
data = ["--data", "loops.csv", "--embeddings", "embeddings", "--label", "loop"]
fitted = medsiglip("probe", "fit", *data, "--output", "loop.npz")
test = fitted["test"]["classes"]["loop"]
print("rows:", fitted["rows"])
print(f"test AUC {test['auc']:.3f}, 95 % interval {test['low']:.3f} to {test['high']:.3f}")

# %% [markdown]
# The learning curve: three draws of so many training rows, each judged on all test rows.

# %%
for draw in medsiglip("probe", "curve", *data, "--sizes", 10, 30, 100, "--seeds", 3):
    print(f"{draw['n']:4} labels, draw {draw['seed']}: test AUC {draw['auc']:.3f}")
