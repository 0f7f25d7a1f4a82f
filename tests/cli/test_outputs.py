"""An input is never an output: what a command would replace is not what it reads."""

import os

import numpy as np
import pytest
from PIL import Image

from medsiglip_jax import cli


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(folder / name)
    (tmp_path / "link.png").symlink_to(folder / "a.png")
    os.link(folder / "a.png", tmp_path / "same.png")
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "part-00000.parquet").write_bytes(b"vectors")
    (tmp_path / "labels.csv").write_text("image,label\na.png,1\n")
    return tmp_path


MODEL = ["--model", "model"]
COMMANDS = {
    "itself": ["preview", "scans/a.png", "--output", "scans/a.png"],
    "another way to it": ["preview", "scans/a.png", "--output", "scans/../scans/a.png"],
    "a link to it": ["preview", "scans/a.png", "--output", "link.png"],
    "another name of it": ["preview", "scans/a.png", "--output", "same.png"],
    "in the folder": ["preview", "scans", "--output", "scans/b.png"],
    "heatmap": ["classify", *MODEL, "--text", "a", "scans/a.png", "--heatmap", "scans/a.png"],
    "search": ["search", *MODEL, "--embeddings", "embeddings", "--text", "a",
               "--output", "embeddings/part-00000.parquet"],
    "probe fit": ["probe", "fit", "--data", "labels.csv", "--embeddings", "embeddings",
                  "--output", "labels.csv"],
    "probe predict": ["probe", "predict", "--probe", "p.npz", "--embeddings", "embeddings",
                      "--output", "embeddings/part-00000.parquet"],
    "evaluate": ["evaluate", "--task", "idrid", *MODEL, "--data", "scans", "--output", "scans"],
    "embed": ["embed", *MODEL, "scans", "--output", "scans"],
}  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_an_input_is_never_an_output(scans, command, capsys, monkeypatch):
    monkeypatch.chdir(scans)
    before = {path: path.read_bytes() for path in scans.rglob("*") if path.is_file()}
    assert cli.main(command) == 2
    err = capsys.readouterr().err.strip()
    assert "choose another name for the output" in err and "\n" not in err
    assert {path: path.read_bytes() for path in scans.rglob("*") if path.is_file()} == before


def test_a_page_of_ours_is_replaced_where_it_lies(scans, monkeypatch):
    monkeypatch.chdir(scans)
    for _ in range(2):
        assert cli.main(["preview", "scans", "--output", "scans/sheet.html"]) == 0
