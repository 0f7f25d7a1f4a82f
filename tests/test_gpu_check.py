"""scripts/gpu_check.py from end to end, on this machine, with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"


def check(*flags):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, flags)], capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_figures_are_written(tmp_path):
    small = ["--size", "tiny-56", "--batches", "2", "4", "--train-batches", "2", "--images", "6"]
    done = check(*small, "--repeats", "1", "--output", tmp_path / "check.json")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "check.json").read_text())
    assert report == json.loads(done.stdout)
    found = report["sections"]
    assert found["parity"]["float32"]["image_error"] < 1e-5
    assert found["parity"]["bfloat16"]["least_cosine"] > 0.999
    assert max(found["parity"]["attention_gradients"][k] for k in ("x", "dq", "dk", "dv")) < 0.02
    assert [row["batch"] for row in found["encode"]["rows"]] == [2, 4]
    assert all(row["ours"]["median"] > 0 and "xla" in row for row in found["encode"]["rows"])
    for name in ("train", "train_lora"):
        assert found[name]["rows"][0]["ours_images_per_second"]["median"] > 0
    assert found["memory"]["predicted"] == "no card 'cpu' in cards.toml"
    assert 0 < found["embed"]["busy"] <= 1 and found["embed"]["images"] == 6
    assert report["versions"]["jax"] and report["date"]


def test_what_comes_too_late_is_left_out(tmp_path):
    done = check("--minutes", "0", "--output", tmp_path / "check.json", "--size", "tiny-56")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "check.json").read_text())
    assert all(s["left_out"] == "0 minutes were up" for s in report["sections"].values())


def test_what_is_missing_is_listed():
    done = check("--check")
    assert done.returncode == 0 and json.loads(done.stdout)["missing"] == []
