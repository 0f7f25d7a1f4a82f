# %% [markdown]
# # Classification: several findings per image
#
# Fine-tunes the image tower and a new head on several findings, as the official dermatology
# notebook does (SCIN, ten conditions): rare findings weigh more, thresholds are chosen on
# validation rows, and rows of the split `test` are judged at the end. Our findings are "even" and
# "loop", which says whether a digit encloses an area.
#
# - **Before:** run `medsiglip-jax quickstart` once; `MEDSIGLIP_QUICKSTART` names its folder.
#   Training needs `pip install 'medsiglip-jax[train]'`.
# - **With the real weights:** set `MODEL = "google/medsiglip-448"` and leave out the last two lines
#   of `config`. For SCIN write a row for each image with a column of 0 and 1 for each condition,
#   and its `case_id` as the column `group`, so that no case is on both sides of a split.
# - **Cost:** half a minute here. The recipe needs one GPU of 24 GB.

# %%
import csv
import json
import os
import subprocess
import sys

QUICKSTART = os.environ.get("MEDSIGLIP_QUICKSTART", "quickstart")
MODEL = f"{QUICKSTART}/model"  # or "google/medsiglip-448"
DIGITS = os.path.abspath(f"{QUICKSTART}/digits")
EVEN, LOOP = "zero two four six eight".split(), "zero six eight nine".split()

# %%
with open(f"{DIGITS}/digits.csv") as file, open("findings.csv", "w", newline="") as table:
    rows = [[f"{DIGITS}/{row['image']}", row["split"], int(row["label"] in EVEN),
             int(row["label"] in LOOP)] for row in csv.DictReader(file)]  # fmt: skip
    csv.writer(table).writerows([["image", "split", "even", "loop"], *rows])

# %%
config = {"init": MODEL, "data.path": "findings.csv", "data.label": ("even", "loop")}
config |= {"objective.pos_weight": "balanced", "validation": "validation"}
config |= {"total_steps": 60, "eval_every": 20, "checkpoint_every": 20, "batch_size": 32}
config |= {"freeze": (), "learning_rate": 1e-3, "dtype": "float32"}
finetune = "medsiglip_jax finetune --config classification --workdir findings --json".split()
flags = [f"--config.{key}={value}" for key, value in config.items()]
done = subprocess.run([sys.executable, "-m", *finetune, *flags], check=True, stdout=subprocess.PIPE)

# %% [markdown]
# `findings/export` is a model: `medsiglip-jax classify --labels` scores images with it, and
# transformers loads it. `findings/report.html` shows the curves and the figures of the test rows.

# %%
test = json.loads(done.stdout)["test"]["classes"]
for name, found in test.items():
    figures = ("auc", "sensitivity", "specificity")
    print(name, *(f"{figure} {found[figure]:.3f}" for figure in figures), sep="  ")
